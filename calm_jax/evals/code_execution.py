"""Code that a model writes, judged by running its tests (§4.3, Table 4).

HumanEval is code completion (zero-shot) and MBPP is text to code (3-shot). Both
report pass@1 of one greedy completion per problem: the share of problems whose
program passes all its tests, in percent.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.evals.base import Generate, Outcome
from calm_jax.sandbox import runner
from calm_jax.sandbox.runner import Program

# Austin et al. 2021 (arXiv 2108.07732), as in the README of the data.
MBPP_TEST = range(11, 511)
MBPP_SHOTS = (2, 3, 4)
MBPP_STOP = ("[DONE]",)
# Chen et al. 2021 (arXiv 2107.03374), and the end of a fence.
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")


def read_problems(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
  """Rows of a jsonl file, with line ends as "\\n".

  Raises:
    InputError: no such file, an empty one, a line that is not JSON, or a field
      is missing.
  """
  if not path.is_file():
    raise InputError(f"{path}: no such file")
  problems = []
  with path.open(encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      try:
        problem = json.loads(line, object_hook=_with_unix_lines)
        missing = [field for field in fields if field not in problem]
      except (ValueError, TypeError) as error:
        raise InputError(f"{path}, line {number}: {error}") from error
      if missing:
        raise InputError(f"{path}, line {number}: {missing} missing")
      problems.append(problem)
  if not problems:
    raise InputError(f"{path}: it is empty")
  return problems


def read_mbpp(path: Path) -> dict[int, dict[str, Any]]:
  """Problems of `mbpp.jsonl` by their task_id."""
  fields = ("task_id", "text", "code", "test_setup_code", "test_list")
  return {row["task_id"]: row for row in read_problems(path, fields)}


def read_humaneval(path: Path) -> list[dict[str, Any]]:
  """Problems of `HumanEval.jsonl`."""
  return read_problems(path, ("task_id", "prompt", "test", "entry_point"))


def mbpp(
  problems: dict[int, dict[str, Any]],
  generate: Generate,
  *,
  allow_code_execution: bool,
  task_ids: Sequence[int] = MBPP_TEST,
  fits: Callable[[str], bool] | None = None,
  **options,
) -> Outcome:
  """pass@1 on MBPP, with task_ids 2, 3 and 4 as the three shots.

  Args:
    problems: of `read_mbpp`.
    generate: the model, greedy; it may stop at `MBPP_STOP`.
    allow_code_execution: see `sandbox.run`.
    task_ids: the problems to solve; by default the 500 of the test split.
    fits: whether a prompt is short enough; while it is not, the first of its
      shots is left out.
    **options: `limits` and `workers` of `sandbox.run`.

  Raises:
    InputError: see `sandbox.run`; or a problem is missing.
  """
  missing = {*MBPP_SHOTS, *task_ids} - problems.keys()
  if missing:
    raise InputError(f"MBPP problems are missing: {sorted(missing)[:5]}")
  chosen = [problems[task_id] for task_id in task_ids]
  shots = [problems[shot] for shot in MBPP_SHOTS]
  # Of each problem with all shots, with one less, and so on to none.
  fewer = [mbpp_prompts(chosen, shots[n:]) for n in range(len(shots) + 1)]
  prompts, used = [], []
  for several in zip(*fewer, strict=True):
    left_out = 0
    while fits and left_out < len(shots) and not fits(several[left_out]):
      left_out += 1
    prompts.append(several[left_out])
    used.append(len(shots) - left_out)

  def program(problem: dict[str, Any], completion: str) -> Program:
    # The set-up uses names of the program: it comes after it.
    tests = [problem["test_setup_code"], *problem["test_list"]]
    return Program(extract_code(completion), "\n".join(tests))

  outcome = _pass_at_1(
    chosen, prompts, generate, program, allow_code_execution, options
  )
  mean = sum(used) / len(used)
  return Outcome(outcome.metrics | {"shots": mean}, outcome.rows)


def humaneval(
  problems: Sequence[dict[str, Any]],
  generate: Generate,
  *,
  allow_code_execution: bool,
  **options,
) -> Outcome:
  """pass@1 on HumanEval; each problem's prompt is continued as it stands.

  Args:
    problems: of `read_humaneval`.
    generate: the model, greedy; it may stop at `HUMANEVAL_STOP`.
    allow_code_execution: see `sandbox.run`.
    **options: `limits` and `workers` of `sandbox.run`.

  Raises:
    InputError: see `sandbox.run`.
  """

  def program(problem: dict[str, Any], completion: str) -> Program:
    body = until(completion, HUMANEVAL_STOP)
    check = f"\ncheck({problem['entry_point']})\n"
    return Program(problem["prompt"] + body, problem["test"] + check)

  prompts = [problem["prompt"] for problem in problems]
  return _pass_at_1(
    problems, prompts, generate, program, allow_code_execution, options
  )


def mbpp_prompts(
  problems: Sequence[dict[str, Any]], shots: Sequence[dict[str, Any]]
) -> list[str]:
  """The shots with their code, then each problem up to [BEGIN]."""
  folder = importlib.resources.files("calm_jax.evals") / "prompts"
  template = (folder / "mbpp.txt").read_text(encoding="utf-8").rstrip("\n")
  question = template[: template.index("{code}")]

  def fill(text: str, problem: dict[str, Any]) -> str:
    return text.format(
      text=problem["text"],
      tests="\n".join(problem["test_list"]),
      code=problem["code"],
    )

  before = "".join(fill(template, shot) + "\n\n" for shot in shots)
  return [before + fill(question, problem) for problem in problems]


def extract_code(completion: str) -> str:
  """The program in a completion: up to [DONE], and out of a code fence."""
  text = until(completion.replace("\r\n", "\n"), MBPP_STOP)
  text = text.rpartition("[BEGIN]")[2]
  before, fence, _ = text.partition("```")
  starts = re.search(r"^(def|class|import|from|@)\b", before, re.MULTILINE)
  if not fence or starts:
    return before
  inside = text[text.index("```") :].partition("\n")[2]
  return until(inside, ("```",))


def _with_unix_lines(row: dict[str, Any]) -> dict[str, Any]:
  return {
    key: value.replace("\r\n", "\n") if isinstance(value, str) else value
    for key, value in row.items()
  }


def until(text: str, stop: Sequence[str]) -> str:
  """The text before the first of the stop strings."""
  return text[: min((at for s in stop if (at := text.find(s)) >= 0),
                    default=len(text))]  # fmt: skip


def _pass_at_1(
  problems: Sequence[dict[str, Any]],
  prompts: list[str],
  generate: Generate,
  program: Callable[[dict[str, Any], str], Program],
  allow_code_execution: bool,
  options: dict[str, Any],
) -> Outcome:
  # Before the model works for hours in vain.
  runner.require(allow_code_execution)
  predictions = generate(prompts)
  programs = [
    program(problem, prediction)
    for problem, prediction in zip(problems, predictions, strict=True)
  ]
  verdicts = runner.run(
    programs, allow_code_execution=allow_code_execution, **options
  )
  rows = [
    {
      "task_id": problem["task_id"],
      "prompt": prompt,
      "prediction": prediction,
      "program": tried.code,
      "correct": verdict.passed,
      "verdict": verdict.name,
      "detail": verdict.detail,
      "output": verdict.output,
    }
    for problem, prompt, prediction, tried, verdict in zip(
      problems, prompts, predictions, programs, verdicts, strict=True
    )
  ]
  passed = sum(row["correct"] for row in rows)
  return Outcome({"pass@1": 100 * passed / len(rows)}, rows)
