"""Words of a lexicon that D_C never showed, asked for their translations."""

import dataclasses
from pathlib import Path

import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.core.typed_fields import Fraction, Seed
from calm_jax.data import examples, records
from calm_jax.evals import base, fewshot, questions
from calm_jax.evals.base import Evaluation, Question

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
    ask = self.prompt.replace
    return questions.exact_match(
      self,
      [Question(ask("{source}", word), {}) for word in words],
      [sorted(translations) for translations in words.values()],
      task="lexicon",
      subset=self.language,
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
