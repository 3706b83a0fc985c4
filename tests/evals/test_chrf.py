"""chrF1: by hand, against sacrebleu's functions and its command line."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from calm_jax.evals import chrf

# Counted by hand, spaces left out: for n = 1 to 6 how many n-grams the
# prediction has, the reference has, and both share.
BY_HAND = {
  # ab bc cd against ab bc ce; abc bcd against abc bce; abcd against abce
  ("abcd", "abce"): (
    [4, 3, 2, 1, 0, 0],
    [4, 3, 2, 1, 0, 0],
    [3, 2, 1, 0, 0, 0],
  ),
  # thecat is the beginning of thecats; t twice in both
  ("the cat", "the cats"): (
    [6, 5, 4, 3, 2, 1],
    [7, 6, 5, 4, 3, 2],
    [6, 5, 4, 3, 2, 1],
  ),
  # a three times against once, b once against three times; aa, aab, aaab are
  # not in abbb
  ("aaab", "abbb"): (
    [4, 3, 2, 1, 0, 0],
    [4, 3, 2, 1, 0, 0],
    [2, 1, 0, 0, 0, 0],
  ),
  ("", "no"): ([0] * 6, [2, 1, 0, 0, 0, 0], [0] * 6),
}


def chrf1(predicted, wanted, both) -> float:
  """The definition, in fractions: mean precision and recall, then F1."""
  orders = [n for n in range(6) if predicted[n] and wanted[n]]
  if not orders:
    return 0.0
  precision = sum(Fraction(both[n], predicted[n]) for n in orders) / len(orders)
  recall = sum(Fraction(both[n], wanted[n]) for n in orders) / len(orders)
  return float(100 * 2 * precision * recall / (precision + recall))


def test_of_counts_made_by_hand():
  predictions, references = zip(*BY_HAND, strict=True)
  score = chrf.chrf1(predictions, references)
  for row, counts in zip(score.counts, BY_HAND.values(), strict=True):
    np.testing.assert_array_equal(row.reshape(6, 3).T, counts)
  np.testing.assert_allclose(
    score.sentences, [chrf1(*counts) for counts in BY_HAND.values()]
  )
  # 1/4 (3/4 + 2/3 + 1/2 + 0) of both
  assert score.sentences[0] == pytest.approx(100 * 23 / 48)
  # Precision 1; recall 1/6 (6/7 + 5/6 + 4/5 + 3/4 + 2/3 + 1/2) = 617/840
  assert score.sentences[1] == pytest.approx(100 * 2 * 617 / (617 + 840))
  total = np.sum(list(BY_HAND.values()), axis=0).tolist()
  assert score.corpus == pytest.approx(chrf1(*total))
  assert score.signature.startswith(
    "chrF1|nrefs:1|case:mixed|eff:yes|nc:6|nw:0"
  )


def random_texts(seed: int, count: int) -> list[str]:
  random = np.random.default_rng(seed)
  return [
    "".join(random.choice(list("abé ท"), random.integers(0, 12)))
    for _ in range(count)
  ]


def test_sums_of_counts_are_the_corpus():
  predictions, references = random_texts(0, 200), random_texts(1, 200)
  score = chrf.chrf1(predictions, references)
  assert chrf.from_counts(score.counts.sum(0)) == pytest.approx(score.corpus)
  metric = CHRF(beta=1)
  want = [
    metric.sentence_score(p, [r]).score
    for p, r in zip(predictions, references, strict=True)
  ]
  np.testing.assert_allclose(score.sentences, want, atol=1e-12)
  assert len({round(w) for w in want}) > 20


def test_the_same_as_sacrebleus_command_line(tmp_path):
  predictions = ["A house is big.", "two  dogs sleep", "Ça va ?", "l'amico"]
  references = [
    "The house is big.",
    "Two dogs are asleep",
    "Ça va ?",
    "un amis",
  ]
  files = tmp_path / "predictions", tmp_path / "references"
  for file, lines in zip(files, (predictions, references), strict=True):
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
  run = subprocess.run(
    [sys.executable, "-m", "sacrebleu", files[1], "-i", files[0],
     "-m", "chrf", "--chrf-beta", "1", "-w", "9", "-f", "text"],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  score = chrf.chrf1(predictions, references)
  assert run.stdout.strip() == f"{score.signature} = {score.corpus:.9f}"
