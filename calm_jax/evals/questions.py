"""Questions whose answers are judged by exact match, from a jsonl file."""

import dataclasses
from pathlib import Path

import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import check_text
from calm_jax.core.typed_fields import Seed
from calm_jax.evals import base
from calm_jax.evals.base import Evaluation, Judgement, Prompt, Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions(base.Options):
  """Each line's "prompt", of which the whole "completion" is the answer.

  Spaces around an answer do not count, and a line's end ends it. `shots`
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
    shown = [prompt + completion for prompt, completion in pool]
    questions = []
    for number, (prompt, _) in enumerate(items):
      rng = np.random.default_rng((self.seed, number))
      order = rng.permutation(len(pool)).tolist()
      places = [i for i in order if pool[i][0] != prompt][: self.shots]
      questions.append(Question(prompt, {i: shown[i] for i in places}))

    def judge(prompts: list[Prompt], outputs: list[str]) -> Judgement:
      rows = []
      answers = zip(prompts, items, outputs, strict=True)
      for prompt, (_, right), output in answers:
        row = {"prompt": prompt.text, "exemplars": prompt.exemplars}
        row |= {"completion": right.strip(), "prediction": output.strip()}
        rows.append(row | {"correct": right.strip() == output.strip()})
      return base.judge_correct(rows)

    return Evaluation(
      task="questions",
      group=self.group,
      subset=self.subset,
      metric="accuracy",
      examples=len(items),
      shots=self.shots,
      max_new_tokens=self.max_new_tokens,
      stop=("\n",),
      questions=questions,
      judge=judge,
    )


def _read(path: str) -> list[tuple[str, str]]:
  fields = {"prompt": check_text, "completion": check_text}
  lines = files.read_json_lines(Path(path), fields)
  return [(row["prompt"], row["completion"]) for _, row in lines]
