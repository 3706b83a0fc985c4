"""Attention: the plain path, and kernels that keep no scores in memory.

B batch, L query length, S key length, N query heads, K key-value heads, H head
width, G = N / K queries of a key-value head.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.core.errors import InputError
from calm_jax.models.config import ATTENTIONS, ModelConfig
from calm_jax.models.layers import at_least_float32

Array = jax.Array
_HALVES = ("bfloat16", "float16")
# What the TPU's kernel reads at a time: multiples of its 128 lanes.
_LANES = 128
_BLOCKS = (512, 256, _LANES)
# What cuDNN reads at a time. Its gradient takes no odd length with a mask, and
# may be NaN where it has to fill up a tile itself (pytorch issue 196678).
_TILE = 128


class Segments(NamedTuple):
  """In place of a mask: causal, and within segments, of contiguous tokens.

  Attributes:
    queries: int32 [B, L].
    keys: int32 [B, S].
    positions: of the queries within their segments, int32 [B, L].
  """

  queries: Array
  keys: Array
  positions: Array


def choose(asked: str, device: jax.Device, config: ModelConfig) -> str:
  """The kernel of one model: `Compute.attention`.

  Args:
    asked: one of config.ATTENTIONS, or "auto" for splash on TPUs, cudnn on
      GPUs, and xla elsewhere and for models that those do not take.
    device: one of those that compute.
    config: the model.

  Raises:
    InputError: there is no such kernel on that device, or for that model.
  """
  if asked == "auto":
    fast = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform, "xla")
    return "xla" if _why_not(fast, device, config) else fast
  if asked not in ATTENTIONS:
    raise InputError(f"attention={asked!r} is none of {('auto', *ATTENTIONS)}")
  reason = _why_not(asked, device, config)
  if reason:
    raise InputError(
      f"attention={asked!r} {reason}; use 'xla', or 'auto', which takes the "
      "fastest that there is"
    )
  return asked


def _why_not(kernel: str, device: jax.Device, config: ModelConfig) -> str:
  if kernel == "splash" and device.platform != "tpu":
    return "runs on TPUs only"
  if kernel != "cudnn":
    return ""
  if device.platform != "gpu":
    return "runs on NVIDIA GPUs only"
  if config.compute.dtype not in _HALVES:
    return f"takes {' or '.join(_HALVES)}, not {config.compute.dtype}"
  if config.attention_cap is not None:
    return "has no soft cap of scores, and this model has one"
  # "9.0"; of other makers' GPUs a name.
  generation = str(device.compute_capability).split(".")[0]
  if not generation.isdigit() or int(generation) < 8:
    return (
      "runs on NVIDIA GPUs of compute capability 8.0 or more, not on "
      f"{device.compute_capability}"
    )
  # Of the gradient: forward, later generations take wider ones too.
  widest = 256 if generation == "9" else 128
  if config.head_dim > widest or config.head_dim % 8:
    return f"takes heads of 8, 16, .. {widest} there, not of {config.head_dim}"
  return ""


def splash(
  q_BLNH: Array,
  k_BSKH: Array,
  v_BSKH: Array,
  segments: Segments,
  window: int | None = None,
  scale: float | None = None,
  cap: float | None = None,
  place: Any = None,
) -> Array:
  """`dot_product_attention` by the TPU's kernel, [B, L, N, H].

  Query l reads the keys up to the l-th, of its own segment, and of those the
  latest `window`. Lengths that the kernel's blocks do not divide are padded.

  Args:
    q_BLNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    segments: of both.
    window: keys that a query sees, its own among them; all if None.
    scale: as for `dot_product_attention`.
    cap: as there.
    place: of the model, see `Compute.place`; None on one device.
  """
  # Here: no one but TPUs needs it at the start of a program.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  L, H = q_BLNH.shape[1], q_BLNH.shape[-1]
  pieces = 1 if place is None else place.sequence
  q_BLNH = q_BLNH * jnp.asarray(
    H**-0.5 if scale is None else scale, q_BLNH.dtype
  )
  unit = _LANES * pieces
  q_BNLH = _padded(q_BLNH, unit).swapaxes(1, 2)
  k_BKSH = _padded(k_BSKH, unit).swapaxes(1, 2)
  v_BKSH = _padded(v_BSKH, unit).swapaxes(1, 2)
  shape = q_BNLH.shape[2], k_BKSH.shape[2]
  left = None if window is None else window - 1
  mask = splash_lib.LocalMask(shape, (left, 0), 0)
  if window is None:
    mask = splash_lib.CausalMask(shape)
  block_q = _block(shape[0] // pieces)
  block_kv = _block(shape[1])
  kernel = splash_lib.make_splash_mha(
    # All heads share it, those of other devices too.
    splash_lib.MultiHeadMask([mask]),
    block_sizes=splash_lib.BlockSizes(
      block_q, block_kv, block_kv,
      block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
      block_q_dq=block_q, block_kv_dq=block_kv,
    ),
    attn_logits_soft_cap=cap,
    head_shards=1,
    q_seq_shards=pieces,
  )  # fmt: skip
  arrays = (
    q_BNLH, k_BKSH, v_BKSH,
    _padded(segments.queries, unit), _padded(segments.keys, unit),
  )  # fmt: skip
  if place is None:
    out_BNLH = _rows(kernel, *arrays)
  else:
    out_BNLH = place.attention(_rows, kernel, *arrays)
  return out_BNLH.swapaxes(1, 2)[:, :L]


def _rows(kernel, q_BNLH, k_BKSH, v_BKSH, q_segments_BL, k_segments_BS):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  ids = splash_lib.SegmentIds(q_segments_BL, k_segments_BS)
  return jax.vmap(kernel)(q_BNLH, k_BKSH, v_BKSH, ids)


def _padded(x: Array, unit: int) -> Array:
  """Zeros at the end of the second axis, which no real query sees."""
  missing = -x.shape[1] % unit
  if not missing:
    return x
  return jnp.pad(x, [(0, missing if i == 1 else 0) for i in range(x.ndim)])


def _block(length: int) -> int:
  return max(size for size in _BLOCKS if length % size == 0)


def dot_product_attention(
  q_BLNH: Array,
  k_BSKH: Array,
  v_BSKH: Array,
  mask_B1LS: Array,
  scale: float | None = None,
  cap: float | None = None,
  kernel: str = "xla",
  place: Any = None,
) -> Array:
  """Softmax attention, [B, L, N, H]; each key head serves N / K queries.

  Scores are multiplied by `scale`, H^-1/2 if None, and with a cap they become
  cap tanh(scores / cap). `kernel` is "xla" or, without a cap, "cudnn"; `place`
  is the model's, see `Compute.place`. What a query gets that sees no key is
  finite, and otherwise up to the kernel.
  """
  if kernel == "cudnn":
    rows = functools.partial(_cudnn, scale)
    arrays = *(x.swapaxes(1, 2) for x in (q_BLNH, k_BSKH, v_BSKH)), mask_B1LS
    if place is None:
      return rows(None, *arrays).swapaxes(1, 2)
    return place.attention(rows, None, *arrays).swapaxes(1, 2)
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  return attend(q_BLNH, [(k_BKSH, v_BKSH, mask_B1LS)], scale, cap)


def _cudnn(scale, _, q_BNLH, k_BKSH, v_BKSH, mask_B1LS):
  arrays = [x.swapaxes(1, 2) for x in (q_BNLH, k_BKSH, v_BKSH)]
  L, S = mask_B1LS.shape[2:]
  none, more_L, more_S = (0, 0), (0, -L % _TILE), (0, -S % _TILE)
  mask_B1LS = jnp.pad(mask_B1LS, (none, none, more_L, more_S))
  # A row that sees nothing, as those that are added, sees all: in a softmax of
  # nothing NaNs arise, which would reach the gradients of other rows.
  mask_B1LS |= ~mask_B1LS.any(axis=-1, keepdims=True)
  out_BLNH = jax.nn.dot_product_attention(
    *(_padded(x, _TILE) for x in arrays), mask=mask_B1LS, scale=scale,
    implementation="cudnn",
  )  # fmt: skip
  return out_BLNH[:, :L].swapaxes(1, 2)


def attend(
  q_BLNH: Array,
  blocks: list[tuple[Array, Array, Array]],
  scale: float | None = None,
  cap: float | None = None,
) -> Array:
  """`dot_product_attention` to blocks of keys, values [B, K, S, H] and masks.

  One softmax goes over the keys of all blocks.
  """
  B, L, N, H = q_BLNH.shape
  K = blocks[0][0].shape[1]
  dtype = at_least_float32(q_BLNH.dtype)
  # Rows r of a key head: XLA's CPU backend fuses products, mask and softmax of
  # four dimensions, each of which is contiguous, and not of five.
  scale = jnp.asarray(H**-0.5 if scale is None else scale, q_BLNH.dtype)
  q_BKGLH = (q_BLNH * scale).reshape(B, L, K, -1, H).transpose(0, 2, 3, 1, 4)
  q_BKRH = q_BKGLH.reshape(B, K, -1, H)
  scores = []
  for k_BKSH, _, mask_B1LS in blocks:
    scores_BKRS = jnp.einsum(
      "bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=dtype
    )
    if cap is not None:
      scores_BKRS = cap * jnp.tanh(scores_BKRS / cap)
    # Added, because the gradient of a choice is a pass of its own.
    bias_B1LS = jnp.where(mask_B1LS, 0, -1e30).astype(dtype)
    scores.append(scores_BKRS + jnp.tile(bias_B1LS, (1, 1, N // K, 1)))
  top_BKR1 = functools.reduce(
    jnp.maximum, [s.max(axis=-1, keepdims=True) for s in scores]
  )
  # Divided by the sum at the end, where there are H features and not S keys.
  out_BKRH = sum_BKR1 = 0
  for scores_BKRS, (_, v_BKSH, _) in zip(scores, blocks, strict=True):
    weights_BKRS = jnp.exp(scores_BKRS - jax.lax.stop_gradient(top_BKR1))
    sum_BKR1 += weights_BKRS.sum(axis=-1, keepdims=True)
    out_BKRH += jnp.einsum(
      "bkrs,bksh->bkrh",
      weights_BKRS.astype(v_BKSH.dtype),
      v_BKSH,
      preferred_element_type=dtype,
    )
  out_BKRH = (out_BKRH / sum_BKR1).astype(q_BLNH.dtype)
  out_BKGLH = out_BKRH.reshape(B, K, -1, L, H)
  return out_BKGLH.transpose(0, 3, 1, 2, 4).reshape(B, L, N, H)
