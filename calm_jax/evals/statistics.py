"""Bootstrap intervals, and paired comparisons of two models.

All functions act on an array [N, S] of each example's summands: one column for
a mean, 18 counts for chrF1. A metric is a function of sums [..., S], so that
thousands of resamples are one matrix product.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from calm_jax.core.errors import InputError

Metric = Callable[[np.ndarray], np.ndarray]
_AT_ONCE = 2**22  # numbers of a block of resamples


class Difference(NamedTuple):
  """A model's metric less a baseline's, its bootstrap interval, and p-value.

  The p-value is two-sided, of a paired permutation test (null hypothesis: the
  two models are exchangeable).
  """

  delta: float
  low: float
  high: float
  p_value: float


def mean_of(count: int) -> Metric:
  """The mean of `count` examples, as a metric of sums [..., 1]."""
  return lambda sums: sums[..., 0] / count


def interval(
  parts_NS: np.ndarray,
  metric: Metric,
  *,
  seed: int = 0,
  resamples: int = 2000,
  level: float = 0.95,
) -> tuple[float, float]:
  """Computes the percentile bootstrap interval of metric(sum of examples).

  Where all examples are alike, such as 0 of n right, it has no width: a
  bootstrap cannot say more, which does not mean that there is no doubt.
  `level` is the share of the resamples inside.
  """
  (sums_RS,) = _resampled([_two_axes(parts_NS)], seed, resamples)
  return _quantiles(metric(sums_RS), level)


def compare(
  parts_NS: np.ndarray,
  baseline_NS: np.ndarray,
  metric: Metric,
  *,
  seed: int = 0,
  resamples: int = 2000,
) -> Difference:
  """Compares two models: bootstrap interval and permutation test, paired.

  Both draw examples, which must be the same in the same order, rather than
  answers, so that the difficulty that an example has for both models cancels.
  """
  a_NS, b_NS = _two_axes(parts_NS), _two_axes(baseline_NS)
  if a_NS.shape != b_NS.shape:
    raise InputError(
      f"a paired comparison of {len(a_NS)} and {len(b_NS)} examples: give the "
      "predictions of both models for the same examples"
    )
  delta = float(metric(a_NS.sum(0)) - metric(b_NS.sum(0)))
  a_RS, b_RS = _resampled([a_NS, b_NS], seed, resamples)
  low, high = _quantiles(metric(a_RS) - metric(b_RS))
  swapped = _swapped(a_NS, b_NS, metric, seed, resamples)
  # A difference by rounding alone counts as equal.
  extreme = np.abs(swapped) >= abs(delta) - 1e-9 * max(1.0, abs(delta))
  # The observed assignment is one of them: p is never 0.
  p_value = (1 + int(extreme.sum())) / (1 + resamples)
  return Difference(delta, low, high, p_value)


def count_better(
  scores: Mapping[str, float], baseline: Mapping[str, float]
) -> tuple[int, int, int]:
  """Counts Table 5's #(> m_B): (better, better or equal, languages)."""
  if scores.keys() != baseline.keys():
    raise InputError(
      "#(> m_B) compares the same languages; only one side has "
      f"{sorted(scores.keys() ^ baseline.keys())}"
    )
  better = sum(scores[name] > baseline[name] for name in scores)
  ties = sum(scores[name] == baseline[name] for name in scores)
  return better, better + ties, len(scores)


def _two_axes(parts: np.ndarray) -> np.ndarray:
  parts_NS = np.asarray(parts, np.float64)
  if parts_NS.ndim != 2 or not parts_NS.size:
    raise InputError(
      "the examples' statistics must be [examples, sums] and not empty, got "
      f"{list(parts_NS.shape)}"
    )
  return parts_NS


def _blocks(count: int, resamples: int):
  """Sizes of blocks of resamples that fit into little memory."""
  block = max(1, _AT_ONCE // count)
  return [min(block, resamples - at) for at in range(0, resamples, block)]


def _resampled(parts: list[np.ndarray], seed: int, resamples: int):
  """Sums [R, S] of each of `parts`, over the same draws with replacement."""
  random, count = np.random.default_rng(seed), len(parts[0])
  sums = []
  for rows in _blocks(count, resamples):
    times_RN = random.multinomial(count, np.full(count, 1 / count), rows)
    sums.append([times_RN.astype(np.float64) @ part for part in parts])
  return [np.concatenate(blocks) for blocks in zip(*sums, strict=True)]


def _swapped(a_NS, b_NS, metric, seed: int, resamples: int) -> np.ndarray:
  """Deltas [R] with the two models' answers swapped for random examples."""
  random = np.random.default_rng((seed, 1))
  deltas = []
  for rows in _blocks(len(a_NS), resamples):
    swap_RN = random.integers(0, 2, (rows, len(a_NS))).astype(np.float64)
    moved_RS = swap_RN @ (a_NS - b_NS)
    a_RS, b_RS = a_NS.sum(0) - moved_RS, b_NS.sum(0) + moved_RS
    deltas.append(metric(a_RS) - metric(b_RS))
  return np.concatenate(deltas)


def _quantiles(
  values_R: np.ndarray, level: float = 0.95
) -> tuple[float, float]:
  low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)
