"""Mixtures of experts against loops over tokens and experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.models import moe
from calm_jax.models.config import Compute, ModelConfig
from calm_jax.models.moe import MoE

D, F = 5, 7


def config(X: int, k: int, dtype: str, **options) -> ModelConfig:
  sizes = {"vocab_size": 1, "width": D, "num_layers": 1, "mlp_width": F}
  heads = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 2}
  experts = {"num_experts": X, "experts_per_token": k}
  compute = Compute(dtype=dtype)
  return ModelConfig(**sizes, **heads, **experts, compute=compute, **options)


def make(X: int, k: int, seed: int = 0, dtype="float64", **options):
  """A module, its parameters, and 33 tokens."""
  random = np.random.default_rng(seed)

  def kernel(*shape):
    return {"kernel": jnp.asarray(random.standard_normal(shape), dtype)}

  params = {
    "router": kernel(D, X),
    "experts": {
      "gate": kernel(X, D, F), "up": kernel(X, D, F), "down": kernel(X, F, D)
    },
  }  # fmt: skip
  x_BLD = jnp.asarray(random.standard_normal((3, 11, D)), dtype)
  return MoE(config(X, k, dtype, **options)), params, x_BLD


@functools.partial(jax.jit, static_argnums=0)
def forward(module, params, x):
  return module.apply({"params": params}, x)


def spelled(module, params, x_BLD):
  """One token after the other; of equals, the first expert is the better."""
  p = jax.tree.map(np.asarray, params)
  y = np.zeros(x_BLD.shape)
  for at in np.ndindex(x_BLD.shape[:-1]):
    x = np.asarray(x_BLD[at])
    logits = x @ p["router"]["kernel"]
    share = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-logits, kind="stable")[: module.config.experts_per_token]
    for e in best:
      gate, up, down = (
        p["experts"][n]["kernel"][e] for n in ("gate", "up", "down")
      )
      hidden = x @ gate
      if module.config.activation == "silu":
        hidden = hidden / (1 + np.exp(-hidden))
      else:
        hidden = np.maximum(hidden, 0)
      weight = share[e] / (
        share[best].sum() if module.config.normalise_experts else 1
      )
      y[at] += weight * ((hidden * (x @ up)) @ down)
  return y


@pytest.mark.parametrize(("X", "k", "options"), [
  (6, 2, {}),
  (6, 2, {"normalise_experts": False}),
  (6, 2, {"activation": "relu"}),
  (1, 1, {}),
  (5, 5, {"normalise_experts": False}),
  (64, 3, {}),  # more experts than tokens
])  # fmt: skip
def test_against_loops(X, k, options, x64):
  module, params, x = make(X, k, **options)
  expected = spelled(module, params, x)
  np.testing.assert_allclose(
    forward(module, params, x), expected, rtol=0, atol=1e-12
  )
  got = forward(module, params, x[:1, :1])  # a step of decoding
  np.testing.assert_allclose(got, expected[:1, :1], rtol=0, atol=1e-12)


def test_names_and_shapes():
  module, params, x = make(6, 2, dtype="float32")
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)


def test_stacked_layers(x64):
  module, params, x = make(6, 2)
  _, others, _ = make(6, 2, seed=1)
  layers = [others, params, others]
  stack = jax.tree.map(lambda *p: jnp.stack(p), *[p["experts"] for p in layers])

  @jax.jit
  def at(layer):
    weights = {"router": params["router"], "experts": stack}
    return module.apply({"params": weights}, x, layer)

  expected = forward(module, params, x)
  np.testing.assert_allclose(at(1), expected, rtol=0, atol=1e-12)


def test_ties(x64):
  module, params, x = make(6, 2)
  params["router"]["kernel"] = jnp.zeros((D, 6)).at[:, 4].set(1)
  x = jnp.abs(x)  # expert 4 is first, all others tie
  np.testing.assert_allclose(
    forward(module, params, x), spelled(module, params, x), rtol=0, atol=1e-12
  )


@pytest.mark.parametrize("chosen", [0, 3, 5])
def test_one_expert_gets_all(chosen, x64):
  # The others may hold anything.
  module, params, x = make(6, 1)
  params["router"]["kernel"] = jnp.zeros((D, 6)).at[:, chosen].set(1)
  x = jnp.abs(x)
  expected = spelled(module, params, x)
  others = jnp.arange(6)[:, None, None] != chosen
  params["experts"] = jax.tree.map(
    lambda p: jnp.where(others, jnp.nan, p), params["experts"]
  )
  np.testing.assert_allclose(
    forward(module, params, x), expected, rtol=0, atol=1e-12
  )


def test_tokens_change_no_others():
  module, params, x = make(6, 2, dtype="float32")
  alone = forward(module, params, x[:1])
  for stuffing in (0.0, 1e30, jnp.nan):
    beside = x.at[1:].set(stuffing)
    got = forward(module, params, beside)[:1]
    np.testing.assert_allclose(got, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_gradients(normalise, x64):
  module, params, x = make(6, 2, normalise_experts=normalise)
  direction = jnp.asarray(np.random.default_rng(9).standard_normal(x.shape))

  def loss(x, params):
    return jnp.sum(direction * forward(module, params, x))

  def dense(x, params):
    """The same with every expert on every token."""
    e = params["experts"]
    logits = x @ params["router"]["kernel"]
    kth = jnp.sort(logits, axis=-1)[..., -module.config.experts_per_token, None]
    share = jnp.exp(logits)
    chosen = jnp.where(logits >= kth, share, 0)
    among = chosen if normalise else share
    gate, up = (
      jnp.einsum("bld,xdf->blxf", x, e[n]["kernel"]) for n in ("gate", "up")
    )
    hidden = jax.nn.silu(gate) * up
    y = jnp.einsum("blxf,xfd->blxd", hidden, e["down"]["kernel"])
    weights = chosen / among.sum(axis=-1, keepdims=True)
    return jnp.sum(direction * jnp.einsum("blx,blxd->bld", weights, y))

  got = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, params)
  expected = jax.jit(jax.grad(dense, argnums=(0, 1)))(x, params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11),
    got, expected,
  )  # fmt: skip
  step = 1e-5 * jnp.asarray(np.random.default_rng(8).standard_normal(x.shape))
  finite = loss(x + step, params) - loss(x - step, params)
  np.testing.assert_allclose(finite, 2 * jnp.sum(got[0] * step), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4, 16])
@pytest.mark.parametrize("skew", [0.0, 1.0, 5.0])
def test_blocks(size, skew):
  # Every row has one slot, in a block of its own expert; few slots are empty.
  X, T, k = 8, 29, 3
  scores = np.random.default_rng(0).standard_normal((T, X))
  expert_Tk = np.argsort(scores - skew * np.arange(X))[:, :k]
  expert_N, token_NS, slot_Tk = map(
    np.asarray, moe.blocks(jnp.asarray(expert_Tk), X, size)
  )
  assert len(expert_N) == len(token_NS) <= T * k / size + X
  assert len(np.unique(slot_Tk)) == T * k
  np.testing.assert_array_equal(expert_N[slot_Tk // size], expert_Tk)
  np.testing.assert_array_equal(
    token_NS.reshape(-1)[slot_Tk], np.arange(T)[:, None] + 0 * slot_Tk
  )
  assert (token_NS == T).sum() == token_NS.size - T * k


def test_work_is_that_of_the_best():
  for T, k, X in ((1, 2, 8), (8, 2, 8), (100, 2, 8), (999, 8, 128)):
    size = moe.block_size(T * k, X)
    expert_N = jax.eval_shape(
      lambda e, X=X, size=size: moe.blocks(e, X, size)[0],
      jax.ShapeDtypeStruct((T, k), jnp.int32),
    )
    assert expert_N.shape[0] * size <= 1.5 * T * k


def test_low_precision():
  module, params, x = make(6, 2, dtype="float32")
  low = MoE(config(6, 2, "bfloat16"))
  got = forward(low, params, x.astype(jnp.bfloat16))
  assert got.dtype == jnp.bfloat16
  # Rounding may send a token of two equal experts elsewhere; most stay.
  error = jnp.abs(got - forward(module, params, x)).max(axis=-1)
  scale = jnp.abs(forward(module, params, x)).max()
  assert jnp.mean(error < 0.02 * scale) > 0.9
