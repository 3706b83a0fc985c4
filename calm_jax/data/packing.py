"""Packing: examples as segments of the fixed-length rows of a `Batch`.

Dimension letters: N examples, B rows, L slots of a row of the anchor's, M of a
row of an augmenting model's.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from calm_jax.core import batch as batch_lib
from calm_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLists:
  """Token ids of N examples, one example after the other in `tokens`."""

  tokens: np.ndarray
  lengths_N: np.ndarray

  @classmethod
  def join(cls, lists: Sequence[np.ndarray]) -> "TokenLists":
    """Makes one of the token ids of each example."""
    return cls(np.concatenate(lists), np.array([len(ids) for ids in lists]))

  @functools.cached_property
  def starts_N(self) -> np.ndarray:
    return np.cumsum(self.lengths_N) - self.lengths_N

  def places(self, picked: np.ndarray) -> np.ndarray:
    """Indices in `tokens` of the tokens of the picked examples."""
    return ragged_range(self.starts_N[picked], self.lengths_N[picked])

  def take(self, picked: np.ndarray) -> "TokenLists":
    """The picked examples."""
    return TokenLists(self.tokens[self.places(picked)], self.lengths_N[picked])


def pack_rows(
  models: Sequence[tuple[np.ndarray, int]], *, pack: bool
) -> np.ndarray:
  """Gives N examples, in order, to rows: the row of each, int64 [N].

  With `pack`, a row takes the next examples for as long as they fit whole;
  otherwise each example has a row of its own. `models` has for each model that
  reads the examples their lengths_N in its tokens and the length of its rows,
  which no example may exceed.
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


def ragged_range(starts_N: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
  """The next n integers from each start on, for each n of `lengths_N`."""
  before_N = np.cumsum(lengths_N) - lengths_N
  count = np.arange(int(lengths_N.sum()))
  return np.repeat(starts_N - before_N, lengths_N) + count


def make_batch(
  anchor: TokenLists,
  prompt_lengths_N: np.ndarray,
  rows_N: np.ndarray,
  *,
  batch_size: int,
  length: int,
  augmenting: Mapping[str, tuple[TokenLists, np.ndarray, int]] | None = None,
  learnt: np.ndarray | None = None,
) -> batch_lib.Batch:
  """Lays N examples out as the segments of rows; rows without any are empty.

  A target counts (weight 1) if it is a token of the completion, EOS included.

  Args:
    anchor: the examples in the anchor's tokens.
    prompt_lengths_N: how many of these are BOS and prompt (at least 1).
    rows_N: the row of each example, from `pack_rows`.
    batch_size, length: B and L.
    augmenting: by name of each augmenting model with another tokenizer, the
      examples in its tokens; how many of those each token of `anchor` may see;
      and M.
    learnt: for each token of `anchor`, whether it counts instead.
  """
  shape = batch_size, length
  first_of_row_N = np.searchsorted(rows_N, rows_N, side="left")
  numbers_N = np.arange(len(rows_N)) - first_of_row_N + 1

  def layout(lists: TokenLists, row_length: int) -> tuple[np.ndarray, ...]:
    """Each token's example, position and slot; each example's first slot."""
    offsets_N = lists.starts_N - lists.starts_N[first_of_row_N]
    example = np.repeat(np.arange(len(rows_N)), lists.lengths_N)
    position = np.arange(len(example)) - lists.starts_N[example]
    slot = (rows_N * row_length + offsets_N)[example] + position
    return example, position, slot, offsets_N

  example, position, slots, offsets_N = layout(anchor, length)
  sequences, visible = {}, {}
  for name, (other, seen, row_length) in (augmenting or {}).items():
    owner, within, places, first_N = layout(other, row_length)
    visible[name] = _lay_out(first_N[example] + seen, slots, shape)
    arrays = other.tokens, numbers_N[owner], within
    sequences[name] = batch_lib.Sequence(
      *(_lay_out(x, places, (batch_size, row_length)) for x in arrays)
    )
  has_next = position < anchor.lengths_N[example] - 1
  targets = np.where(has_next, np.append(anchor.tokens[1:], 0), 0)
  if learnt is None:
    learnt = position >= prompt_lengths_N[example]
  counts = has_next & np.append(learnt[1:], False)
  arrays = anchor.tokens, numbers_N[example], position
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
  """Rows of the global batch that a host takes."""
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
