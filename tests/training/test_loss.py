"""The cross-entropy, against NumPy, and in chunks against itself."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util

from calm_jax.core import flops
from calm_jax.training import loss as loss_lib

B, L, D, V = 3, 7, 6, 11


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


def test_a_single_pass_finds_the_sum_of_exponentials():
  random = np.random.default_rng(0)
  logits = random.standard_normal((2, 3, 131)).astype(np.float32)
  logits[0] *= 1000
  logits[1, 0, 60:] = np.finfo(np.float32).min
  logits[1, 1, ::2] = -np.inf
  logits[1, 2] = -1e4
  exact = logits.astype(np.float64)
  most = exact.max(-1, keepdims=True)
  want = most + np.log(np.exp(exact - most).sum(-1, keepdims=True))
  got = jax.jit(loss_lib.single_pass_logsumexp)(logits)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  logits[0, 0, 0] = np.nan
  assert np.isnan(loss_lib.single_pass_logsumexp(logits)[0, 0])


# In chunks.

WEIGHTS = ["fractional", "ones", "none", "a_row_of_none"]
SIZES = [0, 5, 1]  # Chunks of all 21 positions; of 5, in the last one 1; of 1.


def head(params, x):
  logits = (x * params["scale"]) @ params["kernel"]
  return 4 * jnp.tanh(logits / 4)


def problem(dtype="float32", kind="fractional"):
  """(params, x, targets, weights)."""
  random = np.random.default_rng(0)
  params = {
    "scale": 1 + 0.1 * random.standard_normal(D),
    "kernel": random.standard_normal((D, V)),
  }
  fractional = random.random((B, L)) * (random.random((B, L)) < 0.5)
  weights = {
    "fractional": fractional,
    "ones": np.ones((B, L)),
    "none": np.zeros((B, L)),
    "a_row_of_none": fractional * [[1], [0], [1]],
  }[kind]
  params, x, weights = jax.tree.map(
    lambda a: jnp.asarray(a, dtype),
    (params, random.standard_normal((B, L, D)), weights),
  )
  return params, x, random.integers(0, V, (B, L)), weights


def reference(params, x, targets, weights):
  """By hand, in float64: the losses of rows, and gradients of their sum."""
  params, x, weights = jax.tree.map(
    lambda a: np.asarray(a, np.float64), (params, x, weights)
  )
  kernel, scale = params["kernel"], params["scale"]
  curve_BLV = np.tanh((x * scale) @ kernel / 4)
  shares_BLV = np.exp(4 * curve_BLV)
  shares_BLV /= shares_BLV.sum(-1, keepdims=True)
  hit_BLV = np.eye(V)[targets]
  rows_B = -((np.log(shares_BLV) * hit_BLV).sum(-1) * weights).sum(1)
  grad_BLV = (shares_BLV - hit_BLV) * weights[..., None] * (1 - curve_BLV**2)
  scaled_BLD = grad_BLV @ kernel.T
  grads = {
    "kernel": np.einsum("bld,blv->dv", x * scale, grad_BLV),
    "scale": (scaled_BLD * x).sum((0, 1)),
  }
  return rows_B, grads, scaled_BLD * scale


TOLERANCES = {
  "float32": {"rtol": 1e-5, "atol": 1e-6},
  "float64": {"rtol": 1e-12, "atol": 1e-14},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shares", [(1, 1), (3, 7)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_chunks_add_up_to_the_whole(dtype, shares, size):
  how = {"size": size, "shares": shares}

  @jax.jit
  def computed(*arguments):
    def share(*arguments):  # of the sum, as a step takes it
      return loss_lib.chunked_sum(head, *arguments, **how) / 3

    rows, weights = loss_lib.chunked_rows(head, *arguments, **how)
    third, grads = jax.value_and_grad(share, (0, 1))(*arguments)
    return rows, weights, *jax.tree.map(lambda g: 3 * g, (third, *grads))

  def check(got, want):
    np.testing.assert_allclose(got, want, **TOLERANCES[dtype])

  with jax.enable_x64(dtype == "float64"):
    for kind in WEIGHTS:
      arguments = problem(dtype, kind)
      rows, *grads = reference(*arguments)
      want = rows, arguments[-1].sum(1), rows.sum(), *grads
      jax.tree.map(check, computed(*arguments), want)


@pytest.mark.parametrize("shares", [(1, 1), (3, 1)])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_chunk_without_weights_is_skipped(kind, shares):
  params, x, targets, weights = problem(kind=kind)
  length, runs = 2, []
  rows = np.asarray(weights) > 0
  # Devices compute as many chunks as the one that has the most weights.
  most = rows.reshape(shares[0], -1).sum(1).max()
  want = math.ceil(most / length)
  assert want < B * L / shares[0] / length or kind == "ones"

  def counted(params, x):
    jax.debug.callback(lambda: runs.append(x.shape))
    return head(params, x)

  def total(x, weights):
    rest = targets, weights, length, shares
    return loss_lib.chunked_sum(counted, params, x, *rest)

  for function in (jax.jit(total), jax.jit(jax.grad(total))):
    runs.clear()
    jax.block_until_ready(function(x, weights))
    jax.effects_barrier()
    assert runs == want * [(*shares, length, D)]


def test_gradients_of_chunks_are_finite_differences():
  with jax.enable_x64(True):
    params, x, *rest = problem("float64")
    test_util.check_grads(
      lambda p, x: loss_lib.chunked_sum(head, p, x, *rest, 4),
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
  chunks = grad(params, x, targets, weights, B)
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
    return loss_lib.chunked_sum(head, weights, x, *rest, B)

  argnums = {"x": (1,), "kernel": (0,), "both": (0, 1)}[trained]
  counted = flops.count(jax.grad(loss, argnums), params["kernel"], x)
  assert counted == (1 + len(argnums)) * 2 * B * L * D * V
