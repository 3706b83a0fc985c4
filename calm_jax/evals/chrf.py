"""chrF with beta = 1 (the paper's chrF1), by sacrebleu."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from calm_jax.core.extras import import_extra
from calm_jax.evals.base import Judgement, Row

ORDERS = 6  # lengths of the character n-grams, from 1


class Chrf(NamedTuple):
  """chrF1 in percent, of a corpus (not the mean of its sentences) and each.

  `from_counts` computes both from the int64 counts [N, 3 * ORDERS].
  """

  corpus: float
  sentences: list[float]
  counts: np.ndarray
  signature: str


def load_metrics() -> ModuleType:
  """Imports sacrebleu's metrics; InputError names the extra that has them."""
  return import_extra("chrF and BLEU", "sacrebleu.metrics", "sacrebleu")


def chrf1(predictions: Sequence[str], references: Sequence[str]) -> Chrf:
  """Computes the chrF1 of N predictions, with one reference each."""
  metric = load_metrics().CHRF(beta=1)
  texts = list(predictions), [list(references)]
  corpus = metric.corpus_score(*texts)
  # sacrebleu's public functions give scores without their counts. setup.cfg
  # therefore bounds its version, and tests hold `from_counts` against
  # `corpus_score` and `sentence_score`.
  counts = np.array(metric._extract_corpus_statistics(*texts), np.int64)
  signature = f"{corpus.name}|{metric.get_signature()}"
  return Chrf(corpus.score, from_counts(counts).tolist(), counts, signature)


def from_counts(counts: np.ndarray) -> np.ndarray:
  """Computes chrF1 in percent, float64 [...], from counts or sums of them.

  Args:
    counts: [..., 3 * ORDERS]; for each order the numbers of n-grams in the
      prediction, in the reference, and in both. Orders longer than a text are
      left out, as sacrebleu does.
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


def judge() -> Callable[[list[Row]], Judgement]:
  """Returns what judges rows by the chrF1 of "prediction" and "completion".

  InputError if sacrebleu is missing: before a training, not at its end.
  """
  load_metrics()
  return _judge


def _judge(rows: list[Row]) -> Judgement:
  texts = ([row[k] for row in rows] for k in ("prediction", "completion"))
  value, sentences, counts, signature = chrf1(*texts)
  rows = [
    row | {"chrf1": sentence, "score": sentence}
    for row, sentence in zip(rows, sentences, strict=True)
  ]
  return Judgement(value, rows, counts, from_counts, signature)
