"""Intervals and significance, against closed forms and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from calm_jax.core.errors import InputError
from calm_jax.evals import chrf, statistics
from calm_jax.evals.statistics import compare, interval, mean_of

VALUES = np.random.default_rng(0).normal(3, 2, 500)


def column(values) -> np.ndarray:
  return np.array(values, float)[:, None]


def mean_interval(values, **options):
  return interval(column(values), mean_of(len(values)), **options)


def test_an_interval_of_a_mean_is_the_normal_one():
  error = VALUES.std() / math.sqrt(len(VALUES))
  low, high = mean_interval(VALUES, resamples=20_000)
  assert low == pytest.approx(VALUES.mean() - 1.960 * error, abs=0.05 * error)
  assert high == pytest.approx(VALUES.mean() + 1.960 * error, abs=0.05 * error)
  low, high = mean_interval(VALUES, resamples=20_000, level=0.6827)
  assert high - low == pytest.approx(2 * error, rel=0.03)


def test_an_interval_is_that_of_all_resamples():
  values = [0.0, 1.0, 5.0, 6.5, 20.0]
  means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
  want = np.quantile(means, [0.1, 0.9])
  got = mean_interval(values, resamples=40_000, level=0.8)
  np.testing.assert_allclose(got, want, atol=0.11)


def test_scipy_agrees():
  stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
  theirs = stats.bootstrap(
    (VALUES,), np.mean, n_resamples=20_000, method="percentile", rng=1
  ).confidence_interval
  ours = mean_interval(VALUES, resamples=20_000)
  np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_of_a_constant_there_is_no_doubt():
  assert mean_interval([100.0] * 7) == (100.0, 100.0)


def test_a_seed_decides():
  assert mean_interval(VALUES, seed=1) == mean_interval(VALUES, seed=1)
  assert mean_interval(VALUES, seed=1) != mean_interval(VALUES, seed=2)


def test_blocks_make_no_difference(monkeypatch):
  parts = column(VALUES), column(VALUES[::-1])
  whole = compare(*parts, mean_of(500))
  monkeypatch.setattr(statistics, "_AT_ONCE", 500 * 7)
  blocks = compare(*parts, mean_of(500))
  assert blocks == pytest.approx(whole)


@pytest.mark.parametrize("wins, losses", [(9, 2), (5, 4), (14, 1)])
def test_of_right_and_wrong_it_is_the_sign_test(wins, losses):
  # McNemar's exact test: only the examples count where the models differ.
  ours = [100] * wins + [0] * losses + [100] * 20 + [0] * 9
  theirs = [0] * wins + [100] * losses + [100] * 20 + [0] * 9
  count = wins + losses
  tail = sum(math.comb(count, k) for k in range(losses + 1)) / 2**count
  found = compare(
    column(ours), column(theirs), mean_of(len(ours)), resamples=20_000
  )
  assert found.delta == pytest.approx(100 * (wins - losses) / len(ours))
  assert found.p_value == pytest.approx(min(1, 2 * tail), abs=0.01)
  assert found.low <= found.delta <= found.high


def test_pairing_removes_what_both_find_hard():
  hard = VALUES * 100
  better = compare(column(hard + 1), column(hard), mean_of(500))
  assert better.delta == pytest.approx(1)
  assert (better.low, better.high) == pytest.approx((1, 1))
  assert better.p_value < 0.001


def test_a_model_does_not_differ_from_itself():
  same = compare(column(VALUES), column(VALUES), mean_of(500))
  assert same == statistics.Difference(0, 0, 0, 1)


def test_a_corpus_metric_is_that_of_all_swaps():
  references = [
    "the house",
    "a red dog",
    "we sleep",
    "it rains",
    "old",
    "so on",
  ]
  ours = ["the house", "a red dog", "we slept", "it rain", "old", "no"]
  theirs = ["a mouse", "a bed fog", "we sleep", "rain", "told", "so in"]
  metric = CHRF(beta=1)

  def delta(swaps) -> float:
    pairs = [
      (b, a) if swap else (a, b)
      for swap, a, b in zip(swaps, ours, theirs, strict=True)
    ]
    first, second = (
      metric.corpus_score(list(texts), [references]).score
      for texts in zip(*pairs, strict=True)
    )
    return first - second

  observed = delta([False] * 6)
  deltas = [delta(s) for s in itertools.product([False, True], repeat=6)]
  exact = np.mean([abs(d) >= abs(observed) - 1e-9 for d in deltas])
  counts = [chrf.chrf1(texts, references).counts for texts in (ours, theirs)]
  found = compare(*counts, chrf.from_counts, resamples=20_000)
  assert found.delta == pytest.approx(observed)
  assert 0.05 < exact < 0.95
  assert found.p_value == pytest.approx(exact, abs=0.01)


def test_a_corpus_interval_is_that_of_resampled_texts():
  references = ["the house", "a red dog", "we sleep", "it rains", "old times"]
  predictions = ["the mouse", "a red fog", "we slept", "it", "old times"]
  metric = CHRF(beta=1)
  random = np.random.default_rng(5)
  scores = []
  for _ in range(2000):
    drawn = random.integers(0, 5, 5)
    scores.append(
      metric.corpus_score(
        [predictions[i] for i in drawn], [[references[i] for i in drawn]]
      ).score
    )
  counts = chrf.chrf1(predictions, references).counts
  low, high = interval(counts, chrf.from_counts, resamples=20_000, level=0.8)
  np.testing.assert_allclose(
    [low, high], np.quantile(scores, [0.1, 0.9]), atol=1.5
  )


def test_table_5_counts():
  anchor = {"lij": 32.6, "mr": 24.2, "taq": 44.6, "nso": 8.4}
  composed = {"lij": 44.1, "mr": 24.1, "taq": 55.1, "nso": 8.4}
  assert statistics.count_better(composed, anchor) == (2, 3, 4)
  with pytest.raises(InputError, match=r"only one side has .*'th'"):
    statistics.count_better(composed | {"th": 1.0}, anchor)


def test_what_cannot_be_compared_is_said():
  with pytest.raises(InputError, match="paired comparison of 2 and 3"):
    compare(column([1, 2]), column([1, 2, 3]), mean_of(2))
  with pytest.raises(InputError, match=r"not empty, got \[0, 1\]"):
    mean_interval([])
