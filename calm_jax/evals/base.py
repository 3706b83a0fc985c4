"""Types that all evaluations share: they ask prompts and judge the answers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from calm_jax.evals import statistics

# An example of a file of predictions: its inputs, outputs and score.
Row = dict[str, Any]
# Texts to their continuations.
Generate = Callable[[list[str]], list[str]]
# Whether a prompt is short enough for the model.
Fits = Callable[[str], bool]


class Prompt(NamedTuple):
  """A prompt, and the places in the pool of the exemplars in it."""

  text: str
  exemplars: list[int]


@dataclasses.dataclass(frozen=True)
class Judgement:
  """A metric of a model's answers, and the rows that it can be traced to.

  Attributes:
    value: in percent.
    rows: one for each answer, with its "prompt", "prediction" and "score".
    parts_NS, metric: the summands of each example, and the function of their
      sum that is `value`, see `statistics`.
    note: text to print beside the value, such as sacrebleu's signature.
    measures: further numbers for results.json.
  """

  value: float
  rows: list[Row]
  parts_NS: np.ndarray
  metric: statistics.Metric
  note: str = ""
  measures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """A test set and how answers to it are judged.

  Attributes:
    task: the kind, one of `tasks.KINDS`.
    group, subset: the benchmark, and the language in it, if any.
    metric: the name of the metric.
    examples: their number.
    shots: exemplars asked for; a prompt has fewer where they do not fit.
    stop: texts that end an answer.
    prompts: makes the prompts, with as many exemplars as fit.
    judge: judges the answers to these prompts, in the same order.
  """

  task: str
  group: str
  subset: str = ""
  metric: str
  examples: int
  shots: int = 0
  max_new_tokens: int
  stop: tuple[str, ...]
  prompts: Callable[[Fits], list[Prompt]]
  judge: Callable[[list[Prompt], list[str]], Judgement]


def judge_correct(rows: list[Row]) -> Judgement:
  """Share of the rows whose "correct" is true, in percent."""
  rows = [row | {"score": 100.0 * row["correct"]} for row in rows]
  parts_N1 = np.array([[row["score"]] for row in rows])
  mean = statistics.mean_of(len(rows))
  return Judgement(float(mean(parts_N1.sum(0))), rows, parts_N1, mean)
