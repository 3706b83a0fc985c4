"""MBPP and HumanEval: prompts, programs out of completions, pass@1."""

from __future__ import annotations

import json

import pytest
from eval_data import answer, folder

from calm_jax.core.errors import InputError
from calm_jax.evals import code_execution, tasks
from calm_jax.evals.code_execution import extract_code
from calm_jax.sandbox import runner

try:
  runner.require(True)
  WHY_NOT = ""
except InputError as error:
  WHY_NOT = str(error)
holds = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

REPLY = {
  2: "def two(): return 2",
  3: "def three():\r\n  return 3",
  4: "def four(): return {'4': 4}['4']",
  11: "def eleven(): return 11",
  12: "class Node: pass",
}
PROBLEMS = {
  task_id: {
    "task_id": task_id,
    "text": f"Write {{{task_id}}}.",
    "code": code.replace("\r\n", "\n"),
    "test_setup_code": "root = Node()" if task_id == 12 else "",
    "test_list": ["assert root"]
    if task_id == 12
    else [f"assert {code.split('(')[0][4:]}() == {task_id}", "assert True"],
  }
  for task_id, code in REPLY.items()
}
PROMPT = """\
You are an expert Python programmer, and here is your task: Write {2}. Your \
code should pass these tests:

assert two() == 2
assert True
[BEGIN]
def two(): return 2
[DONE]

You are an expert Python programmer, and here is your task: Write {3}. Your \
code should pass these tests:

assert three() == 3
assert True
[BEGIN]
def three():
  return 3
[DONE]

You are an expert Python programmer, and here is your task: Write {4}. Your \
code should pass these tests:

assert four() == 4
assert True
[BEGIN]
def four(): return {'4': 4}['4']
[DONE]

You are an expert Python programmer, and here is your task: Write {12}. Your \
code should pass these tests:

assert root
[BEGIN]
"""


def make(kind, path, allow_code_execution=True):
  return tasks.make(
    {
      "kind": kind, "group": kind, "path": path, "max_new_tokens": 99,
      "allow_code_execution": allow_code_execution,
    }
  )  # fmt: skip


def mbpp(monkeypatch, path, task_ids):
  """The evaluation of some task_ids of a file, or of PROBLEMS written to it."""
  if not path.exists():
    lines = [json.dumps(problem) + "\n" for problem in PROBLEMS.values()]
    path.write_text("".join(lines))
  monkeypatch.setattr(code_execution, "MBPP_TEST", task_ids)
  return make("mbpp", path)


@pytest.mark.parametrize(
  ("completion", "code"),
  [
    ("def f(): pass\n[DONE]\n\nYou are", "def f(): pass\n"),
    ("def f(): pass", "def f(): pass"),
    ("[BEGIN]\r\ndef f():\r\n  pass\n[DONE]", "\ndef f():\n  pass\n"),
    ("Sure:\n```python\nx = 1\n```\nIt sets x.", "x = 1\n"),
    ("```\nx = 1\n", "x = 1\n"),
    ("import re\nx = 1\n```\nIt sets x.\n```", "import re\nx = 1\n"),
    ("[DONE]", ""),
    ("", ""),
  ],
)
def test_the_program_in_a_completion(completion, code):
  assert extract_code(completion) == code


@holds
def test_mbpp_counts_the_programs_that_pass(tmp_path, monkeypatch):
  evaluation = mbpp(monkeypatch, tmp_path / "mbpp.jsonl", [12, 11])
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [PROBLEMS[12]["code"] + "\n[DONE]", "def eleven(): return 12"]

  judged = answer(evaluation, generate)
  assert asked[0] == PROMPT
  assert (judged.value, evaluation.shots) == (50.0, 3)
  good, bad = judged.rows
  assert (good["task_id"], good["correct"], good["verdict"]) == (
    12, True, "passed",
  )  # fmt: skip
  assert good["program"] == "class Node: pass\n"
  assert bad["prediction"] == "def eleven(): return 12"
  assert (bad["correct"], bad["verdict"], bad["detail"]) == (
    False, "failed", "AssertionError in: assert eleven() == 11",
  )  # fmt: skip


@holds
def test_shots_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
  evaluation = mbpp(monkeypatch, tmp_path / "mbpp.jsonl", [12, 11])
  asked = evaluation.prompts(lambda prompt: prompt.count("[BEGIN]") <= 2)
  # The last shot and the question.
  assert PROMPT.endswith(asked[0].text)
  assert [prompt.text.count("[DONE]") for prompt in asked] == [1, 1]
  assert [prompt.exemplars for prompt in asked] == [[4], [4]]


