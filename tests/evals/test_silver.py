"""Table 7's measures."""

from __future__ import annotations

import subprocess
import sys

import pytest

from calm_jax.core.errors import InputError
from calm_jax.evals.silver import silver

ORIGINALS = ["Ann has 3 red apples.", "How many are left now?", "She eats one."]
RETURNED = [
  "Ann has 3 red apples.",
  "How many remain now?",
  "She eats an apple.",
]


def test_delta_and_overlap(tmp_path):
  outcome = silver(ORIGINALS, RETURNED, [100, 100, 0], [100, 0, 0])
  assert outcome.metrics["delta"] == pytest.approx(100 / 3)
  assert outcome.metrics["delta_low"] == 0
  assert outcome.metrics["delta_p"] == 1  # one example decides nothing
  assert outcome.rows[0]["overlap"] == pytest.approx(100)
  assert outcome.rows[1]["score_returned"] == 0
  files = tmp_path / "returned", tmp_path / "originals"
  for file, lines in zip(files, (RETURNED, ORIGINALS), strict=True):
    file.write_text("\n".join(lines) + "\n")
  run = subprocess.run(
    [sys.executable, "-m", "sacrebleu", files[1], "-i", files[0],
     "-m", "bleu", "-w", "9", "-f", "text"],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  said = f"{outcome.notes['overlap']} = {outcome.metrics['overlap']:.9f}"
  assert run.stdout.startswith(said)


def test_nothing_is_lost_without_translation():
  outcome = silver(ORIGINALS, ORIGINALS, [100, 0, 100], [100, 0, 100])
  assert outcome.metrics == pytest.approx({
    "overlap": 100, "delta": 0, "delta_low": 0, "delta_high": 0, "delta_p": 1,
  })  # fmt: skip


def test_columns_must_be_as_long():
  with pytest.raises(InputError, match=r"got \[3, 3, 2, 3\]"):
    silver(ORIGINALS, RETURNED, [1, 2], [1, 2, 3])
