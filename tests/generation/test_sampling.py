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


TIES = np.array(
  [
    np.zeros(10),
    [1, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    [9, 9, 0, 0, 0, 0, 0, 0, 0, 0],
  ],
  np.float32,
)


@pytest.mark.parametrize(
  ("filters", "counts"),
  [
    ({"top_p": 0.3}, [3, 2, 1]), ({"top_p": 0.5}, [5, 4, 2]),
    ({"top_p": 0.9}, [9, 9, 2]), ({"top_k": 1}, [1, 1, 1]),
    ({"top_k": 4}, [4, 4, 4]), ({"top_p": 1e-46}, [1, 1, 1]),
    ({"top_k": 4, "top_p": 0.5}, [2, 2, 2]),
    ({"min_p": 0.5}, [10, 2, 2]),
  ],
)  # fmt: skip
def test_the_fewest_are_kept_among_ties(filters, counts):
  sampler = Sampler(1.0, **filters)
  got = np.isfinite(np.asarray(sampler.filter(jnp.asarray(TIES))))
  for row, logits, count in zip(got, TIES, counts, strict=True):
    first = np.argsort(-logits, kind="stable")[:count]
    assert set(np.flatnonzero(row)) == set(first)


def test_many_ties_against_float64():
  random = np.random.default_rng(1)
  logits = random.integers(-3, 4, (200, 37)).astype(np.float32)
  for p in (0.05, 0.35, 0.6, 0.97):
    got = np.isfinite(np.asarray(Sampler(1.0, top_p=p).filter(logits)))
    share = np.exp(logits.astype(np.float64))
    share = -np.sort(-share / share.sum(-1, keepdims=True), axis=-1)
    fewest = 1 + np.argmax(np.cumsum(share, axis=-1) >= p, axis=-1)
    np.testing.assert_array_equal(got.sum(-1), fewest)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e20])
def test_extreme_temperatures_draw_a_token(temperature):
  logits = jnp.asarray(LOGITS)
  keys = jax.random.split(jax.random.key(0), len(logits))
  drawn = Sampler(temperature, top_p=0.9)(keys, logits, None)
  assert (drawn >= 0).all()
  assert (drawn < logits.shape[1]).all()
  if temperature < 1:
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


def test_numbers_of_numpy_are_numbers():
  given = Sampler(np.float32(0.5), np.int64(3), jnp.float32(0.75), np.array(0))
  assert given == Sampler(0.5, 3, 0.75, 0.0)
  assert hash(given) == hash(Sampler(0.5, 3, 0.75))


@pytest.mark.parametrize(
  "wrong",
  [
    {"temperature": -1}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0},
    {"top_p": 1.1}, {"min_p": 1}, {"repetition_penalty": 0},
    {"temperature": float("nan")}, {"temperature": float("inf")},
    {"temperature": "1"}, {"temperature": None}, {"temperature": True},
    {"top_k": "5"}, {"top_k": True}, {"top_p": float("nan")},
    {"min_p": -0.1}, {"repetition_penalty": [1.1]},
  ],
)  # fmt: skip
def test_values_outside_their_range(wrong):
  with pytest.raises(InputError, match=next(iter(wrong))):
    Sampler(**wrong)
