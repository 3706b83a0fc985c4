"""Tokenizers of the models of a run: loaded, shared, or trained by the run."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from calm_jax.core.errors import InputError
from calm_jax.core.typed_fields import Count
from calm_jax.data.examples import TextExample
from calm_jax.experiments.base import Models
from calm_jax.text.tokenizer import Tokenizer, train_sentencepiece

_SIDES = ("anchor", "augmenting")
# The end of a line; and digits that begin a word, so that a model that reads up
# to a number is about to say its first digit, not a space.
_SYMBOLS = ["\n", *(f"\u2581{digit}" for digit in range(10))]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A tokenizer to train: so many pieces, on the sources of these names."""

  pieces: Count
  sources: tuple[str, ...]
  # Further texts that are a token each, such as the tabs of programs, which
  # SentencePiece does not learn.
  symbols: tuple[str, ...] = ()


def make(
  vocabularies: Mapping[str, Vocabulary],
  loaded: Models,
  texts: Mapping[str, Iterable[TextExample]],
  workdir: Path,
) -> dict[str, Tokenizer]:
  """Gives each side of a composition its tokenizer.

  It is that of a model that is loaded, or the one that is asked for, which is
  written into `workdir`; a model without either reads the other one's tokens.

  Args:
    vocabularies: by side: "anchor", "augmenting" for all fresh augmenting
      models, or "augmenting/<name>" for one of several.
    loaded: the models that are not trained from scratch, by side.
    texts: the sources that vocabularies name.
  """
  tokenizers = {
    side: model.text()
    for side, model in loaded.items()
    # Another model without a tokenizer reads the anchor's tokens.
    if side == "anchor" or model.tokenizer is not None
  }
  for side, wanted in vocabularies.items():
    if side.partition("/")[0] not in _SIDES:
      raise InputError(f"a tokenizer of {side!r}; the sides are {_SIDES}")
    if side in loaded:
      continue
    examples = [e for name in wanted.sources for e in texts[name]]
    tokenizers[side] = train_sentencepiece(
      [line for e in examples for line in _lines(e)],
      workdir / f"tokenizer_{side.replace('/', '_')}",
      vocab_size=wanted.pieces,
      user_defined_symbols=[*_SYMBOLS, *wanted.symbols],
    )
  if not tokenizers:
    for model in loaded.values():
      model.text()  # Raises, as it has none.
    raise InputError(
      "no model: give --config.anchor= and --config.augmenting= a folder or "
      "a hub id"
    )
  side = "anchor" if "anchor" in tokenizers else next(iter(tokenizers))
  return dict.fromkeys(_SIDES, tokenizers[side]) | tokenizers


def _lines(example: TextExample) -> list[str]:
  return (example.prompt + example.completion).splitlines()
