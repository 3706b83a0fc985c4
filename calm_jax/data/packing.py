"""The batch: examples as segments of fixed-length rows.

A batch is a dict of numpy arrays of shape [B, L] (B rows, L slots a row):

  tokens       int32    token ids, 0 at padding
  segments     int32    0 at padding, 1.. = number of the example in its row
  positions    int32    0-based position within the segment
  targets      int32    next token of the same segment, 0 where there is none
  weights      float32  1 where the target is a token of the completion (EOS
                        included), else 0
  prompt_ends  int32    slot one past the last prompt token of the segment (one
                        past the BOS for plain text), 0 at padding

Below, N examples lie one after the other in flat arrays of tokens.
"""

import numpy as np

from calm_jax.errors import InputError

Batch = dict[str, np.ndarray]


def pack_rows(
  lengths_N: np.ndarray, length: int, *, pack: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Places examples in rows, in order: `(rows_N, offsets_N)`.

  With `pack`, a row takes the next examples for as long as they fit whole;
  otherwise each example has a row of its own. No length may exceed `length`.
  """
  count = len(lengths_N)
  if not pack:
    return np.arange(count), np.zeros(count, np.int64)
  ends_N = np.cumsum(lengths_N)
  starts_N = ends_N - lengths_N
  firsts = []
  first = 0
  while first < count:
    firsts.append(first)
    first = int(np.searchsorted(ends_N, starts_N[first] + length, side="right"))
  is_first_N = np.zeros(count, np.int64)
  is_first_N[firsts] = 1
  rows_N = np.cumsum(is_first_N) - 1
  offsets_N = starts_N - starts_N[firsts][rows_N] if count else starts_N
  return rows_N, offsets_N


def ragged_range(lengths_N: np.ndarray) -> np.ndarray:
  """0..n-1 for each n of `lengths_N`, one after the other."""
  ends_N = np.cumsum(lengths_N)
  return np.arange(int(lengths_N.sum())) - np.repeat(
    ends_N - lengths_N, lengths_N
  )


def assemble(
  tokens: np.ndarray,
  lengths_N: np.ndarray,
  prompt_lengths_N: np.ndarray,
  rows_N: np.ndarray,
  offsets_N: np.ndarray,
  *,
  batch_size: int,
  length: int,
) -> Batch:
  """The batch of N examples at their places; rows with none are empty.

  Args:
    tokens: the examples' tokens, one example after the other [sum(lengths_N)].
    lengths_N: number of tokens of each example.
    prompt_lengths_N: how many of them are BOS and prompt (at least 1).
    rows_N, offsets_N: places from `pack_rows`; rows_N does not decrease.
  """
  count = len(lengths_N)
  within = ragged_range(lengths_N)
  example = np.repeat(np.arange(count), lengths_N)
  slots = (rows_N * length + offsets_N)[example] + within
  first_of_row = np.searchsorted(rows_N, rows_N, side="left")
  numbers_N = np.arange(count) - first_of_row + 1
  has_next = within < lengths_N[example] - 1
  targets = np.where(has_next, np.append(tokens[1:], 0), 0)
  counts = has_next & (within + 1 >= prompt_lengths_N[example])
  flat = {
    "tokens": (tokens, np.int32),
    "segments": (numbers_N[example], np.int32),
    "positions": (within, np.int32),
    "targets": (targets, np.int32),
    "weights": (counts, np.float32),
    "prompt_ends": ((offsets_N + prompt_lengths_N)[example], np.int32),
  }
  batch = {}
  for name, (values, dtype) in flat.items():
    array = np.zeros(batch_size * length, dtype)
    array[slots] = values
    batch[name] = array.reshape(batch_size, length)
  return batch


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
