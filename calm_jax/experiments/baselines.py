"""Ways to use two models together that train nothing.

They answer prompts as a `LanguageModel` does, greedily.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.data.examples import TextExample
from calm_jax.evals.base import SEPARATOR
from calm_jax.evals.suite import TextModel
from calm_jax.experiments.base import Models
from calm_jax.language_model import LanguageModel
from calm_jax.text import stop_strings


def make(
  models: Models, exemplars: Sequence[TextExample], ensemble: bool
) -> dict[str, TextModel]:
  """The baselines of an "anchor" and an "augmenting" model, by column.

  There is none of pasted text without exemplars, and none at all without both
  models.
  """
  if not models.keys() >= {"anchor", "augmenting"}:
    return {}
  pair = models["anchor"], models["augmenting"]
  made: dict[str, TextModel] = {}
  if exemplars:
    made["pasted"] = PastedText(*pair, exemplars)
  if ensemble:
    made["ensemble"] = Ensemble(pair)
  return made


@dataclasses.dataclass(frozen=True)
class PastedText:
  """The anchor, with the augmenting model's answer pasted into its prompt.

  Exemplars before each prompt show a note with the right answer, a question,
  and that answer.
  """

  anchor: LanguageModel
  augmenting: LanguageModel
  exemplars: Sequence[TextExample]

  def generate(
    self, prompts: list[str], max_new_tokens: int, *, stop, batch_size: int
  ) -> list[str]:
    """Continues prompts; `stop` also ends the note."""
    notes = self.augmenting.generate(
      prompts, max_new_tokens, stop=stop, batch_size=batch_size
    )
    shown = [
      _with_note(e.completion, e.prompt) + e.completion for e in self.exemplars
    ]
    pasted = [
      SEPARATOR.join([*shown, _with_note(note, prompt)])
      for note, prompt in zip(notes, prompts, strict=True)
    ]
    return self.anchor.generate(
      pasted, max_new_tokens, stop=stop, batch_size=batch_size
    )


def _with_note(note: str, prompt: str) -> str:
  return f"Note: {note.strip()}\n{prompt}"


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """Models of the same tokens, whose log-probabilities are averaged."""

  models: Sequence[LanguageModel]

  def __post_init__(self):
    if len({model.text().fingerprint for model in self.models}) > 1:
      raise InputError(
        "an ensemble averages the probabilities of the same tokens, and these "
        "models read different ones: set task.ensemble=False"
      )

  def generate(
    self, prompts: list[str], max_new_tokens: int, *, stop, batch_size: int
  ) -> list[str]:
    """Continues prompts, with a whole forward pass for each token."""
    made: list[str] = []
    for first in range(0, len(prompts), batch_size):
      rows = prompts[first : first + batch_size]
      made += self._continue(rows, max_new_tokens, stop)
    return made

  def _continue(self, prompts: list[str], max_new_tokens: int, stop):
    tokenizer = self.models[0].text()
    given = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    longest = max(map(len, given)) + max_new_tokens
    # What is to the right of a token does not reach it.
    tokens_BL = np.zeros((len(given), longest), np.int32)
    for row, ids in zip(tokens_BL, given, strict=True):
      row[: len(ids)] = ids
    lengths_B = np.array([len(ids) for ids in given])
    rows_B = np.arange(len(given))
    for new in range(max_new_tokens):
      at_B = lengths_B + new
      scores = [
        jax.nn.log_softmax(model.logits(tokens_BL)[rows_B, at_B - 1])
        for model in self.models
      ]
      tokens_BL[rows_B, at_B] = np.asarray(sum(scores)).argmax(-1)
    answers = []
    for ids, row in zip(given, tokens_BL.tolist(), strict=True):
      new = row[len(ids) : len(ids) + max_new_tokens]
      ends = [at for at, i in enumerate(new) if i in tokenizer.stop_ids]
      text = tokenizer.decode_continuation(ids, new[: min([*ends, len(new)])])
      answers.append(stop_strings.cut(text, stop))
    return answers
