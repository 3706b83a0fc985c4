"""Text examples as token segments that fit a row, for one or two tokenizers."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.data.packing import TokenLists
from calm_jax.text.alignment import ChunkEncoder, align, prompt_ends
from calm_jax.text.tokenizer import Tokenizer


class TextLike(Protocol):
  """A `TextExample`, or an example of `calm_jax.data.arithmetic`."""

  prompt: str
  completion: str
  origin: str


@dataclasses.dataclass(frozen=True)
class Truncation:
  """What was too long for a row, and what became of it; tokens of the anchor.

  Attributes:
    examples, tokens: all that there were.
    split, split_tokens: plain texts that go on in further windows, and how many
      tokens stand in those.
    cut, cut_tokens: examples whose completion lost its end, and how much.
    dropped, dropped_tokens: examples left out, and their tokens.
  """

  examples: int
  tokens: int
  split: int = 0
  split_tokens: int = 0
  cut: int = 0
  cut_tokens: int = 0
  dropped: int = 0
  dropped_tokens: int = 0

  def __str__(self) -> str:
    found = [
      f"{count:,} {what} ({tokens:,} tokens)"
      for count, tokens, what in (
        (self.split, self.split_tokens, "go on in further windows"),
        (self.cut, self.cut_tokens, "lost the end of their completion"),
        (self.dropped, self.dropped_tokens, "were dropped"),
      )
      if count
    ]
    return f"{self.examples:,} examples of {self.tokens:,} tokens, " + (
      ", ".join(found) or "none too long for a row"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
  """N segments of tokenised text, one after the other.

  Attributes:
    anchor: the segments in the anchor's tokens.
    prompt_lengths_N: how many of those are BOS and prompt (at least 1).
    origins: where each came from.
    truncation: what was too long for a segment.
    augmenting: by name, in the tokens of augmenting models with other tokens.
    visible: by the same names, for each of the anchor's tokens the number of
      augmenting tokens of its segment that it may see.
  """

  anchor: TokenLists
  prompt_lengths_N: np.ndarray
  origins: tuple[str, ...]
  truncation: Truncation
  augmenting: dict[str, TokenLists]
  visible: dict[str, np.ndarray]


class _Document(NamedTuple):
  """A tokenised example; `given` of its tokens are BOS and prompt."""

  tokens: np.ndarray
  ends: np.ndarray | None  # bytes; None where nothing is to be aligned
  given: int
  example: TextLike


class _Piece(NamedTuple):
  """A segment: of an example's tokens, and (ids, visible) by model's name."""

  tokens: np.ndarray
  given: int
  origin: str
  read: dict[str, tuple[np.ndarray, np.ndarray]]


def segments(
  examples: Sequence[TextLike],
  tokenizer: Tokenizer,
  length: int,
  seed: int | None,
  augmenting: Mapping[str, ChunkEncoder],
  augmenting_length: int,
  too_long: str,
) -> Segments:
  """Tokenises examples and cuts plain text that is too long into windows.

  Args:
    examples: at least one.
    tokenizer: the anchor's.
    length: the longest segment.
    seed: of the order of the examples; theirs if None.
    augmenting: of the augmenting models with other tokens.
    augmenting_length: the longest segment of theirs; 0 for any.
    too_long: what becomes of an example with a prompt that is longer: "error",
      "cut" or "drop".

  Raises:
    InputError: an example with a prompt is too long, all were dropped, or an
      example has nothing to predict.
  """
  if too_long not in ("error", "cut", "drop"):
    raise InputError(f"too_long {too_long!r}: expected error, cut or drop")
  documents = [
    _tokenize(example, tokenizer, bool(augmenting)) for example in examples
  ]
  order = np.arange(len(documents))
  if seed is not None:
    # Neighbours in a file are often alike and would share their rows.
    order = np.random.default_rng(seed).permutation(len(documents))
  pieces: list[_Piece] = []
  counts: collections.Counter = collections.Counter()
  refused: dict[int, str] = {}
  for i in order:
    document = documents[i]
    found = _pieces(document, length, augmenting, augmenting_length)
    total, kept = len(document.tokens), len(found[0].tokens)
    if kept == total:
      pieces += found
    elif not document.example.prompt:
      pieces += found
      counts.update(split=1, split_tokens=total - kept)
    elif too_long == "error":
      refused[int(i)] = _why(document, length, augmenting_length)
    elif too_long == "cut" and kept > document.given:
      pieces += found
      counts.update(cut=1, cut_tokens=total - kept)
    else:
      counts.update(dropped=1, dropped_tokens=total)
  if refused:
    more = f" (and {len(refused) - 1:,} more)" if len(refused) > 1 else ""
    raise InputError(
      f"{refused[min(refused)]}{more}; raise that length, have too_long cut or"
      " drop such examples, or shorten or remove them"
    )
  if not pieces:
    raise InputError(
      f"all {len(documents):,} examples are longer than a row of {length} and"
      " were dropped; raise length"
    )
  tokens = sum(len(document.tokens) for document in documents)
  return Segments(
    anchor=_joined(piece.tokens for piece in pieces),
    prompt_lengths_N=np.array([piece.given for piece in pieces]),
    origins=tuple(piece.origin for piece in pieces),
    truncation=Truncation(len(documents), tokens, **counts),
    augmenting={
      name: _joined(piece.read[name][0] for piece in pieces)
      for name in augmenting
    },
    visible={
      name: np.concatenate([piece.read[name][1] for piece in pieces])
      for name in augmenting
    },
  )


def _joined(lists: Iterable[np.ndarray]) -> TokenLists:
  lists = list(lists)
  return TokenLists(
    np.concatenate(lists), np.array([len(ids) for ids in lists])
  )


def concatenate(parts: Sequence[Segments]) -> Segments:
  """Segments of several parts, with the same augmenting models, as one."""
  if len(parts) == 1:
    return parts[0]
  counts = [dataclasses.astuple(part.truncation) for part in parts]

  def join(lists: Sequence[TokenLists]) -> TokenLists:
    return TokenLists(
      np.concatenate([each.tokens for each in lists]),
      np.concatenate([each.lengths_N for each in lists]),
    )

  return Segments(
    anchor=join([part.anchor for part in parts]),
    prompt_lengths_N=np.concatenate([p.prompt_lengths_N for p in parts]),
    origins=tuple(origin for part in parts for origin in part.origins),
    truncation=Truncation(*map(sum, zip(*counts, strict=True))),
    augmenting={
      name: join([part.augmenting[name] for part in parts])
      for name in parts[0].augmenting
    },
    visible={
      name: np.concatenate([part.visible[name] for part in parts])
      for name in parts[0].visible
    },
  )


def _pieces(
  document: _Document,
  length: int,
  augmenting: Mapping[str, ChunkEncoder],
  augmenting_length: int,
) -> list[_Piece]:
  """The document in windows; of one with a prompt, the first that fits."""
  limit = augmenting_length or np.iinfo(np.int64).max
  example, total = document.example, len(document.tokens)
  pieces: list[_Piece] = []
  start = 0
  while start < total - 1:
    stop = min(start + length, total)
    windows = {
      name: _window(document, start, stop, encoder)
      for name, encoder in augmenting.items()
    }
    fits = [np.searchsorted(v, limit, "right") for _, v in windows.values()]
    size = min([stop - start, *map(int, fits)])
    if size < 2 and not example.prompt:
      raise InputError(
        f"{_why(document, total, augmenting_length)}; raise augmenting_length,"
        " or shorten or remove the example"
      )
    pieces.append(
      _Piece(
        document.tokens[start : start + size],
        document.given if start == 0 else 1,
        example.origin,
        {
          # Nothing is seen of a piece of no tokens.
          name: (ids[: visible[size - 1]] if size else ids[:0], visible[:size])
          for name, (ids, visible) in windows.items()
        },
      )
    )
    if example.prompt:
      break
    # One token of overlap: the first of a window is nobody's target there.
    start += size - 1
  return pieces


def _why(document: _Document, length: int, augmenting_length: int) -> str:
  """Says by how much a document is too long for its row."""
  origin, count = document.example.origin, len(document.tokens)
  if count > length:
    return f"{origin}: {count} tokens with its prompt, and a row has {length}"
  return (
    f"{origin}: the augmenting model reads more than {augmenting_length} tokens"
    " beside it"
  )


def _tokenize(
  example: TextLike, tokenizer: Tokenizer, with_ends: bool
) -> _Document:
  prompt, completion, origin = (
    example.prompt, example.completion, example.origin
  )  # fmt: skip
  eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  ends = None
  if with_ends:
    given, given_ends = prompt_ends(tokenizer, prompt)
    new, new_ends = tokenizer.continuation_ends(prompt, completion)
    size = len(prompt.encode()) + len(completion.encode())
    ends = np.concatenate([given_ends, new_ends, [size] * len(eos)])
  else:
    given = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    given += tokenizer.encode(prompt)
    new = tokenizer.encode_continuation(prompt, completion)
  ids = given + new + eos
  if len(ids) < 2:
    raise InputError(
      f"{origin}: {len(ids)} tokens, so there is nothing to predict; remove it"
    )
  # Without a BOS nothing predicts the first token.
  return _Document(np.array(ids, np.int32), ends, max(len(given), 1), example)


def _window(
  document: _Document, start: int, stop: int, encoder: ChunkEncoder
) -> tuple[np.ndarray, np.ndarray]:
  """The augmenting model's tokens of a window, and how many each token sees.

  It reads the text of the window alone, as the anchor does.
  """
  ends, example = document.ends[start:stop], document.example
  if start == 0:
    ids, closes = encoder.encode(example.prompt, example.completion)
  else:
    data = (example.prompt + example.completion).encode()
    begin = int(document.ends[start - 1])
    while data[begin : begin + 1] and data[begin] & 0xC0 == 0x80:
      begin -= 1  # Within a character, whose beginning has been read.
    text = data[begin : int(ends[-1])].decode(errors="ignore")
    ids, closes = encoder.encode("", text)
    ends = ends - begin
  return ids, align(ends, closes)
