"""Rows of packed text, and global batches of them in a given order."""

import dataclasses
import functools
import hashlib
import json
import operator
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from calm_jax.core.batch import Batch
from calm_jax.data import packing
from calm_jax.data.documents import RowOptions, Segment, Truncation

_NAMED = 8


class RowTable:
  """All rows of the parts of a mixture, the rows of a part one after the other.

  Attributes:
    num_rows: of all parts.
    ranges: the rows of each part, by its name.
    augmenting_lengths: M of each augmenting model with other tokens.
  """

  def __init__(self, parts: Mapping[str, list[Segment]], options: RowOptions):
    segments = [segment for part in parts.values() for segment in part]
    self._length = options.length
    self._origins = [segment.origin for segment in segments]
    self._prompt_lengths_N = np.array([s.prompt_length for s in segments])
    join = packing.TokenLists.join
    self._anchor = join([segment.tokens for segment in segments])
    self._augmenting, self._visible = {}, {}
    for name in options.augmenting:
      ids, seen = zip(*(s.augmenting[name] for s in segments), strict=True)
      self._augmenting[name] = join(ids)
      self._visible[name] = np.concatenate(seen)
    models = [(self._anchor.lengths_N, options.length)]
    if limit := options.augmenting_length:
      models += [(x.lengths_N, limit) for x in self._augmenting.values()]
    self.ranges: dict[str, range] = {}
    rows, self.num_rows, first = [], 0, 0
    for name, part in parts.items():
      last = first + len(part)
      lengths = [(lengths_N[first:last], limit) for lengths_N, limit in models]
      first = last
      rows.append(self.num_rows + packing.pack_rows(lengths, pack=options.pack))
      self.ranges[name] = range(self.num_rows, int(rows[-1][-1]) + 1)
      self.num_rows = self.ranges[name].stop
    rows_N = np.concatenate(rows)
    # Segments of row r: _bounds[r] to _bounds[r + 1].
    self._bounds = np.searchsorted(rows_N, np.arange(self.num_rows + 1))
    self.augmenting_lengths = {
      name: options.augmenting_length or _longest(other.lengths_N, rows_N)
      for name, other in self._augmenting.items()
    }

  def batch(self, rows_B: np.ndarray) -> Batch:
    """The rows of these numbers as a batch; empty where the number is -1."""
    firsts_B = self._bounds[rows_B]
    counts_B = np.where(rows_B < 0, 0, self._bounds[rows_B + 1] - firsts_B)
    picked = packing.ragged_range(firsts_B, counts_B)
    places = self._anchor.places(picked)
    augmenting = {
      name: (other.take(picked), self._visible[name][places], length)
      for (name, other), length in zip(
        self._augmenting.items(), self.augmenting_lengths.values(), strict=True
      )
    }
    return packing.make_batch(
      self._anchor.take(picked, places),
      self._prompt_lengths_N[picked],
      np.repeat(np.arange(len(rows_B)), counts_B),
      batch_size=len(rows_B),
      length=self._length,
      augmenting=augmenting,
    )

  def origins(self, row: int) -> list[str]:
    """The origins of the examples of a row; none in row -1."""
    if row < 0:
      return []
    return self._origins[self._bounds[row] : self._bounds[row + 1]]

  def part(self, row: int) -> str:
    """The name of the part that a row is of."""
    # `in range` is quick for an int, and a search for a NumPy integer.
    row = int(row)
    return next(name for name, rows in self.ranges.items() if row in rows)

  def update(self, digest) -> None:
    """Adds all tokens to a hash."""
    digest.update(self._anchor.tokens.tobytes())
    arrays = [self._anchor.lengths_N, self._prompt_lengths_N]
    for name, other in self._augmenting.items():
      arrays += [other.tokens, other.lengths_N, self._visible[name]]
    for array in arrays:
      digest.update(array.astype(np.int64).tobytes())


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


@dataclasses.dataclass(eq=False)
class TextSource:
  """Random access to global batches of text. Made by `pipeline.text_source`.

  Attributes:
    table, options: all rows, and their shape.
    order: numbers of rows, the first `batch_size` of them are the first batch;
      None for one pass over all rows.
    weights: of the parts of a mixture, as they went into `order`.
    truncation: counts of what was too long, by part.
  """

  table: RowTable
  order: Sequence[int] | None
  options: RowOptions
  weights: Mapping[str, int]
  truncation: Mapping[str, Truncation]

  def __len__(self) -> int:
    rows = self.table.num_rows if self.order is None else len(self.order)
    return -(-rows // self.options.batch_size)

  def __getitem__(self, index: int) -> Batch:
    """The batch at `index`: this process's rows [B / processes, L]."""
    return self.table.batch(self._rows(index)[self.options.share])

  def describe(self, index: int) -> str:
    """Names the examples of the global batch at `index`, for messages."""
    several, epoch = len(self.table.ranges) > 1, ""
    origins = dict.fromkeys(
      f"{self.table.part(row)}: {origin}" if several else origin
      for row in self._rows(index)
      for origin in self.table.origins(row)
    )
    named = ", ".join(list(origins)[:_NAMED])
    if len(origins) > _NAMED:
      named += f" and {len(origins) - _NAMED} more"
    if not several:  # Else each part is in an epoch of its own.
      first_row = operator.index(index) * self.options.batch_size
      epoch = f" (epoch {first_row // self.table.num_rows})"
    return f"batch {index}{epoch}: {named}"

  def describe_truncation(self) -> str:
    """One line on what was too long for a row, and what became of it."""
    return "; ".join(
      f"{name}: {truncation}" if name else str(truncation)
      for name, truncation in self.truncation.items()
    )

  def row_origins(self, index: int) -> list[list[str]]:
    """The origins of the examples in each of this process's rows."""
    rows_B = self._rows(index)[self.options.share]
    return [self.table.origins(row) for row in rows_B]

  @functools.cached_property
  def fingerprint(self) -> str:
    """Names the sequence of global batches, whatever the number of hosts."""
    digest, options, table = hashlib.sha256(), self.options, self.table
    table.update(digest)
    parts: list = [options.seed, options.batch_size, options.length]
    parts.append(table.num_rows)
    for name, length in table.augmenting_lengths.items():
      parts += [name, length]
    for name, weight in self.weights.items():
      parts += [name, weight, len(table.ranges[name])]
    digest.update(json.dumps(parts).encode())
    return digest.hexdigest()

  def _rows(self, index: int) -> np.ndarray:
    """Rows of the global batch [B], -1 past the end of a single pass."""
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    size = self.options.batch_size
    places = np.arange(index * size, (index + 1) * size)
    if self.order is None:
      return np.where(places < self.table.num_rows, places, -1)
    return np.array([self.order[int(place)] for place in places])


def _longest(lengths_N: np.ndarray, rows_N: np.ndarray) -> int:
  """The most that a row holds, rounded up to a multiple of 8."""
  longest = np.bincount(rows_N, lengths_N).max()
  return max(8, -(-int(longest) // 8) * 8)
