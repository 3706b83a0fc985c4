"""Rows of packed text, and global batches of them in a given order."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from calm_jax.core.batch import Batch
from calm_jax.data.packing import make_batch, pack_rows, ragged_range
from calm_jax.data.segments import Segments, Truncation, concatenate

_NAMED = 8


class RowTable:
  """Rows of one or more parts, the rows of a part one after the other.

  Attributes:
    length: L, slots of a row.
    augmenting_lengths: M of each augmenting model with other tokens.
    num_rows: of all parts.
    ranges: the rows of each part, by its name.
    segments: of all parts.
  """

  def __init__(
    self,
    parts: Mapping[str, Segments],
    *,
    length: int,
    augmenting_length: int,
    pack: bool,
  ):
    self.length = length
    self.segments = concatenate(list(parts.values()))
    self.ranges: dict[str, range] = {}
    rows, self.num_rows = [], 0
    for name, part in parts.items():
      models = [(part.anchor.lengths_N, length)]
      if augmenting_length:
        models += [
          (other.lengths_N, augmenting_length)
          for other in part.augmenting.values()
        ]
      first = self.num_rows
      rows.append(first + pack_rows(models, pack=pack))
      self.num_rows = int(rows[-1][-1]) + 1
      self.ranges[name] = range(first, self.num_rows)
    rows_N = np.concatenate(rows)
    # Segments of row r: _bounds[r] to _bounds[r + 1].
    self._bounds = np.searchsorted(rows_N, np.arange(self.num_rows + 1))
    self.augmenting_lengths = {
      name: augmenting_length or _longest(other.lengths_N, rows_N)
      for name, other in self.segments.augmenting.items()
    }

  def batch(self, rows_B: np.ndarray) -> Batch:
    """The rows of these numbers as a batch; empty where the number is -1."""
    firsts_B = self._bounds[rows_B]
    counts_B = np.where(rows_B < 0, 0, self._bounds[rows_B + 1] - firsts_B)
    picked = np.repeat(firsts_B, counts_B) + ragged_range(counts_B)
    segments = self.segments
    places = segments.anchor.places(picked)
    return make_batch(
      segments.anchor.take(picked, places),
      segments.prompt_lengths_N[picked],
      np.repeat(np.arange(len(rows_B)), counts_B),
      batch_size=len(rows_B),
      length=self.length,
      augmenting={
        name: other.take(picked) for name, other in segments.augmenting.items()
      },
      visible={
        name: visible[places] for name, visible in segments.visible.items()
      },
      augmenting_lengths=self.augmenting_lengths,
    )

  def origins(self, row: int) -> tuple[str, ...]:
    """Of the examples in a row; none in row -1."""
    if row < 0:
      return ()
    return self.segments.origins[self._bounds[row] : self._bounds[row + 1]]

  def part(self, row: int) -> str:
    """The name of the part that a row is of."""
    # A numpy integer would be looked for from the first to the last.
    row = int(row)
    return next(name for name, rows in self.ranges.items() if row in rows)


class Epochs(Sequence[int]):
  """Rows of a part without end, in another random order each epoch.

  Each order is made at once and kept: grain's own shuffle, which needs no
  memory, takes milliseconds for a row of a small part.
  """

  def __init__(self, rows: range, seed: int):
    self._rows, self._seed = rows, seed
    # Threads that read ahead may be in two epochs.
    self._order = functools.lru_cache(maxsize=2)(self._make_order)

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> int:
    epoch, place = divmod(index, len(self._rows))
    return self._rows.start + int(self._order(epoch)[place])

  def _make_order(self, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((self._seed, epoch))
    return rng.permutation(np.arange(len(self._rows), dtype=np.int32))


class TextSource:
  """Random access to global batches of text. Made by `pipeline.text_source`.

  Attributes:
    batch_size: B, rows of the global batch.
    length: L, slots of a row.
    seed: of the order of the rows.
    num_rows: of one epoch, or of one epoch of every part of a mixture.
    augmenting_lengths: M of each augmenting model with other tokens.
    truncation: what was too long, by part; that of the only part is "".
  """

  def __init__(
    self,
    table: RowTable,
    order: Sequence[int] | None,
    *,
    batch_size: int,
    seed: int | None,
    rows: slice,
    weights: Mapping[str, int],
    truncation: Mapping[str, Truncation],
  ):
    """Takes rows in an order.

    Args:
      table: of all rows.
      order: numbers of rows, the first `batch_size` of them are the first
        batch; None for one pass over all rows.
      batch_size, seed, truncation: see above.
      rows: of the global batch, those that this process takes.
      weights: of the parts of a mixture, as they went into `order`.
    """
    self.batch_size, self.length, self.seed = batch_size, table.length, seed
    self.num_rows = table.num_rows
    self.augmenting_lengths = table.augmenting_lengths
    self.truncation = truncation
    self._table, self._order = table, order
    self._rows, self._weights = rows, weights

  def __len__(self) -> int:
    rows = self.num_rows if self._order is None else len(self._order)
    return -(-rows // self.batch_size)

  def __getitem__(self, index: int) -> Batch:
    """The batch at `index`: this process's rows [B / processes, L]."""
    return self._table.batch(self._row_ids(index)[self._rows])

  def describe(self, index: int) -> str:
    """Names the examples of the global batch at `index`, for messages."""
    several = len(self._table.ranges) > 1
    origins = dict.fromkeys(
      f"{self._table.part(row)}: {origin}" if several else origin
      for row in self._row_ids(index)
      for origin in self._table.origins(row)
    )
    named = ", ".join(list(origins)[:_NAMED])
    more = len(origins) - _NAMED
    rest = f" and {more} more" if more > 0 else ""
    if several:  # each part is in an epoch of its own
      return f"batch {index}: {named}{rest}"
    epoch = operator.index(index) * self.batch_size // self.num_rows
    return f"batch {index} (epoch {epoch}): {named}{rest}"

  def describe_truncation(self) -> str:
    """One line on what was too long for a row, and what became of it."""
    return "; ".join(
      f"{name}: {truncation}" if name else str(truncation)
      for name, truncation in self.truncation.items()
    )

  def row_origins(self, index: int) -> list[list[str]]:
    """The origins of the examples in each of this process's rows."""
    rows = self._row_ids(index)[self._rows]
    return [list(self._table.origins(row)) for row in rows]

  @functools.cached_property
  def fingerprint(self) -> str:
    """Names the sequence of global batches, whatever the number of hosts."""
    segments = self._table.segments
    anchor = segments.anchor
    digest = hashlib.sha256(anchor.tokens.tobytes())
    for array in (anchor.lengths_N, segments.prompt_lengths_N):
      digest.update(array.astype(np.int64).tobytes())
    parts: list = [self.seed, self.batch_size, self.length, self.num_rows]
    for name, other in segments.augmenting.items():
      parts += [name, self.augmenting_lengths[name]]
      visible = segments.visible[name]
      for array in (other.tokens, other.lengths_N, visible):
        digest.update(array.astype(np.int64).tobytes())
    for name, weight in self._weights.items():
      parts += [name, weight, len(self._table.ranges[name])]
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


def _longest(lengths_N: np.ndarray, rows_N: np.ndarray) -> int:
  """The most that a row holds, rounded up to a multiple of 8."""
  longest = np.bincount(rows_N, lengths_N).max()
  return max(8, -(-int(longest) // 8) * 8)
