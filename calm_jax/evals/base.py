"""What an evaluator is.

An evaluator is a function of examples and of callables that run a model; it
knows neither the model nor how it was trained. It returns an Outcome.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Texts to their continuations.
Generate = Callable[[list[str]], list[str]]
# Examples to (summed loss in nats, target tokens, bytes that they spell) of
# each.
Score = Callable[[list[Any]], list[tuple[float, float, int]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Numbers, and the rows that they can be traced to.

  Attributes:
    metrics: name to number.
    rows: per example a JSON object with its inputs and outputs.
    notes: name to what must be said with a number: sacrebleu's signature.
  """

  metrics: dict[str, float]
  rows: list[dict[str, Any]]
  notes: dict[str, str] = dataclasses.field(default_factory=dict)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
  """Writes the rows of an outcome as jsonl."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", encoding="utf-8") as file:
    for row in rows:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
