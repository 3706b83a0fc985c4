"""Code that a model writes, judged by running its tests (§4.3, Table 4).

HumanEval (zero-shot) and MBPP (3-shot) report pass@1 of a greedy completion:
the share of problems whose program passes all its tests, in percent.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from calm_jax.core import files
from calm_jax.core.errors import InputError, check_int, check_text, check_texts
from calm_jax.evals import base, fences, fewshot
from calm_jax.evals.base import Evaluation, Judgement, Prompt, Question, Row
from calm_jax.sandbox import runner
from calm_jax.text import stop_strings

# Austin et al. 2021 (arXiv 2108.07732), as in the README of the data.
MBPP_TEST = range(11, 511)
MBPP_SHOTS = (2, 3, 4)
MBPP_STOP = ("[DONE]",)
# Chen et al. 2021 (arXiv 2107.03374), and the end of a fence.
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programming(base.Options):
  """Options of the evaluations that run what a model writes."""

  allow_code_execution: bool

  def pass_at_1(
    self,
    task: str,
    problems: list[Row],
    questions: list[Question],
    program: Callable[[Row, str], runner.ProgramWithTests],
    stop: tuple[str, ...],
    shots: int = 0,
  ) -> Evaluation:
    """Makes an evaluation; `program` takes a problem and an answer."""

    def judge(asked: list[Prompt], outputs: list[str]) -> Judgement:
      programs = list(map(program, problems, outputs))
      allowed = self.allow_code_execution
      verdicts = runner.run(programs, allow_code_execution=allowed)
      rows = [
        {
          "task_id": problem["task_id"],
          "prompt": prompt.text,
          "prediction": output,
          "program": tried.code,
          "correct": verdict.passed,
          "verdict": verdict.name,
          "detail": verdict.detail,
          "output": verdict.output,
        }
        for problem, prompt, output, tried, verdict in zip(
          problems, asked, outputs, programs, verdicts, strict=True
        )
      ]
      return base.judge_correct(rows)

    return Evaluation(
      task=task,
      group=self.group,
      metric="pass@1",
      examples=len(problems),
      shots=shots,
      max_new_tokens=self.max_new_tokens,
      stop=stop,
      questions=questions,
      judge=judge,
    )


class Mbpp(Programming):
  """MBPP's test split, with task_ids 2, 3 and 4 as the three shots."""

  def evaluation(self) -> Evaluation:
    """Reads the problems; InputError if one is missing or wrong."""
    runner.require(self.allow_code_execution)
    problems = {
      task_id: problem | {"tests": "\n".join(problem["test_list"])}
      for task_id, problem in read_mbpp(Path(self.path)).items()
    }
    task_ids = MBPP_TEST[: self.limit or None]
    if missing := {*MBPP_SHOTS, *task_ids} - problems.keys():
      raise InputError(f"MBPP problems are missing: {sorted(missing)[:5]}")
    template = fewshot.load_template("mbpp", ending="\n[DONE]")
    chosen = [problems[task_id] for task_id in task_ids]
    questions = [
      template.question(problem, problems, MBPP_SHOTS) for problem in chosen
    ]

    def program(problem: Row, output: str) -> runner.ProgramWithTests:
      # The set-up uses names of the program: it comes after it.
      tests = f"{problem['test_setup_code']}\n{problem['tests']}"
      return runner.ProgramWithTests(extract_code(output), tests)

    return self.pass_at_1(
      "mbpp", chosen, questions, program, MBPP_STOP, len(MBPP_SHOTS)
    )


class HumanEval(Programming):
  """HumanEval: each problem's prompt is continued as it stands."""

  def evaluation(self) -> Evaluation:
    """Reads the problems; InputError if a line is wrong."""
    runner.require(self.allow_code_execution)
    problems = read_humaneval(Path(self.path))[: self.limit or None]
    questions = [Question(problem["prompt"], {}) for problem in problems]

    def program(problem: Row, output: str) -> runner.ProgramWithTests:
      body = stop_strings.cut(output, HUMANEVAL_STOP)
      tests = f"{problem['test']}\ncheck({problem['entry_point']})\n"
      return runner.ProgramWithTests(problem["prompt"] + body, tests)

    stop = HUMANEVAL_STOP
    return self.pass_at_1("humaneval", problems, questions, program, stop)


def read_humaneval(path: Path) -> list[Row]:
  """Problems of `HumanEval.jsonl`."""
  fields = ("task_id", "prompt", "test", "entry_point")
  return _read_problems(path, dict.fromkeys(fields, check_text))


def read_mbpp(path: Path) -> dict[int, Row]:
  """Problems of `mbpp.jsonl` by their task_id."""
  fields = {
    "task_id": check_int,
    "text": check_text,
    "code": check_text,
    "test_setup_code": check_text,
    "test_list": check_texts,
  }
  try:
    return {row["task_id"]: row for row in _read_problems(path, fields)}
  except InputError as error:
    raise InputError(
      f"{error}; MBPP is read from mbpp.jsonl, not from its sanitized part,"
      " which has other fields"
    ) from error


def extract_code(completion: str) -> str:
  """Returns the program in a completion: up to [DONE], out of its fences."""
  text = stop_strings.cut(completion.replace("\r\n", "\n"), MBPP_STOP)
  return fences.find_program(text.rpartition("[BEGIN]")[2])


def _read_problems(path: Path, fields: Mapping[str, files.Check]) -> list[Row]:
  """Rows of a file of JSON lines, with line ends as "\\n" in their texts."""
  problems = [row for _, row in files.read_json_lines(path, fields)]
  for problem in problems:
    for name, value in problem.items():
      if isinstance(value, str):
        problem[name] = value.replace("\r\n", "\n")
  if not problems:
    raise InputError(f"{path}: it is empty")
  return problems
