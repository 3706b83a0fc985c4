"""Text examples to batches, and resumable iteration over any source."""

import functools
import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import grain
import numpy as np

from calm_jax.alignment import ChunkEncoder
from calm_jax.data.packing import (
  Batch,
  assemble,
  assemble_augmenting,
  host_rows,
  pack_rows,
  ragged_range,
)
from calm_jax.data.segments import Aligned, Segments, TextLike
from calm_jax.data.segments import segments as make_segments
from calm_jax.errors import InputError
from calm_jax.tokenizer import Tokenizer

_NAMED = 8


class BatchSource(Protocol):
  """Random access to global batches, as `make_iterator` takes it."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Batch: ...

  def describe(self, index: int) -> str: ...

  @property
  def fingerprint(self) -> str: ...


class TextSource:
  """Random access to global batches of text. Made by `text_source`.

  Attributes:
    num_rows: rows of one epoch.
    num_split: documents that were cut into windows because of their length.
  """

  def __init__(
    self,
    segments: Segments,
    *,
    batch_size: int,
    length: int,
    augmenting_length: int,
    pack: bool,
    seed: int | None,
    process_index: int,
    process_count: int,
  ):
    self.batch_size, self.length, self.seed = batch_size, length, seed
    self.num_split = segments.num_split
    self._segments = segments
    self._rows = host_rows(batch_size, process_index, process_count)
    others = {n: a.lengths_S for n, a in segments.augmenting.items()}
    rows_S, self._offsets_S = pack_rows(
      segments.lengths_S,
      length,
      pack=pack,
      others=[(n, augmenting_length) for n in others.values()]
      if augmenting_length
      else [],
    )
    # M of each augmenting model.
    self.augmenting_lengths = {
      name: augmenting_length or _longest(lengths_S, rows_S)
      for name, lengths_S in others.items()
    }
    self.num_rows = int(rows_S[-1]) + 1
    # Segments of row r: _bounds[r] to _bounds[r + 1].
    self._bounds = np.searchsorted(rows_S, np.arange(self.num_rows + 1))
    self._order = None
    if seed is not None:
      rows = grain.MapDataset.range(self.num_rows)
      # repeat() comes last, so each epoch has its own order.
      self._order = rows.seed(seed).shuffle().repeat()

  def __len__(self) -> int:
    rows = self.num_rows if self._order is None else len(self._order)
    return -(-rows // self.batch_size)

  def __getitem__(self, index: int) -> Batch:
    """The batch at `index`: this process's rows [B / processes, L]."""
    rows = self._row_ids(index)[self._rows]
    firsts, counts = self._bounds[rows], np.diff(self._bounds)[rows]
    counts = np.where(rows < 0, 0, counts)
    picked = np.repeat(firsts, counts) + ragged_range(counts)
    segments, offsets = self._segments, self._offsets_S[picked]
    lengths = segments.lengths_S[picked]
    placed = np.repeat(np.arange(len(rows)), counts)
    slots = _flat_range(segments, picked)
    batch = assemble(
      segments.tokens[slots],
      lengths,
      segments.prompts_S[picked],
      placed,
      offsets,
      batch_size=len(rows),
      length=self.length,
    )
    for name, aligned in segments.augmenting.items():
      batch |= assemble_augmenting(
        name,
        aligned.tokens[_flat_range(aligned, picked)],
        aligned.lengths_S[picked],
        aligned.visible[slots],
        placed,
        (lengths, offsets, self.length),
        batch_size=len(rows),
        length=self.augmenting_lengths[name],
      )
    return batch

  def describe(self, index: int) -> str:
    """Names the examples of the global batch at `index`, for messages."""
    origins = dict.fromkeys(
      self._segments.origins[s]
      for row in self._row_ids(index)
      if row >= 0
      for s in range(self._bounds[row], self._bounds[row + 1])
    )
    named = ", ".join(list(origins)[:_NAMED])
    more = len(origins) - _NAMED
    epoch = operator.index(index) * self.batch_size // self.num_rows
    rest = f" and {more} more" if more > 0 else ""
    return f"batch {index} (epoch {epoch}): {named}{rest}"

  def row_origins(self, index: int) -> list[list[str]]:
    """The origins of the examples in each of this process's rows."""
    return [
      list(self._segments.origins[self._bounds[r] : self._bounds[r + 1]])
      if r >= 0
      else []
      for r in self._row_ids(index)[self._rows]
    ]

  @functools.cached_property
  def fingerprint(self) -> str:
    """Names the sequence of global batches, whatever the number of hosts."""
    digest = hashlib.sha256(self._segments.tokens.tobytes())
    for array in (self._segments.lengths_S, self._segments.prompts_S):
      digest.update(array.astype(np.int64).tobytes())
    parts = [self.seed, self.batch_size, self.length, self.num_rows]
    for name, aligned in self._segments.augmenting.items():
      parts += [name, self.augmenting_lengths[name]]
      for array in (aligned.tokens, aligned.lengths_S, aligned.visible):
        digest.update(array.astype(np.int64).tobytes())
    digest.update(json.dumps(parts).encode())
    return digest.hexdigest()

  def _row_ids(self, index: int) -> np.ndarray:
    """Rows of the global batch [B], -1 past the end of a single pass."""
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    places = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
    if self._order is None:
      return np.where(places < self.num_rows, places, -1)
    return np.array([self._order[int(place)] for place in places])


