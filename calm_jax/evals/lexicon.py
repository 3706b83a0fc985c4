"""Words of a lexicon that D_C never showed, asked for their translations."""

import dataclasses
from pathlib import Path

import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.core.typed_fields import Fraction, Seed
from calm_jax.data import examples, records
from calm_jax.evals import base, fewshot
from calm_jax.evals.base import Evaluation, Judgement, Prompt, Question

COLUMNS = ("source", "target")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lexicon(base.Options):
  """Translation of single words, such as those of GATITOS, by exact match.

  `path` is a tsv file with a word and its translation in each line; a word
  with several lines has several right answers. The words that are asked are
  `limit` random ones; those that `shown` of the lines have, D_C's fraction of
  the same file at the run's seed, are never asked.
  """

  prompt: str  # with {source} for the word
  language: str = ""
  rows: str = ""  # a slice of the lines, such as ":1000"
  shown: Fraction = 0.0
  seed: Seed = 0  # the run's

  def evaluation(self) -> Evaluation:
    """Reads the file; InputError if it is not as it must be."""
    words = self._words()
    answers = [sorted(words[word]) for word in words]

    def judge(prompts: list[Prompt], outputs: list[str]) -> Judgement:
      rows = []
      for prompt, right, output in zip(prompts, answers, outputs, strict=True):
        row = {"prompt": prompt.text, "completion": " | ".join(right)}
        row |= {"prediction": output.strip()}
        rows.append(row | {"correct": output.strip() in right})
      return base.judge_correct(rows)

    return Evaluation(
      task="lexicon",
      group=self.group,
      subset=self.language,
      metric="accuracy",
      examples=len(words),
      max_new_tokens=self.max_new_tokens,
      stop=("\n",),
      questions=[
        Question(self.prompt.replace("{source}", word), {}) for word in words
      ],
      judge=judge,
    )

  def _words(self) -> dict[str, set[str]]:
    """The words to ask, each with its translations."""
    lines = files.read_entries(records.table(Path(self.path), COLUMNS, "\t"))
    pairs = [(line["source"], line["target"]) for _, line in lines]
    pairs = fewshot.take(pairs, self.rows)
    words: dict[str, set[str]] = {}
    for word, translation in pairs:
      words.setdefault(word, set()).add(translation)
    if self.shown:
      for word, _ in examples.take_fraction(pairs, self.shown, self.seed):
        words.pop(word, None)
    if not words:
      raise InputError(f"{self.path} has no word that was not shown")
    order = np.random.default_rng(self.seed).permutation(list(words))
    return {str(word): words[word] for word in order[: self.limit or None]}
