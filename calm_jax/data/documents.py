"""Text examples as segments of tokens that fit a row, for all tokenizers.

An example is tokenised as BOS + prompt + completion + EOS, as far as the
tokenizer has them; a BOS that the text begins with is that one. Plain text (an
empty prompt) longer than a row goes on in windows, each of which starts with
the last token of the one before, so that every token is a target once. An
example with a prompt has one window only.

A conversation is tokenised by the chat template, which writes the special
tokens itself (`text.chat`). It becomes one document, or one for each answer.
"""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from calm_jax.core.errors import InputError, check_choice
from calm_jax.data.examples import TextExample
from calm_jax.data.packing import host_rows
from calm_jax.text import chat
from calm_jax.text.alignment import AlignedReader, ChunkEncoder
from calm_jax.text.tokenizer import Tokenizer

TOO_LONG = ("error", "cut", "drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions:
  """Tokenizers, shape and order of the rows that text examples become.

  Attributes:
    tokenizer: of the model to train, or of a composition's anchor.
    batch_size: B, rows of the global batch.
    length: L, slots of a row.
    seed: the rows come in an endless random order, another one each epoch,
      and the examples are shuffled before they are packed. None: one pass in
      order, the last batch filled up with empty rows.
    pack: fill rows with consecutive examples; else one example a row.
    too_long: what becomes of an example with a prompt, or a conversation, that
      is longer than a row: "error"; "cut", its completion loses its end, and it
      is dropped if nothing is left of that; "drop". `TextSource.truncation`
      counts them.
    augmenting: by name, the encoders of augmenting models with other tokens.
    augmenting_length: M, slots of a row of theirs; 0 for what the longest
      row needs.
    augmenting_limits: by name, how many tokens of one text each of them reads.
    answers_apart: whether each answer of a conversation is an example by
      itself, for models that see by where a prompt ends; always so with
      `augmenting`.
  """

  tokenizer: Tokenizer
  batch_size: int
  length: int
  seed: int | None
  pack: bool = True
  too_long: str = "error"
  augmenting: Mapping[str, ChunkEncoder] = dataclasses.field(
    default_factory=dict
  )
  augmenting_length: int = 0
  augmenting_limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
  answers_apart: bool = False
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self):
    check_choice("too_long", self.too_long, TOO_LONG)
    if self.length < 2:
      raise InputError(f"length {self.length}: a row needs at least 2 slots")
    _ = self.share  # Raises where the processes cannot share the rows.

  def segment_limit(self, name: str) -> int:
    """The tokens of an augmenting model that a segment may have."""
    limits = self.augmenting_length, self.augmenting_limits.get(name, 0)
    return min((limit for limit in limits if limit), default=sys.maxsize)

  @property
  def share(self) -> slice:
    """The rows of the global batch that this process takes."""
    return host_rows(self.batch_size, self.process_index, self.process_count)


@dataclasses.dataclass(frozen=True)
class Truncation:
  """Counts of examples that are too long for a row, and of their tokens."""

  examples: int  # all of them
  tokens: int  # all of theirs, in the anchor's
  # Plain texts that go on in further windows, and the tokens there.
  split: tuple[int, int] = (0, 0)
  # Completions that lost their end, and the tokens that they lost.
  cut: tuple[int, int] = (0, 0)
  # Examples that were left out, and their tokens.
  dropped: tuple[int, int] = (0, 0)

  def __str__(self) -> str:
    kinds = {
      "go on in further windows": self.split,
      "lost the end of their completion": self.cut,
      "were dropped": self.dropped,
    }
    texts = [
      f"{count:,} {what} ({tokens:,} tokens)"
      for what, (count, tokens) in kinds.items()
      if count
    ]
    which = ", ".join(texts) or "none too long for a row"
    return f"{self.examples:,} examples of {self.tokens:,} tokens, {which}"


class Segment(NamedTuple):
  """An example, or a window of one, that fits a row."""

  tokens: np.ndarray  # int32, of the anchor
  prompt_length: int  # of what is before the first answer, at least 1
  origin: str
  # By name the tokens that an augmenting model reads, and for each of `tokens`
  # how many of those it sees.
  augmenting: dict[str, tuple[np.ndarray, np.ndarray]]
  # Of a conversation, for each token whether it is learnt.
  learnt: np.ndarray | None = None


class _Document(NamedTuple):
  """A tokenised example."""

  example: TextExample
  tokens: np.ndarray
  prompt_length: int  # of BOS and prompt, 0 if there is neither
  learnt: np.ndarray | None = None  # of a conversation


