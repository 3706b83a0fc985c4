"""chrF with beta = 1 (the paper's chrF1), by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics import CHRF

from calm_jax.evals import fewshot, statistics
from calm_jax.evals.base import Outcome

ORDERS = 6  # of character n-grams; chrF has no words


class Chrf(NamedTuple):
  """chrF1 of a corpus, in percent.

  Attributes:
    corpus: of all sentences together, which is not the sentences' mean.
    sentences: of each.
    counts: int64 [N, 3 * ORDERS], what both are functions of.
    signature: sacrebleu's, for reports.
  """

  corpus: float
  sentences: list[float]
  counts: np.ndarray
  signature: str


def chrf1(predictions: Sequence[str], references: Sequence[str]) -> Chrf:
  """chrF1 of N predictions, with one reference each."""
  metric = CHRF(beta=1)
  corpus = metric.corpus_score(list(predictions), [list(references)])
  # sacrebleu's own bootstrap goes this way; its public functions give no
  # counts. The tests hold `of_counts` against `corpus_score`.
  counts = np.array(
    metric._extract_corpus_statistics(list(predictions), [list(references)]),
    np.int64,
  )
  return Chrf(
    corpus.score,
    of_counts(counts).tolist(),
    counts,
    f"{corpus.name}|{metric.get_signature()}",
  )


def of_counts(counts: np.ndarray) -> np.ndarray:
  """chrF1 in percent of (sums of) counts.

  Args:
    counts: [..., 3 * ORDERS], of each order the n-grams of the prediction, of
      the reference, and of both.

  Returns:
    float64 [...]. Orders longer than a text are left out, as sacrebleu does.
  """
  predicted, wanted, both = np.moveaxis(
    counts.reshape(*counts.shape[:-1], ORDERS, 3).astype(np.float64), -1, 0
  )
  counted = (predicted > 0) & (wanted > 0)
  orders = np.maximum(counted.sum(-1), 1)
  both = np.where(counted, both, 0)
  precision = (both / np.maximum(predicted, 1)).sum(-1) / orders
  recall = (both / np.maximum(wanted, 1)).sum(-1) / orders
  total = precision + recall
  return 200 * precision * recall / np.where(total > 0, total, 1)


def outcome(rows: list[dict[str, Any]], seed: int) -> Outcome:
  """Scores the rows of `fewshot.answers`.

  Args:
    rows: "chrf1" is added to each.
    seed: of the bootstrap.

  Returns:
    "chrf1" of the corpus, its 95% interval "chrf1_low" to "chrf1_high", and
    the mean number of "shots"; notes["chrf1"] is sacrebleu's signature.
  """
  score = chrf1(
    [row["prediction"] for row in rows], [row["completion"] for row in rows]
  )
  low, high = statistics.interval(score.counts, of_counts, seed=seed)
  return Outcome(
    {
      "chrf1": score.corpus,
      "chrf1_low": low,
      "chrf1_high": high,
      "shots": fewshot.mean_shots(rows),
    },
    [
      row | {"chrf1": sentence}
      for row, sentence in zip(rows, score.sentences, strict=True)
    ],
    {"chrf1": score.signature},
  )
