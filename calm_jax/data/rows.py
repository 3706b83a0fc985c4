"""Rows of packed text, and global batches of them in a given order."""

import functools
import hashlib
import json
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from calm_jax.core.batch import Batch
from calm_jax.data import packing
from calm_jax.data.documents import RowOptions, Segment, Truncation

_NAMED = 8


class TextSource:
  """Random access to global batches of text. Made by `pipeline.text_source`.

  Attributes:
    truncation: counts of what was too long, by part.
    num_rows: of all parts, the rows of a part one after the other.
    augmenting_lengths: M of each augmenting model with other tokens.
  """

  def __init__(
    self,
    parts: Mapping[str, tuple[list[Segment], Truncation]],
    seeds: Mapping[str, Any],
    weights: Mapping[str, int],
    options: RowOptions,
  ):
    """The order of a part's rows follows its seed, all of None is one pass.

    `weights` are the numbers of rows that the parts of a mixture take turns
    with, none for a single part.
    """
    self.options, self._weights = options, weights
    self.truncation = {name: counts for name, (_, counts) in parts.items()}
    segments = [segment for part, _ in parts.values() for segment in part]
    self._origins = [segment.origin for segment in segments]
    self._prompt_lengths_N = np.array([s.prompt_length for s in segments])
    join = packing.TokenLists.join
    self._anchor = join([segment.tokens for segment in segments])
    self._learnt = None
    if any(segment.learnt is not None for segment in segments):
      self._learnt = np.concatenate([_learnt(s) for s in segments])
    self._augmenting, self._visible = {}, {}
    for name in options.augmenting:
      ids, seen = zip(*(s.augmenting[name] for s in segments), strict=True)
      self._augmenting[name] = join(ids)
      self._visible[name] = np.concatenate(seen)
    rows_N = self._pack({name: len(part) for name, (part, _) in parts.items()})
    # Segments of row r: _bounds[r] to _bounds[r + 1].
    self._bounds = np.searchsorted(rows_N, np.arange(self.num_rows + 1))
    self.augmenting_lengths = {
      name: options.augmenting_length or _longest(other.lengths_N, rows_N)
      for name, other in self._augmenting.items()
    }
    self._order: Sequence[int] | None = None
    if options.seed is not None:
      orders = [
        Epochs(rows, seeds[name]) for name, rows in self._ranges.items()
      ]
      self._order = _mix(orders, list(weights.values()))

  def _pack(self, counts: Mapping[str, int]) -> np.ndarray:
    """The row of each segment, and the rows of each part, of so many."""
    options = self.options
    models = [(self._anchor.lengths_N, options.length)]
    if limit := options.augmenting_length:
      models += [(x.lengths_N, limit) for x in self._augmenting.values()]
    self._ranges: dict[str, range] = {}
    rows, self.num_rows, first = [], 0, 0
    for name, count in counts.items():
      part = slice(first, first + count)
      lengths = [(lengths_N[part], limit) for lengths_N, limit in models]
      rows.append(self.num_rows + packing.pack_rows(lengths, pack=options.pack))
      self._ranges[name] = range(self.num_rows, int(rows[-1][-1]) + 1)
      self.num_rows, first = self._ranges[name].stop, part.stop
    return np.concatenate(rows)

  def __len__(self) -> int:
    rows = self.num_rows if self._order is None else len(self._order)
    return -(-rows // self.options.batch_size)

  def __getitem__(self, index: int) -> Batch:
    """The batch at `index`: this process's rows [B / processes, L]."""
    rows_B = self._rows(index)[self.options.share]
    firsts_B = self._bounds[rows_B]
    counts_B = np.where(rows_B < 0, 0, self._bounds[rows_B + 1] - firsts_B)
    picked = packing.ragged_range(firsts_B, counts_B)
    anchor, places = self._anchor, self._anchor.places(picked)
    augmenting = {
      name: (other.take(picked), self._visible[name][places], length)
      for (name, other), length in zip(
        self._augmenting.items(), self.augmenting_lengths.values(), strict=True
      )
    }
    return packing.make_batch(
      packing.TokenLists(anchor.tokens[places], anchor.lengths_N[picked]),
      self._prompt_lengths_N[picked],
      np.repeat(np.arange(len(rows_B)), counts_B),
      batch_size=len(rows_B),
      length=self.options.length,
      augmenting=augmenting,
      learnt=None if self._learnt is None else self._learnt[places],
    )

  def describe(self, index: int) -> str:
    """Names the examples of the global batch at `index`, for messages."""
    several, epoch = len(self._ranges) > 1, ""
    origins = dict.fromkeys(
      f"{name}: {origin}" if several else origin
      for row in self._rows(index).tolist()
      for name, rows in self._ranges.items()
      if row in rows
      for origin in self._row_origins(row)
    )
    named = ", ".join(list(origins)[:_NAMED])
    if len(origins) > _NAMED:
      named += f" and {len(origins) - _NAMED} more"
    if not several:  # Else each part is in an epoch of its own.
      first_row = operator.index(index) * self.options.batch_size
      epoch = f" (epoch {first_row // self.num_rows})"
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
    return [self._row_origins(row) for row in rows_B]

  @functools.cached_property
  def fingerprint(self) -> str:
    """Names the sequence of global batches, whatever the number of hosts."""
    digest, options = hashlib.sha256(), self.options
    digest.update(self._anchor.tokens.tobytes())
    arrays = [self._anchor.lengths_N, self._prompt_lengths_N]
    if self._learnt is not None:
      arrays.append(self._learnt)
    for name, other in self._augmenting.items():
      arrays += [other.tokens, other.lengths_N, self._visible[name]]
    for array in arrays:
      digest.update(array.astype(np.int64).tobytes())
    parts: list = [options.seed, options.batch_size, options.length]
    parts.append(self.num_rows)
    for name, length in self.augmenting_lengths.items():
      parts += [name, length]
    for name, weight in self._weights.items():
      parts += [name, weight, len(self._ranges[name])]
    digest.update(json.dumps(parts).encode())
    return digest.hexdigest()

  def _rows(self, index: int) -> np.ndarray:
    """Rows of the global batch [B], -1 past the end of a single pass."""
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"batch {index} of {len(self)}")
    size = self.options.batch_size
    places = np.arange(index * size, (index + 1) * size)
    if self._order is None:
      return np.where(places < self.num_rows, places, -1)
    return np.array([self._order[int(place)] for place in places])

  def _row_origins(self, row: int) -> list[str]:
    """The origins of the examples of a row; none in row -1."""
    if row < 0:
      return []
    return self._origins[self._bounds[row] : self._bounds[row + 1]]


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

  # pyrefly: ignore [bad-override]  # Nobody asks for a slice.
  def __getitem__(self, index: int) -> int:
    epoch, place = divmod(index, len(self._rows))
    return self._rows.start + int(self._order(epoch)[place])

  def _make_order(self, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((self._seed, epoch))
    return rng.permutation(np.arange(len(self._rows), dtype=np.int32))


def _mix(orders: list[Epochs], weights: list[int]) -> Any:
  if len(orders) == 1:
    return orders[0]
  return grain.MapDataset.mix(
    [grain.MapDataset.source(order) for order in orders], weights
  )


def _learnt(segment: Segment) -> np.ndarray:
  """For each token of a segment whether it is learnt, bool."""
  if segment.learnt is not None:
    return segment.learnt
  return np.arange(len(segment.tokens)) >= segment.prompt_length


def _longest(lengths_N: np.ndarray, rows_N: np.ndarray) -> int:
  """The most that a row holds, rounded up to a multiple of 8."""
  longest = np.bincount(rows_N, lengths_N).max()
  return max(8, -(-int(longest) // 8) * 8)
