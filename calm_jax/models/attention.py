"""Attention, by XLA or by kernels that keep no scores in memory.

B batch, L query length, S key length, N query heads, K key-value heads, H head
width, G = N / K queries of a key-value head.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from calm_jax.core.errors import InputError, check_choice
from calm_jax.models.config import ATTENTIONS, ModelConfig
from calm_jax.models.layers import at_least_float32

Array = jax.Array
HALVES = ("bfloat16", "float16")
# The TPU's kernel reads blocks of these lengths, multiples of its 128 lanes.
_LANES = 128
_BLOCKS = (512, 256, _LANES)
# cuDNN reads tiles of this length. Its gradient takes no odd length with a
# mask, and may be NaN where it fills up a tile itself (pytorch issue 196678).
_TILE = 128
# "pieces" takes that many queries at a time, or more so that programs of long
# rows stay small: each piece has products of its own shapes, which a GPU's
# compiler tunes one by one.
_PIECE, _MOST_PIECES = 512, 16
PIECES = "attention_in_pieces"  # the name of its output, for `jax.checkpoint`


class SegmentMask(NamedTuple):
  """Stands for a causal mask within segments of contiguous tokens."""

  queries: Array  # int32 [B, L], the segment of each query
  keys: Array  # int32 [B, S], the segment of each key
  positions: Array  # int32 [B, L], of the queries within their segments


def choose(asked: str, device: jax.Device, config: ModelConfig) -> str:
  """Chooses the kernel of a model on a device, one of config.ATTENTIONS.

  "auto" asks for splash on TPUs, cudnn on GPUs, pieces for models that those
  do not take, and xla elsewhere. What cannot be had raises InputError.
  """
  check_choice("attention", asked, ("auto", *ATTENTIONS))
  if asked == "auto":
    fast = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform, "xla")
    return "pieces" if _why_not(fast, device, config) else fast
  if reason := _why_not(asked, device, config):
    raise InputError(
      f"attention={asked!r} {reason}; use 'xla', or 'auto', which takes the "
      "fastest that there is"
    )
  return asked


def nvidia_generation(device: jax.Device) -> int:
  """The first number of a GPU's compute capability; 0 for other makers'."""
  # Theirs have a name.
  generation = str(device.compute_capability).split(".")[0]
  return int(generation) if generation.isdigit() else 0


def _why_not(kernel: str, device: jax.Device, config: ModelConfig) -> str:
  """Says why a kernel cannot compute a model on a device; "" if it can."""
  if kernel == "splash" and device.platform != "tpu":
    return "runs on TPUs only"
  if kernel != "cudnn":
    return ""
  if device.platform != "gpu":
    return "runs on NVIDIA GPUs only"
  if config.compute.dtype not in HALVES:
    return f"takes {' or '.join(HALVES)}, not {config.compute.dtype}"
  if config.attention_cap is not None:
    return "has no soft cap of scores, and this model has one"
  generation = nvidia_generation(device)
  if generation < 8:
    version = device.compute_capability
    return f"runs on GPUs of compute capability 8.0 or more, not on {version}"
  # The gradient's limit; the forward pass of later ones takes wider heads.
  widest = 256 if generation == 9 else 128
  if config.head_dim > widest or config.head_dim % 8:
    return f"takes heads of 8, 16, .. {widest} there, not of {config.head_dim}"
  return ""


def attend(
  q_BLNH: Array,
  blocks: Sequence[tuple[Array, Array, Array | SegmentMask]],
  scale: float | None = None,
  cap: float | None = None,
  *,
  kernel: str = "xla",
  window: int | None = None,
  place: Any = None,
) -> Array:
  """Softmax attention, [B, L, N, H]; each key head serves N / K queries.

  A query that may read no key gets a finite value, which depends on the kernel.

  Args:
    q_BLNH: queries.
    blocks: (keys [B, K, S, H], values [B, K, S, H], mask) of each block of
      keys; one softmax goes over all of them. The mask is bool [B, 1, L, S], or
      a `SegmentMask`, for cuDNN of rows as `Compute.packed=False` has them.
      Only "xla" reads several blocks. It reads no `SegmentMask`, and "splash"
      nothing else.
    scale: scores are multiplied by it; H^-1/2 if None.
    cap: c, scores become c tanh(scores / c); None for none.
    kernel: one of config.ATTENTIONS; "cudnn" without a cap.
    window: with a `SegmentMask`, the number of latest keys that a query reads,
      its own among them; all if None.
    place: the model's `Compute.place`.
  """
  if kernel == "xla":
    return _xla(q_BLNH, blocks, scale, cap)
  [(k_BKSH, v_BKSH, mask)] = blocks
  by_segments = isinstance(mask, SegmentMask)
  if kernel == "splash":
    return _splash(q_BLNH, k_BKSH, v_BKSH, mask, window, scale, cap, place)
  if kernel == "pieces":
    # Devices that share the queries have pieces of them already.
    if place is not None and place.sequence > 1:
      return _xla(q_BLNH, blocks, scale, cap)
    out_BLNH = _pieces(window, scale, cap, q_BLNH, k_BKSH, v_BKSH, mask)
    return checkpoint_name(out_BLNH, PIECES)
  # Padding behind a segment is hidden from it by causality alone.
  attend_rows = functools.partial(_cudnn, scale, window)
  masks = () if by_segments else (mask,)
  q_BNLH = q_BLNH.swapaxes(1, 2)
  return _on_devices(place, attend_rows, None, q_BNLH, k_BKSH, v_BKSH, *masks)


def _on_devices(place, function, kernel, *arrays) -> Array:
  """Calls a kernel, [B, N, L, H], on each device's share: [B, L, N, H]."""
  if place is None:
    return function(kernel, *arrays).swapaxes(1, 2)
  return place.attention(function, kernel, *arrays).swapaxes(1, 2)


