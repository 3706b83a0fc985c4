"""Files of predictions: reading, counting, and intervals of shares."""

import math
from pathlib import Path
from typing import Any

from calm_jax.core import files
from calm_jax.core.errors import InputError, check_text
from calm_jax.evals.exact_match import count_right
from calm_jax.reporting.runs import MODELS, Run

# Titles of the sets of predictions of the key-value task (§4.1), in Table 1.
SETS = {
  "kv_subs": "KV-SUBS",
  "num_math": "NUM-MATH",
  "kv_math_held_out": "KV-MATH, all keys held-out",
  "kv_math_mixed": "KV-MATH, mixed",
  "kv_math_held_in": "KV-MATH, all keys held-in",
  "num_math_steps": "NUM-MATH, answered in steps",
}
HEADLINE = "kv_math_held_out"
# A prediction counts as right from this chrF1 of its sentence on.
RIGHT = 50.0
_Z = 1.96  # of a 95% interval

Rows = list[dict[str, Any]]
# Data set's title -> model -> number of terms -> (correct, total).
CountsByTerms = dict[str, dict[str, dict[int, tuple[int, int]]]]


def read_rows(path: Path) -> Rows:
  """Reads a file of predictions; no rows if there is no such file.

  InputError if a line is not JSON, or lacks "prompt", "prediction", or both
  "correct" and "score".
  """
  if not path.exists():
    return []
  fields = dict.fromkeys(("prompt", "prediction"), check_text)
  rows = dict(files.read_json_lines(path, fields))
  for number, row in rows.items():
    if "correct" not in row and "score" not in row:
      raise InputError(f'{path} line {number}: needs "correct" or "score"')
  return [*rows.values()]


def is_right(row: dict[str, Any]) -> bool:
  """Exact, its tests passed, or a chrF1 of at least RIGHT."""
  return bool(row["correct"]) if "correct" in row else row["score"] >= RIGHT


def count_by_terms(run: Run) -> CountsByTerms:
  """Counts right answers by number of terms, on KV-MATH and NUM-MATH.

  Rows without "num_terms" are left out.
  """
  counts: CountsByTerms = {}
  for name in ("kv_math_held_out", "num_math"):
    for model in MODELS:
      rows = read_rows(run.path(name, model))
      if by_terms := count_right(rows, "num_terms"):
        counts.setdefault(SETS[name], {})[model] = by_terms
  return counts


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
  """Computes the 95% Wilson score interval, in [0, 1], of a proportion.

  Unlike the normal approximation it has a width at 0 of n and at n of n, where
  the models that lack a skill are.
  """
  if total <= 0 or not 0 <= correct <= total:
    raise ValueError(f"{correct} correct of {total} is not a proportion")
  share = correct / total
  centre = share + _Z * _Z / (2 * total)
  variance = share * (1 - share) / total + _Z * _Z / (4 * total * total)
  spread = _Z * math.sqrt(variance)
  scale = 1 + _Z * _Z / total
  # Rounding can leave a bound a hair outside of the estimate.
  low = min((centre - spread) / scale, share)
  high = max((centre + spread) / scale, share)
  return max(0.0, low), min(1.0, high)
