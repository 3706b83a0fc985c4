"""Files of predictions: reading, counting, and how sure a share is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.reporting.runs import MODELS, Run

# A sentence's chrF1 from which a prediction passes for right.
RIGHT = 50.0

Rows = list[dict[str, Any]]


def read_rows(path: Path) -> Rows:
  """Rows of a file of predictions; none if there is no such file.

  Raises:
    InputError: a line is not JSON, or lacks "prompt", "prediction", or both
      "correct" and "score".
  """
  rows: Rows = []
  if not path.exists():
    return rows
  with path.open(encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
      try:
        row = json.loads(line)
      except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON: {error}") from error
      needed = {"prompt", "prediction"}
      if not isinstance(row, dict) or not needed <= row.keys():
        raise InputError(f"{path}, line {number}: needs {sorted(needed)}")
      if "correct" not in row and "score" not in row:
        raise InputError(f'{path}, line {number}: needs "correct" or "score"')
      rows.append(row)
  return rows


def is_right(row: dict[str, Any]) -> bool:
  """Exact, its tests passed, or a chrF1 of at least RIGHT."""
  if "correct" in row:
    return bool(row["correct"])
  return row["score"] >= RIGHT


def count_by_terms(
  run: Run,
) -> dict[str, dict[str, dict[int, tuple[int, int]]]]:
  """How many are right by number of terms, on KV-MATH and NUM-MATH.

  Of KV-MATH only the expressions whose keys are all held-out. Rows without
  "num_terms" are left out.

  Returns:
    Name of the data set -> model -> number of terms -> (correct, total).
  """
  counts = {}
  for name, title in (
    ("kv_math_held_out", "KV-MATH, all keys held-out"),
    ("num_math", "NUM-MATH"),
  ):
    by_model = {}
    for model in MODELS:
      by_terms: dict[int, tuple[int, int]] = {}
      for row in read_rows(run.path(name, model)):
        if row.get("num_terms") is not None:
          correct, total = by_terms.get(int(row["num_terms"]), (0, 0))
          by_terms[int(row["num_terms"])] = (
            correct + bool(row["correct"]),
            total + 1,
          )
      if by_terms:
        by_model[model] = by_terms
    if by_model:
      counts[title] = by_model
  return counts


def wilson_interval(
  correct: int, total: int, z: float = 1.96
) -> tuple[float, float]:
  """The Wilson score interval of a proportion; 95% by default.

  Unlike the normal approximation it has a width at 0 of n and at n of n,
  which is where the models that lack a skill are.

  Returns:
    (low, high), both in [0, 1].

  Raises:
    ValueError: total is not positive, or correct is not in [0, total].
  """
  if total <= 0 or not 0 <= correct <= total:
    raise ValueError(f"{correct} correct of {total} is not a proportion")
  share = correct / total
  centre = share + z * z / (2 * total)
  spread = z * math.sqrt(
    share * (1 - share) / total + z * z / (4 * total * total)
  )
  scale = 1 + z * z / total
  # Rounding can leave a bound a hair outside of the estimate.
  low = min((centre - spread) / scale, share)
  high = max((centre + spread) / scale, share)
  return max(0.0, low), min(1.0, high)
