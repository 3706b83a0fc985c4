"""Questions whose answers are judged by exact match, from a jsonl file."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import check_text
from calm_jax.core.typed_fields import Seed
from calm_jax.evals import base
from calm_jax.evals.base import Evaluation, Judgement, Prompt, Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions(base.Options):
  """Each line's "prompt", of which the whole "completion" is the answer.

  Spaces around an answer do not count, and a line's end ends it. Tables say how
  often the most frequent answer to each kind of question is right. `shots`
  exemplars are drawn for each question from the others in the file `pool`.
  """

  subset: str = ""
  pool: str = ""
  shots: int = 0
  seed: Seed = 0  # of drawing exemplars

  def evaluation(self) -> Evaluation:
    """Reads the files; InputError if they are not as they must be."""
    items = _read(self.path)[: self.limit or None]
    pool = _read(self.pool) if self.shots else []
    shown = [row["prompt"] + row["completion"] for row in pool]
    questions = []
    for number, item in enumerate(items):
      rng = np.random.default_rng((self.seed, number))
      order = rng.permutation(len(pool)).tolist()
      others = [i for i in order if pool[i]["prompt"] != item["prompt"]]
      places = others[: self.shots]
      questions.append(Question(item["prompt"], {i: shown[i] for i in places}))
    return exact_match(
      self,
      questions,
      [[item["completion"].strip()] for item in items],
      f"a constant answer {self.subset}: {_constant(items):.1f}",
      task="questions",
      subset=self.subset,
      shots=self.shots,
    )


def exact_match(
  options: base.Options,
  questions: list[Question],
  answers: list[list[str]],
  note: str = "",
  **fields: Any,
) -> Evaluation:
  """Makes an evaluation of questions, each with one or several right answers.

  The note is of its judgements, the fields are others of `Evaluation`.
  """

  def judge(prompts: list[Prompt], outputs: list[str]) -> Judgement:
    rows = []
    for prompt, right, output in zip(prompts, answers, outputs, strict=True):
      given = output.strip()
      row = {"prompt": prompt.text, "exemplars": prompt.exemplars}
      row |= {"completion": " | ".join(right), "prediction": given}
      rows.append(row | {"correct": given in right})
    return dataclasses.replace(base.judge_correct(rows), note=note)

  return Evaluation(
    group=options.group,
    metric="accuracy",
    examples=len(questions),
    max_new_tokens=options.max_new_tokens,
    stop=("\n",),
    questions=questions,
    judge=judge,
    **fields,
  )


def _read(path: str) -> list[dict[str, Any]]:
  fields = {"prompt": check_text, "completion": check_text}
  return [row for _, row in files.read_json_lines(Path(path), fields)]


def _constant(items: list[dict[str, Any]]) -> float:
  """The accuracy in % of the most frequent answer to each kind of question.

  Kinds are the values of "attribute", where lines have it.
  """
  counts: dict[str, collections.Counter] = {}
  for item in items:
    kind = counts.setdefault(item.get("attribute", ""), collections.Counter())
    kind[item["completion"].strip()] += 1
  most = sum(max(kind.values()) for kind in counts.values())
  return 100 * most / max(len(items), 1)
