"""Packing: examples as segments of the fixed-length rows of a `Batch`.

Dimension letters: N examples, B rows, L slots of a row of the anchor's, M of a
row of an augmenting model's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from calm_jax.core import batch as batch_lib
from calm_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLists:
  """Token ids of N examples, one example after the other in `tokens`.

  Attributes:
    tokens: integers [sum(lengths_N)].
    lengths_N: number of tokens of each example.
  """

  tokens: np.ndarray
  lengths_N: np.ndarray

  @classmethod
  def join(cls, lists: Sequence[np.ndarray]) -> TokenLists:
    """Makes one of the token ids of each example."""
    return cls(np.concatenate(lists), np.array([len(ids) for ids in lists]))

  @functools.cached_property
  def _starts_N(self) -> np.ndarray:
    return np.cumsum(self.lengths_N) - self.lengths_N

  def places(self, picked: np.ndarray) -> np.ndarray:
    """Indices in `tokens` of the tokens of the picked examples."""
    lengths = self.lengths_N[picked]
    return np.repeat(self._starts_N[picked], lengths) + ragged_range(lengths)

  def take(self, picked: np.ndarray, places: np.ndarray | None = None):
    """The picked examples; `places` are theirs, if they are known."""
    places = self.places(picked) if places is None else places
    return TokenLists(self.tokens[places], self.lengths_N[picked])


def pack_rows(
  models: Sequence[tuple[np.ndarray, int]], *, pack: bool
) -> np.ndarray:
  """Gives N examples, in order, to rows: the row of each, int64 [N].

  With `pack`, a row takes the next examples for as long as they fit whole;
  otherwise each example has a row of its own.

  Args:
    models: for each model that reads the examples, their lengths_N in its
      tokens and the length of its rows. No example may exceed a row.
    pack: see above.
  """
  count = len(models[0][0])
  if not pack:
    return np.arange(count)
  is_first_N = np.zeros(count, np.int64)
  limits = [(np.cumsum(sizes_N), sizes_N, limit) for sizes_N, limit in models]
  first = 0
  while first < count:
    is_first_N[first] = 1
    first = min(
      int(ends_N.searchsorted(ends_N[first] - sizes_N[first] + limit, "right"))
      for ends_N, sizes_N, limit in limits
    )
  return np.cumsum(is_first_N) - 1


def ragged_range(lengths_N: np.ndarray) -> np.ndarray:
  """0..n-1 for each n of `lengths_N`, one after the other."""
  starts_N = np.cumsum(lengths_N) - lengths_N
  return np.arange(int(lengths_N.sum())) - np.repeat(starts_N, lengths_N)


def make_batch(
  anchor: TokenLists,
  prompt_lengths_N: np.ndarray,
  rows_N: np.ndarray,
  *,
  batch_size: int,
  length: int,
  augmenting: Mapping[str, tuple[TokenLists, np.ndarray, int]] | None = None,
) -> batch_lib.Batch:
  """Lays N examples out as the segments of rows; rows without any are empty.

  A target counts (weight 1) if it is a token of the completion, EOS included.

  Args:
    anchor: the examples in the anchor's tokens.
    prompt_lengths_N: how many of these are BOS and prompt (at least 1).
    rows_N: the row of each example, from `pack_rows`.
    batch_size: B.
    length: L.
    augmenting: by name, for an augmenting model that has its own tokenizer: the
      examples in its tokens; for each token of `anchor`, how many augmenting
      tokens of its example it may see; and M.
  """
  lengths_N, shape = anchor.lengths_N, (batch_size, length)
  first_of_row_N = np.searchsorted(rows_N, rows_N, side="left")
  numbers_N = np.arange(len(rows_N)) - first_of_row_N + 1
  starts_N = np.cumsum(lengths_N) - lengths_N
  offsets_N = starts_N - starts_N[first_of_row_N]
  example = np.repeat(np.arange(len(rows_N)), lengths_N)
  within = np.arange(len(example)) - starts_N[example]
  slots = (rows_N * length + offsets_N)[example] + within
  sequences, visible = {}, {}
  for name, (other, seen, row_length) in (augmenting or {}).items():
    starts_N = np.cumsum(other.lengths_N) - other.lengths_N
    first_N = starts_N - starts_N[first_of_row_N]
    visible[name] = _lay_out(first_N[example] + seen, slots, shape)
    which = np.repeat(np.arange(len(rows_N)), other.lengths_N)
    positions = np.arange(len(which)) - starts_N[which]
    arrays = other.tokens, numbers_N[which], positions
    places = (rows_N * row_length + first_N)[which] + positions
    row_shape = batch_size, row_length
    sequences[name] = batch_lib.Sequence(
      *(_lay_out(x, places, row_shape) for x in arrays)
    )
  has_next = within < lengths_N[example] - 1
  targets = np.where(has_next, np.append(anchor.tokens[1:], 0), 0)
  counts = has_next & (within + 1 >= prompt_lengths_N[example])
  arrays = anchor.tokens, numbers_N[example], within
  return batch_lib.Batch(
    batch_lib.Sequence(*(_lay_out(x, slots, shape) for x in arrays)),
    sequences,
    visible,
    _lay_out((offsets_N + prompt_lengths_N)[example], slots, shape),
    _lay_out(targets, slots, shape),
    _lay_out(counts, slots, shape, np.float32),
  )


def _lay_out(values, slots, shape, dtype=np.int32) -> np.ndarray:
  """An array of zeros with the values at flat slots."""
  array = np.zeros(shape, dtype)
  array.reshape(-1)[slots] = values
  return array


def host_rows(batch_size: int, process_index: int, process_count: int) -> slice:
  """Rows of the global batch that a host takes.

  Raises:
    InputError: the hosts cannot share the rows evenly.
  """
  if not 0 <= process_index < process_count:
    raise InputError(
      f"process_index {process_index} is not below process_count"
      f" {process_count}"
    )
  if batch_size < 1 or batch_size % process_count:
    raise InputError(
      f"batch_size {batch_size} cannot be shared by {process_count} processes;"
      f" make it a multiple of {process_count}"
    )
  share = batch_size // process_count
  return slice(process_index * share, (process_index + 1) * share)
