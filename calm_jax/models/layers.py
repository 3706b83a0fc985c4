"""The layers of a block, as flax.linen modules without state.

B batch, L length, D width.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from calm_jax.models.config import ModelConfig
from calm_jax.models.quantisation import matmul

Array = jax.Array


class Linear(nn.Module):
  """y = x W + b, computed in `dtype` from parameters of any dtype.

  Adds (x A) B if the parameters hold A and B (`models.lora`). W may be
  quantised (`models.quantisation`).
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
  """Returns the dtype of norms, angles, softmax and logits."""
  return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 or more; the result is of x's dtype.

  With `plus_one` the scale is one plus the parameter.
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
  """Makes the norm of a model."""
  if config.norm == "layer":
    return LayerNorm(config.norm_eps, name=name)
  return RMSNorm(config.norm_eps, config.norm == "rms_plus_one", name=name)
