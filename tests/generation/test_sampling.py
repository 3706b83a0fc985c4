"""The picking of tokens, against a spelled-out reference and frequencies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.core.errors import InputError
from calm_jax.generation.sampling import GREEDY, Sampler

LOGITS = np.random.default_rng(0).normal(0, 2, (7, 23)).astype(np.float32)


def kept(sampler: Sampler) -> np.ndarray:
  return np.isfinite(np.asarray(sampler.filter(jnp.asarray(LOGITS))))


def probabilities() -> np.ndarray:
  shares = np.exp(LOGITS.astype(np.float64))
  return shares / shares.sum(-1, keepdims=True)


def ranks() -> np.ndarray:
  return np.argsort(np.argsort(-LOGITS, axis=-1), axis=-1)


@pytest.mark.parametrize("k", [1, 5, 23, 40])
def test_top_k(k):
  np.testing.assert_array_equal(kept(Sampler(1.0, top_k=k)), ranks() < k)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p(p):
  got = kept(Sampler(1.0, top_p=p))
  for row, share in zip(got, probabilities(), strict=True):
    order = np.argsort(-share)
    fewest = 1 + int(np.argmax(np.cumsum(share[order]) >= p))
    assert set(np.flatnonzero(row)) == set(order[:fewest])


@pytest.mark.parametrize("p", [0.02, 0.3])
def test_min_p(p):
  share = probabilities()
  want = share >= p * share.max(-1, keepdims=True)
  np.testing.assert_array_equal(kept(Sampler(1.0, min_p=p)), want)


def test_filters_act_one_after_the_other():
  # The top 3 make up all of the mass that top_p then cuts.
  got = kept(Sampler(1.0, top_k=3, top_p=0.6))
  for row, share in zip(got, probabilities(), strict=True):
    order = np.argsort(-share)[:3]
    mass = np.cumsum(share[order]) / share[order].sum()
    fewest = 1 + int(np.argmax(mass >= 0.6))
    assert set(np.flatnonzero(row)) == set(order[:fewest])


def test_nothing_is_filtered_by_default():
  assert kept(Sampler(1.0)).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(temperature):
  logits = jnp.array([1.0, 0.0, -1.0, 2.0])
  many = jnp.broadcast_to(logits, (20_000, 4))
  keys = jax.random.split(jax.random.key(0), len(many))
  drawn = Sampler(temperature)(keys, many, None)
  np.testing.assert_allclose(
    np.bincount(drawn, minlength=4) / len(drawn),
    jax.nn.softmax(logits / temperature),
    atol=0.015,
  )


def test_greedy_takes_the_likeliest():
  logits = jnp.array([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
  np.testing.assert_array_equal(GREEDY(None, logits, None), [1, 0])


def test_the_repetition_penalty_acts_on_both_signs():
  logits = jnp.array([[3.0, 2.0, 1.0], [-1.0, -1.5, -3.0]])
  seen = jnp.array([[True, False, False], [True, False, False]])
  sampler = Sampler(repetition_penalty=2.0)
  np.testing.assert_array_equal(sampler(None, logits, seen), [1, 1])
  weak = Sampler(repetition_penalty=1.1)
  np.testing.assert_array_equal(weak(None, logits, seen), [0, 0])


@pytest.mark.parametrize(
  "wrong",
  [
    {"temperature": -1}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0},
    {"top_p": 1.1}, {"min_p": 1}, {"repetition_penalty": 0},
  ],
)  # fmt: skip
def test_values_outside_their_range(wrong):
  with pytest.raises(InputError, match=next(iter(wrong))):
    Sampler(**wrong)
