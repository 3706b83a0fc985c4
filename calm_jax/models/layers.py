"""The blocks of a decoder, as flax.linen modules without state.

B batch, L query length, S key length, D width, N query heads, K key-value
heads, H head width, F MLP width.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from calm_jax.models.config import ModelConfig

Array = jax.Array


class Linear(nn.Module):
  """y = x W + b, computed in `dtype` from parameters of any dtype."""

  features: int
  use_bias: bool = False
  dtype: str = "float32"
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    # XLA's CPU backend is several times slower on the backward pass of a
    # batched [B, L, D] matmul than on the same one as [B L, D].
    y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(
      self.dtype
    )
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)
    return y.reshape(*x.shape[:-1], self.features)


def at_least_float32(dtype):
  """What norms, angles, softmax and logits are computed in."""
  return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 or more; the result is of x's dtype."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(at_least_float32(x.dtype))
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(mean_square + self.eps)
    return (y * scale).astype(x.dtype)


class Context(NamedTuple):
  """What every layer needs to know of the sequence.

  Attributes:
    rope: (cos, sin), each float32 or more [B, L, 1, H/2].
    mask: bool [B, 1, L, S], True where query l may read key s.
    index: int32 [], the cache's slot of the first query; None without a cache.
  """

  rope: tuple[Array, Array]
  mask: Array
  index: Array | None = None


def rope_tables(positions_BL: Array, config: ModelConfig):
  """Cosines and sines of the rotary angles, [B, L, 1, H/2] each."""
  half, dtype = config.head_dim // 2, at_least_float32(config.dtype)
  frequencies = config.rope_theta ** (-jnp.arange(half, dtype=dtype) / half)
  angles = positions_BL[..., None, None].astype(dtype) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLNH: Array, rope: tuple[Array, Array]) -> Array:
  """Rotates pairs (h, h + H/2) by the angle of their position."""
  cos, sin = rope
  a, b = jnp.split(x_BLNH.astype(cos.dtype), 2, axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return y.astype(x_BLNH.dtype)


def dot_product_attention(
  q_BLNH: Array, k_BSKH: Array, v_BSKH: Array, mask_B1LS: Array
) -> Array:
  """Softmax attention, [B, L, N, H]; each key head serves N / K queries."""
  if q_BLNH.dtype != jnp.float64:
    return jax.nn.dot_product_attention(q_BLNH, k_BSKH, v_BSKH, mask=mask_B1LS)
  # The library's softmax is never more than float32, too coarse for gradients
  # to be checked against finite differences: float64 is spelled out.
  group = q_BLNH.shape[2] // k_BSKH.shape[2]
  k_BSNH, v_BSNH = (jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
  scores = jnp.einsum("blnh,bsnh->bnls", q_BLNH, k_BSNH)
  scores = scores / q_BLNH.shape[-1] ** 0.5
  scores = jnp.where(mask_B1LS, scores, jnp.finfo(scores.dtype).min)
  return jnp.einsum("bnls,bsnh->blnh", jax.nn.softmax(scores), v_BSNH)


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: Array, context: Context, cache=None, layer=None):
    c = self.config
    B, L, D = x_BLD.shape

    def project(name, heads):
      y = Linear(heads * c.head_dim, c.attention_bias, c.dtype, name=name)
      return y(x_BLD).reshape(B, L, heads, c.head_dim)

    q_BLNH = rotate(project("query", c.num_heads), context.rope)
    k_BSKH = rotate(project("key", c.num_kv_heads), context.rope)
    v_BSKH = project("value", c.num_kv_heads)
    if cache is not None:
      at = (layer, 0, context.index, 0, 0)
      update = jax.lax.dynamic_update_slice
      cache = {
        "key": update(cache["key"], k_BSKH[None], at),
        "value": update(cache["value"], v_BSKH[None], at),
      }
      k_BSKH, v_BSKH = cache["key"][layer], cache["value"][layer]
    out_BLNH = dot_product_attention(q_BLNH, k_BSKH, v_BSKH, context.mask)
    out = Linear(D, c.attention_bias, c.dtype, name="output")
    return out(out_BLNH.reshape(B, L, -1)), cache


class MLP(nn.Module):
  """Gated MLP: down(act(gate(x)) * up(x))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: Array) -> Array:
    c = self.config
    gate = Linear(c.mlp_width, c.mlp_bias, c.dtype, name="gate")(x_BLD)
    up = Linear(c.mlp_width, c.mlp_bias, c.dtype, name="up")(x_BLD)
    hidden_BLF = getattr(jax.nn, c.activation)(gate) * up
    return Linear(x_BLD.shape[-1], c.mlp_bias, c.dtype, name="down")(hidden_BLF)


class Block(nn.Module):
  """Pre-norm block: attention, then MLP, each added to the residual stream."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: Array, context: Context, cache=None, layer=None):
    c = self.config
    normed = RMSNorm(c.norm_eps, name="attention_norm")(x_BLD)
    with jax.named_scope("attention"):
      delta, cache = Attention(c, name="attention")(
        normed, context, cache, layer
      )
    x_BLD = x_BLD + delta
    normed = RMSNorm(c.norm_eps, name="mlp_norm")(x_BLD)
    with jax.named_scope("mlp"):
      return x_BLD + MLP(c, name="mlp")(normed), cache
