"""MBPP and HumanEval: prompts, programs out of completions, pass@1."""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from calm_jax.core.errors import InputError
from calm_jax.evals import code_execution
from calm_jax.evals.code_execution import extract_code, humaneval, mbpp
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


def shared(name: str) -> pathlib.Path:
  folder = os.environ.get("CALM_SHARED")
  if not folder:
    pytest.skip("CALM_SHARED is not set")
  return pathlib.Path(folder) / "data" / name


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


def test_the_prompt_is_the_three_shots_and_the_problem():
  shots = [PROBLEMS[i] for i in (2, 3, 4)]
  (prompt,) = code_execution.mbpp_prompts([PROBLEMS[12]], shots)
  assert prompt == PROMPT


@holds
def test_mbpp_counts_the_programs_that_pass():
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [PROBLEMS[12]["code"] + "\n[DONE]", "def eleven(): return 12"]

  outcome = mbpp(
    PROBLEMS, generate, allow_code_execution=True, task_ids=[12, 11]
  )
  assert asked[0] == PROMPT
  assert outcome.metrics == {"pass@1": 50.0, "shots": 3.0}
  good, bad = outcome.rows
  assert (good["task_id"], good["correct"], good["verdict"]) == (
    12, True, "passed",
  )  # fmt: skip
  assert good["program"] == "class Node: pass\n"
  assert bad["prediction"] == "def eleven(): return 12"
  assert (bad["correct"], bad["verdict"], bad["detail"]) == (
    False, "failed", "AssertionError in: assert eleven() == 11",
  )  # fmt: skip


def test_shots_that_do_not_fit_are_left_out():
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [""] * len(prompts)

  outcome = mbpp(
    PROBLEMS,
    generate,
    allow_code_execution=True,
    task_ids=[12, 11],
    fits=lambda prompt: prompt.count("[BEGIN]") <= 2,
  )
  assert outcome.metrics["shots"] == 1.0
  # The last shot and the question.
  assert PROMPT.endswith(asked[0])
  assert [prompt.count("[DONE]") for prompt in asked] == [1, 1]


def test_nothing_is_generated_where_nothing_may_be_run():
  with pytest.raises(InputError, match="--allow_code_execution"):
    mbpp(PROBLEMS, None, allow_code_execution=False, task_ids=[11])
  with pytest.raises(InputError, match="--allow_code_execution"):
    humaneval([], None, allow_code_execution=False)


def test_problems_that_are_missing_are_named():
  with pytest.raises(InputError, match=r"missing: \[3, 13\]"):
    problems = {i: p for i, p in PROBLEMS.items() if i != 3}
    mbpp(problems, None, allow_code_execution=True, task_ids=[11, 13])


def test_bad_lines_are_named(tmp_path):
  path = tmp_path / "mbpp.jsonl"
  with pytest.raises(InputError, match="no such file"):
    code_execution.read_mbpp(path)
  path.write_text("")
  with pytest.raises(InputError, match="empty"):
    code_execution.read_mbpp(path)
  good = json.dumps(PROBLEMS[2])
  for line, message in (
    ("{", "line 2: Expecting"),
    ("3", "line 2: .*int"),
    ('{"task_id": 1, "text": ""}', r"line 2: \['code', .*missing"),
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
  problems = code_execution.read_humaneval(path)
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [completion]

  outcome = humaneval(problems, generate, allow_code_execution=True)
  assert asked == [HUMANEVAL["prompt"]]
  assert outcome.rows[0]["verdict"] == verdict, outcome.rows
  assert outcome.metrics == {"pass@1": 100.0 * (verdict == "passed")}


@holds
def test_all_reference_solutions_of_mbpp_pass():
  problems = code_execution.read_mbpp(shared("mbpp/mbpp.jsonl"))
  assert list(problems) == list(range(1, 975))
  outcome = mbpp(
    problems,
    lambda prompts: [p["code"] + "\n[DONE]" for p in problems.values()],
    allow_code_execution=True,
    task_ids=tuple(problems),
  )
  assert [row for row in outcome.rows if not row["correct"]] == []
  assert outcome.metrics == {"pass@1": 100.0, "shots": 3.0}


def test_the_test_split_has_500_problems_with_three_shots():
  problems = code_execution.read_mbpp(shared("mbpp/mbpp.jsonl"))
  chosen = [problems[task_id] for task_id in code_execution.MBPP_TEST]
  shots = [problems[task_id] for task_id in code_execution.MBPP_SHOTS]
  prompts = code_execution.mbpp_prompts(chosen, shots)
  assert len(prompts) == 500
  assert all(prompt.count("[DONE]\n\nYou are") == 3 for prompt in prompts)
  assert all(prompt.endswith("\n[BEGIN]\n") for prompt in prompts)
  assert "\r" not in "".join(prompts)


@holds
def test_an_answer_to_nothing_passes_nowhere():
  problems = code_execution.read_mbpp(shared("mbpp/mbpp.jsonl"))
  outcome = mbpp(
    problems,
    lambda prompts: ["def zero():\n  return 0\n[DONE]"] * len(prompts),
    allow_code_execution=True,
    task_ids=range(11, 31),
  )
  assert [row["task_id"] for row in outcome.rows] == list(range(11, 31))
  assert outcome.metrics == {"pass@1": 0.0, "shots": 3.0}
