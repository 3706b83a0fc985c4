"""Types that all evaluations share: they ask prompts and judge the answers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from calm_jax.core.typed_fields import Count
from calm_jax.evals import statistics

# An example of a file of predictions: its inputs, outputs and score.
Row = dict[str, Any]
# Texts to their continuations.
Generate = Callable[[list[str]], list[str]]
# Whether a prompt is short enough for the model.
Fits = Callable[[str], bool]
SEPARATOR = "\n\n"  # between exemplars


class Prompt(NamedTuple):
  """A prompt, and the places in the pool of the exemplars in it."""

  text: str
  exemplars: list[int]


class Question(NamedTuple):
  """A question, and the exemplars before it by their places in the pool."""

  text: str
  exemplars: dict[int, str]

  def prompt(self, fits: Fits) -> Prompt:
    """Puts the question after the last exemplars that fit."""
    places = list(self.exemplars)
    while True:
      shown = [self.exemplars[place] for place in places]
      text = SEPARATOR.join([*shown, self.text])
      if not places or fits(text):
        return Prompt(text, places)
      places = places[1:]


@dataclasses.dataclass(frozen=True)
class Judgement:
  """A metric of a model's answers, and the rows that it can be traced to.

  The metric is a function of the sum of each example's parts; see `statistics`.
  """

  value: float  # in percent
  rows: list[Row]  # one an answer, with its "prompt", "prediction" and "score"
  parts_NS: np.ndarray
  metric: statistics.Metric
  note: str = ""  # to print beside the value, such as sacrebleu's signature
  # Further numbers for results.json.
  measures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """A test set and how answers to it are judged."""

  task: str  # one of `tasks.KINDS`
  group: str  # the benchmark
  subset: str = ""  # the language in it, if any
  metric: str
  examples: int
  shots: int = 0  # asked for; a prompt has fewer where they do not fit
  max_new_tokens: int
  stop: tuple[str, ...]  # texts that end an answer
  questions: list[Question]
  # Judges the answers to the prompts of all questions.
  judge: Callable[[list[Prompt], list[str]], Judgement]

  def prompts(self, fits: Fits) -> list[Prompt]:
    """Makes the prompts, with as many exemplars as fit."""
    return [question.prompt(fits) for question in self.questions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of every evaluation, of the first `limit` examples; 0 for all.

  `group` names the benchmark, `path` the file or folder of the test set.
  """

  group: str
  path: str
  max_new_tokens: Count
  limit: int = 0


def judge_correct(rows: list[Row]) -> Judgement:
  """Share of the rows whose "correct" is true, in percent."""
  rows = [row | {"score": 100.0 * row["correct"]} for row in rows]
  parts_N1 = np.array([[row["score"]] for row in rows])
  mean = statistics.mean_of(len(rows))
  return Judgement(float(mean(parts_N1.sum(0))), rows, parts_N1, mean)
