"""The layers of a block, as flax.linen modules without state.

B batch, L length, D width.
"""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from calm_jax.models.config import ModelConfig
from calm_jax.models.quantisation import matmul

Array = jax.Array


class Linear(nn.Module):
  """y = x W + b [+ (x A) B], computed in `dtype` from parameters of any dtype.

  The parameters may hold A and B (`lora`), and a quantised W (`quantisation`);
  in place of the kernel W^T, "transposed", which a GPU multiplies faster with
  few rows.
  """

  features: int
  use_bias: bool = False
  dtype: str = "float32"
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (x.shape[-1], self.features)
    transposed = self.has_variable("params", "transposed")
    kernel = self.get_variable(
      "params", "transposed" if transposed else "kernel"
    )
    if not transposed and not isinstance(kernel, Mapping):
      kernel = self.param("kernel", self.kernel_init, shape)
    # XLA's CPU backend is several times slower on the backward pass of a
    # batched [B, L, D] matmul than on the same one as [B L, D].
    flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    y = matmul(flat, kernel, transposed)
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


class Norm(nn.Module):
  """x / rms(x) * scale, in float32 or more; the result is of x's dtype.

  Of config.NORMS: "rms_plus_one" scales by one plus the parameter; "layer"
  subtracts the mean first, and adds a bias.
  """

  eps: float
  kind: str = "rms"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(at_least_float32(x.dtype))
    if self.kind == "layer":
      x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(mean_square + self.eps)
    if self.kind == "rms_plus_one":
      scale = 1 + scale.astype(x32.dtype)
    y = y * scale
    if self.kind == "layer":
      y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    return y.astype(x.dtype)


def activation(name: str) -> Callable[[Array], Array]:
  """Returns the function of one of config.ACTIVATIONS."""
  if name == "gelu_exact":
    return functools.partial(jax.nn.gelu, approximate=False)
  if name == "relu2":
    return lambda x: jnp.square(jax.nn.relu(x))
  return getattr(jax.nn, name)


def norm(config: ModelConfig, name: str | None = None) -> Norm:
  """Makes the norm of a model."""
  return Norm(config.norm_eps, config.norm, name=name)
