"""Descriptions of code: CodeXGLUE code-to-text, 3-shot, chrF1 (§4.3)."""

import dataclasses
from pathlib import Path
from typing import Any

from calm_jax.core import files
from calm_jax.core.errors import check_text, check_texts
from calm_jax.evals import chrf, fewshot
from calm_jax.evals.base import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeToText(fewshot.FewShot):
  """CodeXGLUE code-to-text; exemplars are drawn from the file `pool`.

  `rows` and `pool_rows` are the slices of both files to use, such as ":100".
  """

  pool: str
  rows: str = ""
  pool_rows: str = ""

  def evaluation(self) -> Evaluation:
    """Reads the files; InputError if they are not as they must be."""
    items = fewshot.take(read_codexglue(self.path), self.rows, self.limit)
    pool = fewshot.take(read_codexglue(self.pool), self.pool_rows)
    return self.few_shot("code_to_text", "chrf1", items, pool, chrf.judge())


def read_codexglue(path: str | Path) -> list[dict[str, Any]]:
  """Reads rows of "id" (the line, from 1), "language", "code" and "docstring".

  As in the benchmark, code is its tokens joined by spaces: the raw code may
  contain the description that is asked for. InputError if there is no such
  file, or a line lacks a field.
  """
  fields = {"code_tokens": check_texts, "docstring_tokens": check_texts}
  fields |= {"language": check_text}
  return [
    {
      "id": number,
      "language": row["language"].capitalize(),
      "code": _join(row["code_tokens"]),
      "docstring": _join(row["docstring_tokens"]),
    }
    for number, row in files.read_json_lines(Path(path), fields)
  ]


def _join(tokens: list[str]) -> str:
  """Tokens on a single line."""
  return " ".join(" ".join(tokens).split())
