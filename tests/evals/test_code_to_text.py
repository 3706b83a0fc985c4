"""CodeXGLUE code-to-text: its lines, and the evaluation."""

from __future__ import annotations

import json

import eval_data
import pytest

from calm_jax.core.errors import InputError
from calm_jax.evals import tasks
from calm_jax.evals.code_to_text import read_codexglue

LINE = {
  "language": "python",
  "code": 'def f(x):\n  """Adds one."""\n  return x + 1',
  "code_tokens": ["def", "f", "(", "x", ")", ":", "return\n", "x", "+", "1"],
  "docstring_tokens": ["Adds", "one", "."],
}


def test_the_code_does_not_hold_what_is_asked_for(tmp_path):
  file = tmp_path / "test.jsonl"
  file.write_text(json.dumps(LINE) + "\n")
  assert read_codexglue(file) == [
    {
      "id": 1,
      "language": "Python",
      "code": "def f ( x ) : return x + 1",
      "docstring": "Adds one .",
    }
  ]


def test_what_cannot_be_read_is_said(tmp_path):
  file = tmp_path / "test.jsonl"
  file.write_text(json.dumps(LINE) + "\n" + '{"language": "go"}\n')
  with pytest.raises(InputError, match=r"test\.jsonl line 2: .*code_tokens"):
    read_codexglue(file)
  with pytest.raises(InputError, match="no such file"):
    read_codexglue(tmp_path / "valid.jsonl")


def test_the_references_of_ruby_score_100():
  path = eval_data.folder("codexglue") / "code_to_text_ruby" / "test.jsonl"
  items = read_codexglue(path)
  assert len(items) == 1261
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [f" {item['docstring']}\n\nRuby code: more" for item in items]

  evaluation = tasks.make(
    {
      "kind": "code_to_text", "group": "CodeXGLUE", "path": path, "pool": path,
      "shots": 3, "max_new_tokens": 96,
    }
  )  # fmt: skip
  judged = eval_data.answer(evaluation, generate)
  assert judged.value == 100
  assert all(p.count("\nDescription:") == 4 for p in asked[:20])
  assert all(
    number not in row["exemplars"] for number, row in enumerate(judged.rows)
  )