def text_source(
  examples: Sequence[TextLike],
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  length: int,
  pack: bool = True,
  seed: int | None,
  process_index: int = 0,
  process_count: int = 1,
  augmenting: Mapping[str, ChunkEncoder] = MappingProxyType({}),
  augmenting_length: int = 0,
) -> TextSource:
  """Tokenises examples and lays them out in rows of `length` slots.

  An example is BOS + prompt + completion + EOS, as far as the tokenizer has
  them. Plain text (an empty prompt) longer than a row goes on in windows, each
  of which starts with the last token of the one before, so that every token is
  a target once. All tokens are held in memory.

  Args:
    examples: of `read_examples`, or of `calm_jax.data.arithmetic.examples`.
    tokenizer: of the model to train.
    batch_size: B, rows of the global batch.
    length: L, slots of a row.
    pack: fill rows with consecutive examples; else one example a row.
    seed: the rows come in an endless random order, another one each epoch,
      and the examples are shuffled before they are packed. None: one pass in
      order, the last batch filled up with empty rows.
    process_index, process_count: which share of the rows to take.
    augmenting: by name, of the augmenting models with other tokens.
    augmenting_length: M, slots of a row of theirs; 0 for what the longest
      row needs.

  Raises:
    InputError: no examples, an example with a prompt longer than a row, or
      `tokenizer` cannot tell where its tokens end and has to.
  """
  if not examples:
    raise InputError("there are no examples to make batches of")
  if length < 2:
    raise InputError(f"length {length}: a row needs at least 2 slots")
  return TextSource(
    make_segments(
      examples, tokenizer, length, seed, augmenting, augmenting_length
    ),
    batch_size=batch_size,
    length=length,
    augmenting_length=augmenting_length,
    pack=pack,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )


def eval_batches(
  examples: Sequence[TextLike],
  tokenizer: Tokenizer,
  *,
  pack: bool = False,
  **options,
) -> Iterator[Batch]:
  """One pass over `examples` in order, nothing dropped; see `text_source`.

  Empty rows (segments and weights 0) fill the last batch, so that all batches
  have one shape and all hosts the same number of them.
  """
  source = text_source(examples, tokenizer, pack=pack, seed=None, **options)
  return (source[i] for i in range(len(source)))


def _longest(lengths_S: np.ndarray, rows_S: np.ndarray) -> int:
  """The most that a row holds, rounded up to a multiple of 8."""
  longest = np.bincount(rows_S, lengths_S).max()
  return max(8, -(-int(longest) // 8) * 8)


def _flat_range(parts: Segments | Aligned, picked: np.ndarray) -> np.ndarray:
  """Where the tokens of the picked segments lie among those of all."""
  lengths = parts.lengths_S[picked]
  return np.repeat(parts.starts_S[picked], lengths) + ragged_range(lengths)


class BatchIterator(Iterator[Batch]):
  """Iterates over a source. Made by `make_iterator`."""

  def __init__(self, source: BatchSource, iterator):
    self._source = source
    self._iterator = iterator

  def __next__(self) -> Batch:
    return next(self._iterator)

  @property
  def next_index(self) -> int:
    """Index in the source of the batch that comes next."""
    return self._iterator.get_state()["next_index"]

  def get_state(self) -> dict:
    """Where the iteration stands, as JSON can hold it."""
    return {
      "next_index": self.next_index,
      "source": self._source.fingerprint,
    }

  def set_state(self, state: dict) -> None:
    """Continues exactly from a state of `get_state`.

    Raises:
      InputError: the state is of another sequence of batches.
    """
    if state["source"] != self._source.fingerprint:
      raise InputError(
        "the saved position belongs to other data: the examples, tokenizer,"
        " seed, batch_size, length or task have changed since it was saved;"
        " restore them, or start a new run"
      )
    self._iterator.set_state({"next_index": state["next_index"]})

  def close(self) -> None:
    """Stops reading ahead."""
    self._iterator.close()


def make_iterator(
  source: BatchSource, *, start: int = 0, prefetch: int = 2, threads: int = 1
) -> BatchIterator:
  """Iterates over `source` from batch `start`, reading ahead in threads.

  The order of the batches does not depend on `prefetch` or `threads`.

  Args:
    source: an `ArithmeticSource` or a `TextSource`.
    start: index of the first batch.
    prefetch: how many batches to prepare ahead; 0 for none.
    threads: how many threads prepare them.

  Raises:
    InputError: `start` is beyond the end of the source.
  """
  if not 0 <= start <= len(source):
    raise InputError(f"start {start}: the data has {len(source)} batches")
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=prefetch
  )
  dataset = grain.MapDataset.source(source).to_iter_dataset(options)
  iterator = iter(dataset)
  iterator.set_state({"next_index": start})
  return BatchIterator(source, iterator)
