"""Files of predictions: reading, counting, and how sure a share is."""

import json
import math
import os
from pathlib import Path
from typing import Any

from calm_jax.errors import InputError
from calm_jax.tables import MODELS

SET_NAMES = {
  "kv_math_held_out": "KV-MATH, all keys held-out",
  "kv_math_mixed": "KV-MATH, mixed",
  "kv_math_held_in": "KV-MATH, all keys held-in",
  "num_math": "NUM-MATH",
  "kv_subs": "KV-SUBS",
}

Predictions = dict[tuple[str, str], list[dict[str, Any]]]


def read_predictions(workdir: str | os.PathLike) -> Predictions:
  """Reads predictions/<set>.<model>.jsonl: (set, model) -> its lines.

  Raises:
    InputError: a line is not JSON or lacks a field; a model that is not one
      of augmenting, anchor and composed.
  """
  found = {}
  for path in sorted(Path(workdir).glob("predictions/*.jsonl")):
    set_name, _, model = path.stem.rpartition(".")
    if not set_name or model not in MODELS:
      raise InputError(
        f"{path}: a file of predictions is named <set>.<model>.jsonl, and the "
        f"model is one of {', '.join(MODELS)}"
      )
    found[set_name, model] = _prediction_lines(path)
  known = list(SET_NAMES)
  return dict(
    sorted(
      found.items(),
      key=lambda item: (
        known.index(item[0][0]) if item[0][0] in known else len(known),
        item[0][0],
        MODELS.index(item[0][1]),
      ),
    )
  )


def count_by_terms(
  predictions: Predictions,
) -> dict[str, dict[str, dict[int, tuple[int, int]]]]:
  """How many are right by number of terms, on KV-MATH and NUM-MATH.

  Of KV-MATH only the expressions whose keys are all held-out. Lines without
  "num_terms" are left out.

  Returns:
    Name of the data set -> model -> number of terms -> (correct, total).
  """
  counts = {}
  for name in ("kv_math_held_out", "num_math"):
    by_model = {}
    for model in MODELS:
      by_terms: dict[int, tuple[int, int]] = {}
      for line in predictions.get((name, model), []):
        if line.get("num_terms") is not None:
          terms = int(line["num_terms"])
          correct, total = by_terms.get(terms, (0, 0))
          by_terms[terms] = (correct + bool(line["correct"]), total + 1)
      if by_terms:
        by_model[model] = by_terms
    if by_model:
      counts[SET_NAMES[name]] = by_model
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


def _prediction_lines(path: Path) -> list[dict[str, Any]]:
  lines = []
  needed = {"prompt", "completion", "prediction", "correct"}
  with path.open(encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
      try:
        fields = json.loads(line)
      except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON: {error}") from error
      if not isinstance(fields, dict) or not needed <= fields.keys():
        raise InputError(
          f"{path}, line {number}: needs the fields {sorted(needed)}"
        )
      lines.append(fields)
  return lines
