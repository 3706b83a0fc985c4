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

An augmenting model that reads other tokens has its own beside them, of shape
[B, M], in the same rows under the same numbers of segments:

  augmenting/<name>/tokens, segments, positions   as above
  augmenting/<name>/visible   int32 [B, L], how many slots of the augmenting
                              row each slot may see, 0 at padding

Below, N examples lie one after the other in flat arrays of tokens.
"""

from collections.abc import Sequence

import numpy as np

from calm_jax.core.errors import InputError

Batch = dict[str, np.ndarray]


def pack_rows(
  lengths_N: np.ndarray,
  length: int,
  *,
  pack: bool,
  others: Sequence[tuple[np.ndarray, int]] = (),
) -> tuple[np.ndarray, np.ndarray]:
  """Places examples in rows, in order: `(rows_N, offsets_N)`.

  With `pack`, a row takes the next examples for as long as they fit whole;
  otherwise each example has a row of its own. No length may exceed `length`.

  Args:
    lengths_N: of the examples.
    length: of a row.
    pack: see above.
    others: further lengths_N with the length of their row, which must fit too.
  """
  count = len(lengths_N)
  if not pack:
    return np.arange(count), np.zeros(count, np.int64)
  limits = [
    (np.cumsum(sizes_N), sizes_N, limit)
    for sizes_N, limit in [(lengths_N, length), *others]
  ]
  firsts = []
  first = 0
  while first < count:
    firsts.append(first)
    first = min(
      int(np.searchsorted(
        ends_N, ends_N[first] - sizes_N[first] + limit, side="right"
      ))
      for ends_N, sizes_N, limit in limits
    )  # fmt: skip
  is_first_N = np.zeros(count, np.int64)
  is_first_N[firsts] = 1
  rows_N = np.cumsum(is_first_N) - 1
  return rows_N, row_offsets(lengths_N, rows_N)


def row_offsets(lengths_N: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
  """The first slot of each example, in rows filled one after the other."""
  starts_N = np.cumsum(lengths_N) - lengths_N
  firsts_N = np.searchsorted(rows_N, rows_N, side="left")
  return starts_N - starts_N[firsts_N]


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
  numbers_N = _numbers(rows_N)
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
  return {
    name: _placed(values, slots, batch_size, length, dtype)
    for name, (values, dtype) in flat.items()
  }


def assemble_augmenting(
  name: str,
  tokens: np.ndarray,
  lengths_N: np.ndarray,
  visible: np.ndarray,
  rows_N: np.ndarray,
  anchor: tuple[np.ndarray, np.ndarray, int],
  *,
  batch_size: int,
  length: int,
) -> Batch:
  """What an augmenting model with other tokens adds to a batch.

  Args:
    name: of the model.
    tokens: its tokens, one example after the other [sum(lengths_N)].
    lengths_N: number of them of each example.
    visible: of each of the anchor's tokens, how many of its example's it sees.
    rows_N: rows of the examples.
    anchor: (lengths_N, offsets_N, L) of the anchor's.
    batch_size, length: B and M.
  """
  offsets_N = row_offsets(lengths_N, rows_N)
  within = ragged_range(lengths_N)
  slots = np.repeat(rows_N * length + offsets_N, lengths_N) + within
  flat = {
    "tokens": tokens,
    "segments": np.repeat(_numbers(rows_N), lengths_N),
    "positions": within,
  }
  batch = {
    f"augmenting/{name}/{key}": _placed(
      values, slots, batch_size, length, np.int32
    )
    for key, values in flat.items()
  }
  lengths_N, anchor_offsets_N, L = anchor
  slots = np.repeat(rows_N * L + anchor_offsets_N, lengths_N)
  batch[f"augmenting/{name}/visible"] = _placed(
    np.repeat(offsets_N, lengths_N) + visible,
    slots + ragged_range(lengths_N),
    batch_size,
    L,
    np.int32,
  )
  return batch


def _numbers(rows_N: np.ndarray) -> np.ndarray:
  """Numbers of the examples in their rows, from 1."""
  firsts_N = np.searchsorted(rows_N, rows_N, side="left")
  return np.arange(len(rows_N)) - firsts_N + 1


def _placed(values, slots, batch_size, length, dtype) -> np.ndarray:
  array = np.zeros(batch_size * length, dtype)
  array[slots] = values
  return array.reshape(batch_size, length)


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
