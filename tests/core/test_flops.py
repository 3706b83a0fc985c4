"""Matrix products counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from calm_jax.core import flops


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products():
  assert flops.count(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
  batched = flops.count(jnp.matmul, shape(11, 3, 5), shape(11, 5, 7))
  assert batched == 11 * 2 * 3 * 5 * 7
  outer = flops.count(
    lambda a, b: jnp.einsum("abc,dbc->ad", a, b), shape(2, 3, 5), shape(7, 3, 5)
  )
  assert outer == 2 * (2 * 7) * (3 * 5)
  assert flops.count(lambda a: jnp.exp(a + a).sum(), shape(3, 5)) == 0


def test_a_gradient_is_two_products_more():
  def loss(w, x):
    return jnp.sin(x @ w).sum()

  once = 2 * 3 * 5 * 7
  # Of w alone, and of both.
  assert flops.count(jax.grad(loss), shape(5, 7), shape(3, 5)) == 2 * once
  both = jax.grad(loss, argnums=(0, 1))
  assert flops.count(both, shape(5, 7), shape(3, 5)) == 3 * once
  # Two products forward, again before the way back, and three gradients.
  twice = jax.grad(jax.checkpoint(lambda w, x: loss(w, jnp.sin(x @ w))))
  assert flops.count(twice, shape(5, 5), shape(3, 5)) == 7 * 2 * 3 * 5 * 5


def repeated(x, w, times):
  return jax.lax.scan(lambda x, _: (x @ w, None), x, None, times)[0]


@pytest.mark.parametrize("times", [1, 4, 9])
def test_a_loop_counts_as_often_as_it_runs(times):
  once = 2 * 3 * 5 * 5

  def loop(x, w):
    return repeated(x, w, times)

  def nested(x, w):
    return jax.lax.fori_loop(0, 2, lambda _, x: loop(x, w), x)

  arguments = shape(3, 5), shape(5, 5)
  assert flops.count(loop, *arguments) == times * once
  assert flops.count(nested, *arguments) == 2 * times * once
  # Which is why XLA's count would not do.
  theirs = jax.jit(loop).lower(*arguments).cost_analysis()["flops"]
  assert theirs < 2 * once


def test_branches_and_open_ends():
  def branch(yes, x):
    return jax.lax.cond(yes, lambda x: x @ x @ x, lambda x: x @ x, x)

  yes = jax.ShapeDtypeStruct((), jnp.bool_)
  assert flops.count(branch, yes, shape(3, 3)) == 2 * 2 * 27

  def grow(x, step):
    return jax.lax.while_loop(lambda x: x.sum() < 9, step, x)

  assert flops.count(lambda x: grow(x, lambda x: x + 1), shape(3, 3)) == 0
  with pytest.raises(ValueError, match="how often is unknown"):
    flops.count(lambda x: grow(x, lambda x: x @ x), shape(3, 3))
  program = jax.make_jaxpr(lambda x: grow(x, lambda x: x @ x))(shape(3, 3))
  assert flops.count_jaxpr(program.jaxpr, trips=5) == 5 * 2 * 27
