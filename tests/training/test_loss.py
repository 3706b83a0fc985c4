"""The cross-entropy, against NumPy, and in chunks against itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util

from calm_jax.core import flops
from calm_jax.training import loss as loss_lib

B, L, D, V = 2, 7, 6, 11


def test_cross_entropy():
  random = np.random.default_rng(0)
  logits = 30 * random.standard_normal((2, 4, 5)).astype(np.float32)
  targets = random.integers(0, 5, (2, 4))
  weights = np.array([[0, 1, 1, 0], [0, 0, 0, 0]], np.float32)
  loss, weight = loss_lib.cross_entropy(logits, targets, weights)
  exact = logits.astype(np.float64)
  want = 0.0
  for t in (1, 2):
    shares = np.exp(exact[0, t] - exact[0, t].max())
    want -= np.log(shares[targets[0, t]] / shares.sum())
  np.testing.assert_allclose(loss, [want, 0], rtol=1e-5)
  np.testing.assert_array_equal(weight, [2, 0])


def test_huge_logits_stay_finite():
  logits = np.array([[[1e4, -1e4, 0]]], np.float32)
  loss, _ = loss_lib.cross_entropy(logits, np.array([[1]]), np.ones((1, 1)))
  np.testing.assert_allclose(loss, [2e4])


# In chunks.


def head(params, x):
  logits = (x * params["scale"]) @ params["kernel"]
  return 4 * jnp.tanh(logits / 4)


def problem(dtype="float32"):
  """(params, x, targets, weights): rows of unlike weights, one of none."""
  random = np.random.default_rng(0)
  params = {
    "scale": 1 + 0.1 * random.standard_normal(D),
    "kernel": random.standard_normal((D, V)),
  }
  weights = random.random((B, L)) * (random.random((B, L)) < 0.7)
  params, x, weights = jax.tree.map(
    lambda a: jnp.asarray(a, dtype),
    (params, random.standard_normal((B, L, D)), weights),
  )
  return params, x, random.integers(0, V, (B, L)), weights


def plain(params, x, targets, weights):
  return loss_lib.cross_entropy(head(params, x), targets, weights)


# Chunks of 7, 4 (one padded), 2 (one padded), 1 and 1 positions.
LIMITS = [0, 4 * B * V, 2 * B * V, B * V, 1]


@pytest.mark.parametrize("limit", LIMITS)
def test_chunks_add_up_to_the_whole(limit):
  arguments = problem()
  rows, weights = loss_lib.chunked_rows(head, *arguments, limit)
  want_rows, want_weights = plain(*arguments)
  np.testing.assert_allclose(rows, want_rows, rtol=1e-5)
  np.testing.assert_array_equal(weights, want_weights)
  total = functools.partial(loss_lib.chunked_sum, head, limit=limit)
  # As a step does: of a share of the sum.
  got = jax.grad(lambda *a: total(*a) / 3, argnums=(0, 1))(*arguments)
  want = jax.grad(lambda *a: plain(*a)[0].sum() / 3, argnums=(0, 1))(*arguments)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6),
    got,
    want,
  )
  np.testing.assert_allclose(total(*arguments), want_rows.sum(), rtol=1e-5)


def test_gradients_of_chunks_are_finite_differences():
  with jax.enable_x64(True):
    params, x, *rest = problem("float64")
    test_util.check_grads(
      lambda p, x: loss_lib.chunked_sum(head, p, x, *rest, 2 * B * V),
      (params, x),
      order=1,
      modes=["rev"],
      atol=1e-7,
      rtol=1e-7,
      eps=1e-5,
    )


def test_bfloat16_is_summed_in_float32():
  def narrow(params, x):
    return (x @ params["kernel"].astype(x.dtype)).astype(jnp.float32)

  params, x, targets, weights = problem()
  x = x.astype(jnp.bfloat16)
  loss = functools.partial(loss_lib.chunked_sum, narrow)
  grad = jax.grad(loss, argnums=(0, 1))
  whole = grad(params, x, targets, weights, 0)
  chunks = grad(params, x, targets, weights, B * V)
  assert chunks[1].dtype == jnp.bfloat16
  assert chunks[0]["kernel"].dtype == jnp.float32
  np.testing.assert_array_equal(
    chunks[1].astype("float32"), whole[1].astype("float32")
  )
  np.testing.assert_allclose(
    chunks[0]["kernel"], whole[0]["kernel"], rtol=0.02, atol=0.01
  )


@pytest.mark.parametrize("trained", ["x", "kernel", "both"])
def test_no_matmul_too_many(trained):
  params, x, *rest = problem()

  def loss(kernel, x):
    weights = params | {"kernel": kernel}
    return loss_lib.chunked_sum(head, weights, x, *rest, B * V)

  argnums = {"x": (1,), "kernel": (0,), "both": (0, 1)}[trained]
  counted = flops.count(jax.grad(loss, argnums), params["kernel"], x)
  assert counted == (1 + len(argnums)) * 2 * B * L * D * V