def _splash(q_BLNH, k_BKSH, v_BKSH, segments, window, scale, cap, place):
  """`attend` by the TPU's kernel; lengths are padded to whole blocks of it."""
  # Imported here: only TPUs need it at the start of a program.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

  def attend_rows(kernel, q_BNLH, k_BKSH, v_BKSH, *segments):
    ids = splash_lib.SegmentIds(*segments)
    return jax.vmap(kernel)(q_BNLH, k_BKSH, v_BKSH, ids)

  L, H = q_BLNH.shape[1], q_BLNH.shape[-1]
  pieces = 1 if place is None else place.sequence
  unit = _LANES * pieces
  scale = H**-0.5 if scale is None else scale
  q_BLNH = q_BLNH * jnp.asarray(scale, q_BLNH.dtype)
  q_BNLH = _padded(q_BLNH, unit).swapaxes(1, 2)
  k_BKSH, v_BKSH = _padded(k_BKSH, unit, 2), _padded(v_BKSH, unit, 2)
  shape = q_BNLH.shape[2], k_BKSH.shape[2]
  mask = splash_lib.CausalMask(shape)
  if window is not None and window < segments.keys.shape[1]:
    mask = splash_lib.LocalMask(shape, (window - 1, 0), 0)
  lengths = shape[0] // pieces, shape[1]
  block_q, block_kv = (max(b for b in _BLOCKS if n % b == 0) for n in lengths)
  # The forward pass, the gradients of keys and values, those of queries.
  sizes = (block_q, block_kv, block_kv) * 2 + (block_q, block_kv)
  kernel = splash_lib.make_splash_mha(
    # All heads share it, those of other devices too.
    splash_lib.MultiHeadMask([mask]),
    block_sizes=splash_lib.BlockSizes(*sizes),
    attn_logits_soft_cap=cap,
    head_shards=1,
    q_seq_shards=pieces,
  )
  ids = _padded(segments.queries, unit), _padded(segments.keys, unit)
  arrays = q_BNLH, k_BKSH, v_BKSH, *ids
  return _on_devices(place, attend_rows, kernel, *arrays)[:, :L]


