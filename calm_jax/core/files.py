"""Writing results and reports."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
  """Of JSON's types only."""
  if isinstance(value, Mapping):
    return {str(name): plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  # A type has it too, unbound: a dtype in a configuration.
  if hasattr(value, "tolist") and not isinstance(value, type):
    return plain(value.tolist())
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, float) and not math.isfinite(value):
    if math.isnan(value):
      return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
  return value


def write_results(path: Path, results: Mapping[str, Any]) -> None:
  """Writes results as JSON, whole or not at all.

  NumPy numbers become plain ones; a number that is not finite becomes the
  string "NaN", "Infinity" or "-Infinity", all three of which `float` reads.
  """
  text = json.dumps(
    plain(results), indent=2, ensure_ascii=False, allow_nan=False, default=str
  )
  write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
  """Writes a file, whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
