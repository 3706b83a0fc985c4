"""Descriptions of code: CodeXGLUE code-to-text, 3-shot, chrF1 (§4.3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.evals import chrf, fewshot
from calm_jax.evals.base import Generate, Outcome

SHOTS = 3  # the paper's


def code_to_text(
  items: Sequence[dict[str, Any]],
  pool: Sequence[dict[str, Any]],
  generate: Generate,
  *,
  shots: int = SHOTS,
  seed: int = 0,
  prompt: str | Path = "code_to_text",
  fits: Callable[[str], bool] | None = None,
) -> Outcome:
  """chrF1 of descriptions; arguments as of `translation.translation`."""
  rows = fewshot.answers(
    prompt, items, pool, generate, shots=shots, seed=seed, fits=fits
  )
  return chrf.outcome(rows, seed)


def read_codexglue(path: str | Path) -> list[dict[str, Any]]:
  """A file of CodeXGLUE's code-to-text, of any of its languages.

  As in the benchmark, tokens joined by spaces: the raw code may contain the
  description that is asked for.

  Returns:
    {"id", "language", "code", "docstring"}; id is the line, from 1.

  Raises:
    InputError: no such file, or a line that lacks a field.
  """
  path = Path(path)
  if not path.is_file():
    raise InputError(f"no file {path}: give a .jsonl of CodeXGLUE code-to-text")
  items = []
  with path.open(encoding="utf-8") as file:
    for number, line in enumerate(file, start=1):
      try:
        row = json.loads(line)
        items.append({
          "id": number,
          "language": row["language"].capitalize(),
          "code": _one_line(row["code_tokens"]),
          "docstring": _one_line(row["docstring_tokens"]),
        })  # fmt: skip
      except (ValueError, KeyError, TypeError) as error:
        raise InputError(
          f"{path}, line {number}: needs language, code_tokens and "
          f"docstring_tokens ({type(error).__name__}: {error})"
        ) from error
  return items


def _one_line(tokens: list[str]) -> str:
  return " ".join(" ".join(tokens).split())
