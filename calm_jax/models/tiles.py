"""Tiles of powers of two, which Triton's kernels of a decoding step load.

A step reads every weight once, so its time is that of the memory, which waits
between small kernels: `linear_kernel` norms its input and activates its output,
`attention_kernel` rotates queries and keys and extends the cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Array = jax.Array
ROWS = 16  # at most, which are a tile of the tensor cores


class RmsNorm(NamedTuple):
  """An RMS norm over the last axis: y = x / rms(x) * scale [D]."""

  scale: Array
  eps: float
  plus_one: bool  # is added to the scale


def call(name, kernel, out, grid, arguments, stages=1, alias=()):
  """Calls a kernel; on a CPU, where there is no Triton, it is interpreted."""

  def call(*arguments, interpret=False):
    return pl.pallas_call(
      kernel,
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out),
      grid=grid,
      input_output_aliases=dict(alias),
      compiler_params=triton.CompilerParams(num_warps=4, num_stages=stages),
      interpret=interpret,
      name=name,
    )(*arguments)

  interpreted = functools.partial(call, interpret=True)
  return jax.lax.platform_dependent(*arguments, cpu=interpreted, default=call)


def power(n: int) -> int:
  """Returns the next power of two, which tiles are made of, from 16."""
  return max(16, 1 << (n - 1).bit_length())


def load(ref, *index, mask=None):
  """Loads a tile by arrays of indices; 0 where the mask is false."""
  other = None if mask is None else 0
  return triton.load(ref.at[index], mask=mask, other=other)


def below(at: Array, limit: int, size: int):
  """The mask of `size` indices below a limit; None if no tile goes beyond."""
  return None if limit % size == 0 else at < limit


def both(a, b):
  if a is None or b is None:
    return b if a is None else a
  return a & b


def dot(a_MK: Array, b_NK: Array) -> Array:
  """Returns a b^T in float32; of float32 without rounding."""
  exact = jax.lax.Precision.HIGHEST if a_MK.dtype == jnp.float32 else None
  return jax.lax.dot(
    a_MK, b_NK.T, precision=exact, preferred_element_type=jnp.float32
  )