def _padded(x: Array, unit: int, axis: int = 1) -> Array:
  """Adds zeros at the end of an axis, which no real query sees."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % unit)
  return jnp.pad(x, widths) if any(widths[axis]) else x


def _cudnn(scale, window, _kernel, q_BNLH, k_BKSH, v_BKSH, mask_B1LS=None):
  """`attend` by cuDNN's kernel; lengths are padded to whole tiles of it.

  It is causal without a mask; only then is there a window.
  """
  arrays = [x.swapaxes(1, 2) for x in (q_BNLH, k_BKSH, v_BKSH)]
  if mask_B1LS is None:
    how: dict[str, Any] = {"is_causal": True}
    if window is not None and window < k_BKSH.shape[2]:
      how["local_window_size"] = window - 1, 0
  else:
    mask_B1LS = _padded(_padded(mask_B1LS, _TILE, 2), _TILE, 3)
    # A row that sees nothing, as those that are added, sees all: in a softmax
    # of nothing NaNs arise, which would reach the gradients of other rows.
    how = {"mask": mask_B1LS | ~mask_B1LS.any(axis=-1, keepdims=True)}
  q_BLNH, k_BSKH, v_BSKH = (_padded(x, _TILE) for x in arrays)
  out_BLNH = jax.nn.dot_product_attention(
    q_BLNH, k_BSKH, v_BSKH, scale=scale, implementation="cudnn", **how
  )
  return out_BLNH.swapaxes(1, 2)[:, :, : q_BNLH.shape[2]]


def _in_pieces(window, scale, cap, q_BLNH, k_BKSH, v_BKSH, mask) -> Array:
  """`attend` by XLA for some queries at a time, with the keys they may read."""

  @jax.checkpoint
  def attend_piece(q_BLNH, k_BKSH, v_BKSH, mask_B1LS):
    return _xla(q_BLNH, [(k_BKSH, v_BKSH, mask_B1LS)], scale, cap)

  L, outputs = q_BLNH.shape[1], []
  length = max(_PIECE, -(-L // _MOST_PIECES))
  for start in range(0, L, length):
    queries, keys = slice(start, min(start + length, L)), slice(None)
    if isinstance(mask, SegmentMask):
      first = 0 if window is None else max(0, start - window + 1)
      keys = slice(first, queries.stop)
      mask_B1LS = _mask_of_piece(mask, window, queries, keys)
    else:
      mask_B1LS = mask[:, :, queries]
    q_piece, k_piece = q_BLNH[:, queries], k_BKSH[:, :, keys]
    outputs.append(
      attend_piece(q_piece, k_piece, v_BKSH[:, :, keys], mask_B1LS)
    )
  return jnp.concatenate(outputs, axis=1)


def _mask_of_piece(segments, window, queries: slice, keys: slice) -> Array:
  """Makes the mask [B, 1, L, S] of some queries and keys."""
  slots_L1 = jnp.arange(queries.start, queries.stop)[:, None]
  slots_S = jnp.arange(keys.start, keys.stop)
  visible_LS = slots_S <= slots_L1
  if window is not None:
    visible_LS &= slots_S > slots_L1 - window
  queries_BL1 = segments.queries[:, queries, None]
  mask_BLS = visible_LS & (queries_BL1 == segments.keys[:, None, keys])
  # It is small beside the scores of all heads, and XLA takes several times as
  # long to compile where it may fuse it into all that reads it.
  return jax.lax.optimization_barrier(mask_BLS[:, None])


# The gradient makes the scores again. The checkpoints alone would not do: the
# policy of one around them, which keeps products of matrices, would rule.
_pieces = jax.custom_vjp(_in_pieces, nondiff_argnums=(0, 1, 2))


def _pieces_forward(*arguments):
  return _in_pieces(*arguments), arguments[3:]


def _pieces_backward(window, scale, cap, arrays, gradient_BLNH):
  *qkv, mask = arrays
  attend_rows = functools.partial(_in_pieces, window, scale, cap, mask=mask)
  _, backward = jax.vjp(attend_rows, *qkv)
  return *backward(gradient_BLNH), None


_pieces.defvjp(_pieces_forward, _pieces_backward)


def _xla(q_BLNH: Array, blocks, scale, cap) -> Array:
  """`attend` by XLA, which keeps all scores."""
  B, L, N, H = q_BLNH.shape
  K = blocks[0][0].shape[1]
  dtype = at_least_float32(q_BLNH.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=dtype)
  # Rows r of a key head: XLA's CPU backend fuses products, mask and softmax of
  # four dimensions, each of which is contiguous, and not of five.
  scale = jnp.asarray(H**-0.5 if scale is None else scale, q_BLNH.dtype)
  q_BKGLH = (q_BLNH * scale).reshape(B, L, K, -1, H).transpose(0, 2, 3, 1, 4)
  q_BKRH = q_BKGLH.reshape(B, K, -1, H)
  scores = []
  for k_BKSH, _, mask_B1LS in blocks:
    scores_BKRS = product("bkrh,bksh->bkrs", q_BKRH, k_BKSH)
    if cap is not None:
      scores_BKRS = cap * jnp.tanh(scores_BKRS / cap)
    # Added, because the gradient of a choice is a pass of its own.
    bias_B1LS = jnp.where(mask_B1LS, 0, -1e30).astype(dtype)
    scores.append(scores_BKRS + jnp.tile(bias_B1LS, (1, 1, N // K, 1)))
  tops = [s.max(axis=-1, keepdims=True) for s in scores]
  top_BKR1 = functools.reduce(jnp.maximum, tops)
  top_BKR1 = jax.lax.stop_gradient(top_BKR1)
  weights = [jnp.exp(scores_BKRS - top_BKR1) for scores_BKRS in scores]
  sum_BKR1 = sum(w.sum(axis=-1, keepdims=True) for w in weights)
  if L == 1:  # A GPU then divides in the kernel that sums.
    weights, sum_BKR1 = [w / sum_BKR1 for w in weights], 1
  out_BKRH: Any = sum(
    product("bkrs,bksh->bkrh", weights_BKRS.astype(v_BKSH.dtype), v_BKSH)
    for weights_BKRS, (_, v_BKSH, _) in zip(weights, blocks, strict=True)
  )
  # At the end there are H features to divide, and not S keys.
  out_BKRH = (out_BKRH / sum_BKR1).astype(q_BLNH.dtype)
  out_BKGLH = out_BKRH.reshape(B, K, -1, L, H)
  return out_BKGLH.transpose(0, 3, 1, 2, 4).reshape(B, L, N, H)
