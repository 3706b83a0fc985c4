"""Controls: what the anchor is given instead of m_A's states."""

from __future__ import annotations

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import composed

from calm_jax.composition import forward
from calm_jax.composition.connections import (
  CONTROLS,
  Augmenting,
  Composition,
  Connection,
)
from calm_jax.composition.controls import controlled
from calm_jax.core import trees
from calm_jax.core.batch import Batch, plain_sequence
from calm_jax.core.errors import InputError

L = 8
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 61, (3, L)).astype(np.int32)
# Of unlike lengths, on the left as in generation.
RAGGED = helpers.rows(
  [TOKENS[0]], [3, TOKENS[1, :5]], [1, TOKENS[2, :7]], length=L
)
DESTROYED = CONTROLS[1:]


@functools.cache
def made(control: str):
  return helpers.compose(connections=((2, 3),), control=control)


def joined(control: str, seed: int = 0) -> Augmenting:
  config, _ = helpers.model(0)
  return Augmenting(
    config, (Connection(1, 1),), control=control, control_seed=seed
  )


def states(positions, seed: int = 1):
  shape = (*np.shape(positions), 24)
  h_BME = np.random.default_rng(seed).standard_normal(shape) * 3
  return jnp.asarray(h_BME, jnp.float32)


def test_unknown():
  with pytest.raises(InputError, match="control='zeros' is none of"):
    joined("zeros")


def test_none_changes_nothing():
  h_BME = states(RAGGED.positions)
  assert controlled(joined("none"), h_BME, RAGGED.positions, 1) is h_BME


def test_zeroed_is_a_composition_of_keys_and_values_of_zero():
  spec, params = made("zeroed")
  plain, _ = made("none")
  leaves = {
    name: jnp.zeros_like(leaf) if "/projection/" in name else leaf
    for name, leaf in trees.flatten(params).items()
  }
  want = composed(trees.unflatten(leaves), plain, RAGGED)
  got = composed(params, spec, RAGGED)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
  # Which is nothing but the anchor, whatever Θ_C is.
  anchor = composed(params, Composition(spec.anchor), RAGGED)
  np.testing.assert_allclose(got, anchor, rtol=0, atol=1e-6)
  assert np.abs(composed(params, plain, RAGGED) - anchor).max() > 0.1


def test_noise_has_the_norm_of_the_state_and_nothing_else_of_it():
  positions = jnp.asarray(RAGGED.positions)
  noisy = [
    np.asarray(controlled(joined("noise"), h, positions, 2))
    for h in (states(positions, 1), states(positions, 2))
  ]
  for seed, noise in zip((1, 2), noisy, strict=True):
    norms = np.linalg.norm(np.asarray(states(positions, seed)), axis=-1)
    np.testing.assert_allclose(np.linalg.norm(noise, axis=-1), norms, rtol=1e-5)
    cosines = (noise * np.asarray(states(positions, seed))).sum(-1)
    cosines /= norms**2
    assert np.abs(cosines).max() < 0.9 and abs(cosines.mean()) < 0.2
  # Its direction follows from the position alone.
  units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in noisy]
  np.testing.assert_allclose(*units, rtol=0, atol=1e-6)
  at = {
    p: units[0][np.asarray(positions) == p] for p in range(1, positions.max())
  }
  for rows in at.values():
    np.testing.assert_allclose(rows, rows[:1].repeat(len(rows), 0), atol=1e-6)
  assert np.abs(at[1][0] - at[2][0]).max() > 0.1


def test_noise_differs_by_seed_and_layer_and_is_repeated():
  positions = jnp.arange(5)[None]
  h_BME = states(positions)
  first = controlled(joined("noise"), h_BME, positions, 2)
  again = controlled(joined("noise"), h_BME, positions, 2)
  np.testing.assert_array_equal(first, again)
  for other in (
    controlled(joined("noise", seed=1), h_BME, positions, 2),
    controlled(joined("noise"), h_BME, positions, 3),
  ):
    assert np.abs(first - other).max() > 0.1


def test_noise_for_half_precision():
  h_BME = states(np.zeros((1, 4))).astype(jnp.bfloat16)
  noise = controlled(joined("noise"), h_BME, jnp.arange(4)[None], 1)
  assert noise.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    *(np.linalg.norm(np.float32(x), axis=-1) for x in (noise, h_BME)), rtol=1e-2
  )


def test_shuffled_gives_each_row_what_the_row_before_it_reads():
  spec, params = made("shuffled")
  plain, _ = made("none")
  rolled = plain_sequence(np.roll(TOKENS, 1, axis=0))
  want = composed(
    params, plain, plain_sequence(TOKENS), augmenting={"kv": rolled}
  )
  got = composed(params, spec, plain_sequence(TOKENS))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  own = composed(params, plain, plain_sequence(TOKENS))
  assert np.abs(got - own).max(axis=(1, 2)).min() > 0.01


def test_one_row_cannot_be_shuffled():
  spec, params = made("shuffled")
  with pytest.raises(InputError, match="two rows"):
    composed(params, spec, plain_sequence(TOKENS[:1]))


@pytest.mark.parametrize("control", DESTROYED)
def test_the_future_is_not_seen(control):
  spec, params = made(control)
  later = TOKENS.copy()
  later[:, 5:] = (later[:, 5:] + 7) % 61
  logits = [composed(params, spec, plain_sequence(t)) for t in (TOKENS, later)]
  np.testing.assert_array_equal(logits[0][:, :5], logits[1][:, :5])
  assert np.abs(logits[0] - logits[1])[:, 5:].max() > 0.1


@functools.partial(jax.jit, static_argnames="spec")
def _step(params, spec, sequence, cache, index):
  batch = Batch(sequence, {}, {})
  return forward.forward(params, spec, batch, cache=cache, index=index)


@pytest.mark.parametrize("control", DESTROYED)
def test_cached_equals_uncached(control):
  spec, params = made(control)
  whole = composed(params, spec, RAGGED)
  cache, logits = forward.empty_cache(spec, 3, L), []
  for index in range(0, L, 2):
    part = jax.tree.map(lambda x, i=index: x[:, i : i + 2], RAGGED)
    got, cache = _step(params, spec, part, cache, jnp.int32(index))
    logits.append(got)
  real = RAGGED.segments > 0
  got = np.concatenate(logits, axis=1)
  np.testing.assert_allclose(got[real], whole[real], rtol=0, atol=1e-4)
