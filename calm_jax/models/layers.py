"""The layers of a block, as flax.linen modules without state.

B batch, L query length, S key length, D width, N query heads, K key-value
heads, H head width, G = N / K queries of a key-value head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from calm_jax.models.config import ModelConfig
from calm_jax.models.quantisation import matmul

Array = jax.Array


class Linear(nn.Module):
  """y = x W + b, computed in `dtype` from parameters of any dtype.

  With (x A) B besides, if the parameters hold them: see `models.lora`. W may
  be quantised: see `models.quantisation`.
  """

  features: int
  use_bias: bool = False
  dtype: str = "float32"
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (x.shape[-1], self.features)
    kernel = self.get_variable("params", "kernel")
    if not isinstance(kernel, Mapping):
      kernel = self.param("kernel", self.kernel_init, shape)
    # XLA's CPU backend is several times slower on the backward pass of a
    # batched [B, L, D] matmul than on the same one as [B L, D].
    flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    y = matmul(flat, kernel)
    if self.has_variable("params", "lora_a"):
      a, b = (self.get_variable("params", n) for n in ("lora_a", "lora_b"))
      y = y + (flat @ a.astype(self.dtype)) @ b.astype(self.dtype)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


def at_least_float32(dtype):
  """What norms, angles, softmax and logits are computed in."""
  return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 or more; the result is of x's dtype.

  With `plus_one` the parameter is what the scale exceeds one by.
  """

  eps: float
  plus_one: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(at_least_float32(x.dtype))
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(mean_square + self.eps)
    if self.plus_one:
      scale = 1 + scale.astype(x32.dtype)
    return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias, in float32 or more, of x's dtype."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    x32 = x.astype(at_least_float32(x.dtype))
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + self.eps)
    return (y * scale + bias).astype(x.dtype)


def norm(config: ModelConfig, name: str | None = None) -> nn.Module:
  """The norm of a family."""
  if config.norm == "layer":
    return LayerNorm(config.norm_eps, name=name)
  return RMSNorm(config.norm_eps, config.norm == "rms_plus_one", name=name)


def dot_product_attention(
  q_BLNH: Array,
  k_BSKH: Array,
  v_BSKH: Array,
  mask_B1LS: Array,
  scale: float | None = None,
  cap: float | None = None,
) -> Array:
  """Softmax attention, [B, L, N, H]; each key head serves N / K queries.

  Scores are multiplied by `scale`, H^-1/2 if None, and with a cap they become
  cap tanh(scores / cap).
  """
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  return attend(q_BLNH, [(k_BKSH, v_BKSH, mask_B1LS)], scale, cap)


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