def make_segments(
  examples: Sequence[TextExample], options: RowOptions, seed: int | None
) -> tuple[list[Segment], Truncation]:
  """Tokenises examples, at least one, and makes them fit their rows.

  `seed` is that of their order; None keeps it. InputError is raised if an
  example with a prompt is too long and `options` make that an error, if all
  were dropped, or if an example has nothing to predict.
  """
  fitted: list[list[Segment]] = []
  lost: dict[str, list[int]] = {"split": [], "cut": [], "dropped": []}
  refused: list[_Document] = []
  num_tokens = 0
  for example in examples:
    try:
      documents = _tokenise(example, options)
      pieces = [_windows(document, options) for document in documents]
    except InputError as error:
      raise InputError(f"{example.origin}: {error}") from error
    for document, windows in zip(documents, pieces, strict=True):
      total, kept = len(document.tokens), len(windows[0].tokens)
      num_tokens += total
      if kept < total:
        if example.is_plain:
          lost["split"].append(total - kept)
        elif options.too_long == "error":
          refused.append(document)
        elif options.too_long == "cut" and kept > document.prompt_length:
          lost["cut"].append(total - kept)
        else:
          lost["dropped"].append(total)
          windows = []
      fitted.append(windows)
  if refused:
    excess = f"{refused[0].example.origin}: {_excess(refused[0], options)}"
    more = f" (and {len(refused) - 1:,} more)" if len(refused) > 1 else ""
    raise InputError(
      f"{excess}{more}; raise that length if the models read more, have"
      " too_long cut or drop such examples, or shorten or remove them"
    )
  if seed is not None:
    # Neighbours in a file are often alike and would share their rows.
    order = np.random.default_rng(seed).permutation(len(fitted))
    fitted = [fitted[i] for i in order]
  segments = list(itertools.chain(*fitted))
  if not segments:
    raise InputError(
      f"all {len(examples):,} examples are longer than a row of"
      f" {options.length} and were dropped; raise length"
    )
  counts = {kind: (len(each), sum(each)) for kind, each in lost.items()}
  return segments, Truncation(len(examples), num_tokens, **counts)


def _tokenise(example: TextExample, options: RowOptions) -> list[_Document]:
  """The document of an example; of a conversation perhaps several."""
  tokenizer = options.tokenizer
  if example.messages:
    apart = options.answers_apart or bool(options.augmenting)
    made = chat.conversations(tokenizer, example.messages, apart)
    return [
      _Document(
        example,
        np.array(tokenizer.check(ids), np.int32),
        learnt.index(True),
        np.array(learnt),
      )
      for ids, learnt in made
    ]
  given, new = tokenizer.encode_pair(example.prompt, example.completion)
  eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  ids = np.array(tokenizer.check(given + new + eos), np.int32)
  if len(ids) < 2:
    raise InputError(
      f"{len(ids)} tokens, so there is nothing to predict; remove it"
    )
  return [_Document(example, ids, len(given))]


def texts(example: TextExample, tokenizer: Tokenizer) -> tuple[str, str]:
  """The prompt and completion of an example; of a conversation those of its
  last answer, as the chat template writes them."""
  if not example.messages:
    return example.prompt, example.completion
  roles = [message["role"] for message in example.messages]
  end = len(roles) - roles[::-1].index(chat.ASSISTANT)
  prompt, answer = chat.answered(tokenizer, example.messages[:end])
  return prompt, answer.removesuffix(chat.frame(tokenizer).after)


def _windows(document: _Document, options: RowOptions) -> list[Segment]:
  """All windows of plain text; of an example with a prompt, its beginning."""
  windows = [_window(document, 0, options)]
  # One token of overlap: the first of a window is nobody's target there.
  start = len(windows[0].tokens) - 1
  while start < len(document.tokens) - 1 and document.example.is_plain:
    windows.append(_window(document, start, options))
    start += len(windows[-1].tokens) - 1
  return windows


def _window(document: _Document, start: int, options: RowOptions) -> Segment:
  """The longest segment from token `start` on that fits all models' rows."""
  tokens = document.tokens[start : start + options.length]
  given = document.prompt_length if start == 0 else 0
  size, aligned = len(tokens), {}
  for name, encoder in options.augmenting.items():
    reader = AlignedReader(options.tokenizer, encoder)
    ids, visible = map(np.array, reader.read(tokens.tolist(), given))
    aligned[name] = ids, visible
    limit = options.segment_limit(name)
    size = min(size, int(np.searchsorted(visible, limit, "right")))
  if size < 2 and document.example.is_plain:
    raise InputError(
      f"{_excess(document, options)}; raise augmenting_length if the model"
      " reads more, or shorten or remove the example"
    )
  return Segment(
    tokens[:size],
    max(given, 1),  # Without a BOS nothing predicts the first token.
    document.example.origin,
    {
      # Without a token of the anchor's, nothing is seen.
      name: (ids[: visible[size - 1]] if size else ids[:0], visible[:size])
      for name, (ids, visible) in aligned.items()
    },
    None if document.learnt is None else document.learnt[:size],
  )


def _excess(document: _Document, options: RowOptions) -> str:
  """Says for which model, and by how much, a document is too long."""
  count = len(document.tokens)
  if not document.example.is_plain and count > options.length:
    return f"{count} tokens with its prompt, and a row has {options.length}"
  limit = min(map(options.segment_limit, options.augmenting))
  return f"the augmenting model reads more than {limit} tokens beside it"
