"""The kinds of evaluation that a config can name (§4).

Each reads its files at once, before a model is run.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.evals import (
  chrf,
  code_execution,
  code_to_text,
  fewshot,
  maths,
  statistics,
  translation,
)
from calm_jax.evals.base import Generate, Outcome
from calm_jax.sandbox import runner

Fits = Callable[[str], bool]
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A test set and how answers to it are judged.

  Attributes:
    task: the kind, as in KINDS.
    group: the benchmark; a table is made of a group.
    subset: the language, empty where there are none.
    metric: which of the outcome's is reported, in percent.
    examples: how many there are.
    shots: exemplars asked for.
    max_new_tokens: of an answer.
    stop: texts that end an answer.
    run: the outcome of a model; `Fits` says which prompts are short enough.
    judged: what each row adds to the metric's sums, and the metric of those.
  """

  task: str
  group: str
  subset: str
  metric: str
  examples: int
  shots: int
  max_new_tokens: int
  stop: tuple[str, ...]
  run: Callable[[Generate, Fits], Outcome]
  judged: Callable[[Rows], tuple[np.ndarray, statistics.Metric]]

  @property
  def name(self) -> str:
    """Of files: the group and the subset."""
    parts = [part for part in (self.group, self.subset) if part]
    return "-".join(parts).lower()


def make(settings: Mapping[str, Any]) -> Evaluation:
  """Reads what a config's evaluation asks for.

  Args:
    settings: "kind", one of KINDS, and arguments of its function.

  Raises:
    InputError: an unknown kind, a wrong argument, or a file that is not as it
      must be.
  """
  kind = settings.get("kind")
  if kind not in KINDS:
    raise InputError(f"evaluation kind {kind!r} is none of {list(KINDS)}")
  given = {k: v for k, v in settings.items() if k != "kind"}
  takes = _keywords(KINDS[kind])
  unknown = sorted(given.keys() - takes.keys())
  missing = [k for k, p in takes.items() if p.default is p.empty]
  missing = [k for k in missing if k not in given]
  if unknown or missing:
    raise InputError(
      f"an evaluation of kind {kind!r}: it does not take {unknown}, and lacks "
      f"{missing}; it takes {list(takes)}"
    )
  return KINDS[kind](**given)


def _keywords(function: Callable) -> dict[str, inspect.Parameter]:
  """What a kind takes; **options are those of `_few_shot`."""
  own = inspect.signature(function).parameters
  found = {k: p for k, p in own.items() if p.kind == p.KEYWORD_ONLY}
  return _keywords(_few_shot) | found if "options" in own else found


def _few_shot(
  task: str,
  evaluator: Callable[..., Outcome],
  metric: str,
  items: list,
  pool: list,
  *,
  group: str,
  shots: int,
  max_new_tokens: int,
  language: str = "",
  limit: int = 0,
  seed: int = 0,
  prompt: str = "",
) -> Evaluation:
  """Of an evaluator that draws exemplars; its own prompt file if none."""
  items, prompt = _first(items, limit), prompt or task
  return Evaluation(
    task,
    group,
    language,
    metric,
    len(items),
    shots,
    max_new_tokens,
    (fewshot.load_template(prompt).stop,),
    lambda generate, fits: evaluator(
      items, pool, generate, shots=shots, seed=seed, prompt=prompt, fits=fits
    ),
    _by_counts if metric == "chrf1" else _by_share,
  )


def _translation(
  *,
  language: str,
  path: str,
  target: str = "",
  rows: str = "",
  pool_rows: str = "",
  **options,
) -> Evaluation:
  """Into English: FLORES-200 at `path`; with `target` two aligned files.

  Of aligned files `rows` ("6000:") are the test set, and `pool_rows` what the
  exemplars are drawn from.
  """
  if target:
    items, pool = (
      translation.read_pairs(path, target, language, part)
      for part in (rows, pool_rows)
    )
  else:
    items, pool = (
      translation.read_flores(path, language, split)
      for split in ("devtest", "dev")
    )
  run = translation.translation
  options["language"] = language
  return _few_shot("translation", run, "chrf1", items, pool, **options)


def _maths(*, path: str, pool: str, **options) -> Evaluation:
  """GSM8K or MGSM; exemplars are drawn from the file `pool`."""
  items, exemplars = maths.read_gsm(path), maths.read_gsm(pool)
  run = maths.maths
  return _few_shot("maths", run, "accuracy", items, exemplars, **options)


def _code_to_text(
  *, path: str, pool: str, rows: str = "", pool_rows: str = "", **options
) -> Evaluation:
  """CodeXGLUE code-to-text; exemplars are drawn from the file `pool`."""
  items, exemplars = (
    fewshot.take_rows(code_to_text.read_codexglue(file), part)
    for file, part in ((path, rows), (pool, pool_rows))
  )
  run = code_to_text.code_to_text
  return _few_shot("code_to_text", run, "chrf1", items, exemplars, **options)


def _mbpp(
  *,
  group: str,
  path: str,
  allow_code_execution: bool,
  max_new_tokens: int,
  limit: int = 0,
) -> Evaluation:
  """MBPP's test split, 3-shot, pass@1."""
  runner.require(allow_code_execution)
  problems = code_execution.read_mbpp(Path(path))
  task_ids = _first(list(code_execution.MBPP_TEST), limit)
  return Evaluation(
    "mbpp",
    group,
    "",
    "pass@1",
    len(task_ids),
    len(code_execution.MBPP_SHOTS),
    max_new_tokens,
    code_execution.MBPP_STOP,
    lambda generate, fits: code_execution.mbpp(
      problems,
      generate,
      fits=fits,
      allow_code_execution=allow_code_execution,
      task_ids=task_ids,
    ),
    _by_share,
  )


def _humaneval(
  *,
  group: str,
  path: str,
  allow_code_execution: bool,
  max_new_tokens: int,
  limit: int = 0,
) -> Evaluation:
  """HumanEval, zero-shot, pass@1."""
  runner.require(allow_code_execution)
  problems = _first(code_execution.read_humaneval(Path(path)), limit)
  return Evaluation(
    "humaneval",
    group,
    "",
    "pass@1",
    len(problems),
    0,
    max_new_tokens,
    code_execution.HUMANEVAL_STOP,
    lambda generate, _: code_execution.humaneval(
      problems, generate, allow_code_execution=allow_code_execution
    ),
    _by_share,
  )


KINDS = {
  "translation": _translation,
  "maths": _maths,
  "code_to_text": _code_to_text,
  "mbpp": _mbpp,
  "humaneval": _humaneval,
}
# Of these a config must allow that what the models write is run.
RUN_CODE = ("mbpp", "humaneval")


def _first(items: list, limit: int) -> list:
  """All items for a limit of 0."""
  return items[:limit] if limit else items


def _by_share(rows: Rows) -> tuple[np.ndarray, statistics.Metric]:
  right = np.array([[score(row)] for row in rows])
  return right, statistics.mean_of(len(rows))


def _by_counts(rows: Rows) -> tuple[np.ndarray, statistics.Metric]:
  predictions, wanted = (
    [row[key] for row in rows] for key in ("prediction", "completion")
  )
  return chrf.chrf1(predictions, wanted).counts, chrf.of_counts


def score(row: dict[str, Any]) -> float:
  """Of one example, in percent."""
  return row["chrf1"] if "chrf1" in row else 100.0 * row["correct"]
