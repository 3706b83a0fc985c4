"""Text examples as token segments that fit a row, for one or two tokenizers."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from calm_jax.alignment import ChunkEncoder, align, prompt_ends
from calm_jax.errors import InputError
from calm_jax.tokenizer import Tokenizer


class TextLike(Protocol):
  """A `TextExample`, or an example of `calm_jax.data.arithmetic`."""

  prompt: str
  completion: str
  origin: str


@dataclasses.dataclass(frozen=True, eq=False)
class Aligned:
  """What an augmenting model with other tokens reads beside S segments.

  Attributes:
    tokens: its tokens, one segment after the other.
    lengths_S: number of them of each segment.
    visible: for each of the anchor's tokens, how many of its segment's it sees.
  """

  tokens: np.ndarray
  lengths_S: np.ndarray
  visible: np.ndarray

  @functools.cached_property
  def starts_S(self) -> np.ndarray:
    return np.cumsum(self.lengths_S) - self.lengths_S


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
  """S segments of tokenised text, one after the other in `tokens`.

  Attributes:
    tokens: int32 token ids of the anchor.
    lengths_S: number of them of each segment.
    prompts_S: how many of those are BOS and prompt (at least 1).
    origins: where each came from.
    num_split: documents that were cut into windows because of their length.
    augmenting: by name, of the models with other tokens.
  """

  tokens: np.ndarray
  lengths_S: np.ndarray
  prompts_S: np.ndarray
  origins: tuple[str, ...]
  num_split: int
  augmenting: dict[str, Aligned]

  @functools.cached_property
  def starts_S(self) -> np.ndarray:
    return np.cumsum(self.lengths_S) - self.lengths_S


class _Document(NamedTuple):
  """A tokenised example; `given` of its tokens are BOS and prompt."""

  tokens: np.ndarray
  ends: np.ndarray | None  # bytes; None where nothing is to be aligned
  given: int
  example: TextLike


def segments(
  examples: Sequence[TextLike],
  tokenizer: Tokenizer,
  length: int,
  seed: int | None,
  augmenting: Mapping[str, ChunkEncoder],
  augmenting_length: int,
) -> Segments:
  """Tokenises examples and cuts plain text that is too long into windows.

  Args:
    examples: at least one.
    tokenizer: the anchor's.
    length: the longest segment.
    seed: of the order of the examples; theirs if None.
    augmenting: of the augmenting models with other tokens.
    augmenting_length: the longest segment of theirs; 0 for any.

  Raises:
    InputError: an example with a prompt is too long for a row, or an example
      has nothing to predict.
  """
  limit = augmenting_length or np.iinfo(np.int64).max
  tokens, prompts, origins, num_split = [], [], [], 0
  read: dict[str, list] = {name: [] for name in augmenting}
  documents = [
    _tokenize(example, tokenizer, length, bool(augmenting))
    for example in examples
  ]
  if seed is not None:
    # Neighbours in a file are often alike and would share their rows.
    order = np.random.default_rng(seed).permutation(len(documents))
    documents = [documents[i] for i in order]
  for document in documents:
    example, start = document.example, 0
    while start < len(document.tokens) - 1:
      stop = min(start + length, len(document.tokens))
      windows = {
        name: _window(document, start, stop, encoder)
        for name, encoder in augmenting.items()
      }
      fits = [np.searchsorted(v, limit, "right") for _, v in windows.values()]
      size = min([stop - start, *map(int, fits)])
      if size < stop - start and (example.prompt or size < 2):
        raise InputError(
          f"{example.origin}: the augmenting model reads more than"
          f" {augmenting_length} tokens beside it: raise augmenting_length, or"
          " shorten or remove the example"
        )
      for name, (ids, visible) in windows.items():
        read[name].append((ids[: visible[size - 1]], visible[:size]))
      tokens.append(document.tokens[start : start + size])
      prompts.append(document.given if start == 0 else 1)
      origins.append(example.origin)
      # One token of overlap: the first of a window is nobody's target there.
      start += size - 1
    num_split += len(tokens[-1]) < len(document.tokens)
  return Segments(
    tokens=np.concatenate(tokens),
    lengths_S=np.array([len(ids) for ids in tokens]),
    prompts_S=np.array(prompts),
    origins=tuple(origins),
    num_split=num_split,
    augmenting={
      name: Aligned(
        np.concatenate([ids for ids, _ in pairs]),
        np.array([len(ids) for ids, _ in pairs]),
        np.concatenate([visible for _, visible in pairs]),
      )
      for name, pairs in read.items()
    },
  )


def _tokenize(
  example: TextLike, tokenizer: Tokenizer, length: int, with_ends: bool
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
  if len(ids) > length and prompt:
    raise InputError(
      f"{origin}: {len(ids)} tokens with its prompt, and a row has"
      f" {length}: raise length, or shorten or remove the example"
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
