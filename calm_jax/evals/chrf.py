"""chrF with beta = 1 (the paper's chrF1), by sacrebleu."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import CHRF

from calm_jax.evals.base import Judgement, Row

ORDERS = 6  # lengths of the character n-grams, from 1


class Chrf(NamedTuple):
  """chrF1 of a corpus, in percent.

  Attributes:
    corpus: chrF1 of all sentences together, which is not the sentences' mean.
    sentences: chrF1 of each sentence.
    counts: int64 [N, 3 * ORDERS], from which `from_counts` computes both.
    signature: sacrebleu's, for reports.
  """

  corpus: float
  sentences: list[float]
  counts: np.ndarray
  signature: str


def chrf1(predictions: Sequence[str], references: Sequence[str]) -> Chrf:
  """Computes the chrF1 of N predictions, with one reference each."""
  metric = CHRF(beta=1)
  corpus = metric.corpus_score(list(predictions), [list(references)])
  # sacrebleu's public functions give scores without their counts. setup.cfg
  # therefore bounds its version, and tests hold `from_counts` against
  # `corpus_score` and `sentence_score`.
  counts = np.array(
    metric._extract_corpus_statistics(list(predictions), [list(references)]),
    np.int64,
  )
  return Chrf(
    corpus.score,
    from_counts(counts).tolist(),
    counts,
    f"{corpus.name}|{metric.get_signature()}",
  )


def from_counts(counts: np.ndarray) -> np.ndarray:
  """Computes chrF1 in percent from counts of n-grams, or sums of them.

  Args:
    counts: [..., 3 * ORDERS]; for each order the numbers of n-grams in the
      prediction, in the reference, and in both.

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


def judge(rows: list[Row]) -> Judgement:
  """chrF1 of the rows' "prediction" against their "completion"."""
  score = chrf1(
    [row["prediction"] for row in rows], [row["completion"] for row in rows]
  )
  rows = [
    row | {"chrf1": sentence, "score": sentence}
    for row, sentence in zip(rows, score.sentences, strict=True)
  ]
  return Judgement(
    score.corpus, rows, score.counts, from_counts, score.signature
  )
