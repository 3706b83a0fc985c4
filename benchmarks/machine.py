"""Measures matmuls and copies, whose speed is the limit of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

Clock = Callable[[], float]


def matmul_size() -> int:
  """Of the square matrices that are multiplied, unless one is asked for."""
  return 4096 if jax.default_backend() == "cpu" else 8192


def _times() -> int:
  """Calls in a row: waiting for one is a part of an accelerator's time."""
  return 3 if jax.default_backend() == "cpu" else 20


def make_matmul(
  size: int, dtype: str, clock: Clock = time.perf_counter
) -> Callable[[], float]:
  """Measures FLOPs a second of a product of random squares."""
  keys = jax.random.split(jax.random.key(0))
  # Products stay as large as their factors, and so random.
  a, b = (jax.random.normal(k, (size, size)) for k in keys)
  a, b = (a / size**0.5).astype(dtype), b.astype(dtype)
  product = jax.jit(jnp.matmul).lower(a, b).compile()
  seconds = _repeated(lambda y: product(a, y), b, clock)
  return lambda: 2 * size**3 / seconds()


def make_copy(
  megabytes: int, clock: Clock = time.perf_counter
) -> Callable[[], float]:
  """Measures bytes a second of a copy, those read and those written."""
  x = jax.random.bits(jax.random.key(0), (megabytes, 2**20), jnp.uint8)
  # Over what was copied before: a CPU's fresh memory costs more than the copy.
  copy = jax.jit(lambda x, _: jnp.copy(x), donate_argnums=1, keep_unused=True)
  into = [jnp.zeros_like(x)]
  copy = copy.lower(x, into[0]).compile()

  def step(_):
    into[0] = copy(x, into[0])
    return into[0]

  seconds = _repeated(step, x, clock)
  return lambda: 2 * x.nbytes / seconds()


def _repeated(step, x, clock: Clock) -> Callable[[], float]:
  """Measures a call of what makes the like of x, one after another."""
  step(x).block_until_ready()
  times = _times()

  def seconds() -> float:
    y, began = x, clock()
    for _ in range(times):
      y = step(y)
    y.block_until_ready()
    return (clock() - began) / times

  return seconds
