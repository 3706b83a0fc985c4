"""Descriptions of code: CodeXGLUE code-to-text, 3-shot, chrF1 (§4.3)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.evals import chrf, fewshot
from calm_jax.evals.base import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeToText(fewshot.FewShot):
  """CodeXGLUE code-to-text; exemplars are drawn from the file `pool`.

  Attributes:
    path, pool: files of the benchmark, see `read_codexglue`.
    rows, pool_rows: the slices of both that are used, such as ":100".
  """

  pool: str
  rows: str = ""
  pool_rows: str = ""

  def evaluation(self) -> Evaluation:
    """Reads the files; InputError if they are not as they must be."""
    items = fewshot.take(read_codexglue(self.path), self.rows, self.limit)
    pool = fewshot.take(read_codexglue(self.pool), self.pool_rows)
    return self.few_shot("code_to_text", "chrf1", items, pool, chrf.judge)


def read_codexglue(path: str | Path) -> list[dict[str, Any]]:
  """Reads a file of CodeXGLUE's code-to-text, of any of its languages.

  As in the benchmark, code is its tokens joined by spaces: the raw code may
  contain the description that is asked for.

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
        item = {"id": number, "language": row["language"].capitalize()}
        item["code"] = _join(row["code_tokens"])
        item["docstring"] = _join(row["docstring_tokens"])
        items.append(item)
      except (ValueError, KeyError, TypeError) as error:
        raise InputError(
          f"{path}, line {number}: needs language, code_tokens and "
          f"docstring_tokens ({type(error).__name__}: {error})"
        ) from error
  return items


def _join(tokens: list[str]) -> str:
  """Tokens on a single line."""
  return " ".join(" ".join(tokens).split())