@holds
def test_problems_that_are_missing_are_named(tmp_path, monkeypatch):
  path = tmp_path / "mbpp.jsonl"
  lines = [json.dumps(p) + "\n" for i, p in PROBLEMS.items() if i != 3]
  path.write_text("".join(lines))
  with pytest.raises(InputError, match=r"missing: \[3, 13\]"):
    mbpp(monkeypatch, path, [11, 13])


def test_bad_lines_are_named(tmp_path):
  path = tmp_path / "mbpp.jsonl"
  with pytest.raises(InputError, match="no such file"):
    code_execution.read_mbpp(path)
  path.write_text("")
  with pytest.raises(InputError, match="empty"):
    code_execution.read_mbpp(path)
  good = json.dumps(PROBLEMS[2])
  for line, message in (
    ("{", "line 2: not JSON"),
    ("3", "line 2: .*int"),
    ('{"task_id": 1, "text": ""}', "line 2: it has no 'code' and no"),
  ):
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=message):
      code_execution.read_mbpp(path)
  path.write_text(json.dumps({**PROBLEMS[3], "code": REPLY[3]}) + "\n")
  assert code_execution.read_mbpp(path) == {3: PROBLEMS[3]}


HUMANEVAL = {
  "task_id": "HumanEval/0",
  "prompt": 'import math\n\n\ndef root(x):\n    """The root."""\n',
  "canonical_solution": "    return math.isqrt(x)\n",
  "test": (
    "\n\nMETADATA = {}\n\n\ndef check(candidate):\n"
    "    assert candidate(9) == 3\n    assert candidate(16) == 4\n"
  ),
  "entry_point": "root",
}


@holds
@pytest.mark.parametrize(
  ("completion", "verdict"),
  [
    (HUMANEVAL["canonical_solution"], "passed"),
    ("    return math.isqrt(x)\n\nprint(root('x'))\n", "passed"),
    ("    return math.isqrt(x)\n\n\ndef root(x): return 0\n", "passed"),
    ("    return math.isqrt(x)\n```\nThat is it.", "passed"),
    ("    return 3\n", "failed"),
    ("    import os; os._exit(0)\n", "did not run the tests"),
    ("return x", "failed"),
    ("", "failed"),
  ],
)
def test_humaneval_continues_the_function(tmp_path, completion, verdict):
  path = tmp_path / "HumanEval.jsonl"
  path.write_text(json.dumps(HUMANEVAL) + "\n")
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [completion]

  judged = answer(make("humaneval", path), generate)
  assert asked == [HUMANEVAL["prompt"]]
  assert judged.rows[0]["verdict"] == verdict, judged.rows
  assert judged.value == 100.0 * (verdict == "passed")


@holds
def test_all_reference_solutions_of_mbpp_pass(monkeypatch):
  path = folder("mbpp") / "mbpp.jsonl"
  problems = code_execution.read_mbpp(path)
  assert list(problems) == list(range(1, 975))
  judged = answer(
    mbpp(monkeypatch, path, list(problems)),
    lambda prompts: [p["code"] + "\n[DONE]" for p in problems.values()],
  )
  assert [row for row in judged.rows if not row["correct"]] == []
  assert judged.value == 100.0


@holds
def test_the_test_split_has_500_problems_with_three_shots():
  evaluation = make("mbpp", folder("mbpp") / "mbpp.jsonl")
  prompts = [prompt.text for prompt in evaluation.prompts(lambda _: True)]
  assert len(prompts) == evaluation.examples == 500
  assert all(prompt.count("[DONE]\n\nYou are") == 3 for prompt in prompts)
  assert all(prompt.endswith("\n[BEGIN]\n") for prompt in prompts)
  assert "\r" not in "".join(prompts)


@holds
def test_an_answer_to_nothing_passes_nowhere(monkeypatch):
  judged = answer(
    mbpp(monkeypatch, folder("mbpp") / "mbpp.jsonl", range(11, 31)),
    lambda prompts: ["def zero():\n  return 0\n[DONE]"] * len(prompts),
  )
  assert [row["task_id"] for row in judged.rows] == list(range(11, 31))
  assert judged.value == 0.0
