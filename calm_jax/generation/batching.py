"""Rows of token ids, laid out so that few programs serve many lengths.

Prompts are padded on the left, so that all rows write the same cache slot at
each step; lengths and numbers of rows are rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import NamedTuple, Protocol

import numpy as np

from calm_jax.composition.connections import Augmenting, Composition
from calm_jax.core.batch import Sequence
from calm_jax.core.errors import InputError

SHORTEST, FINEST = 32, 1024  # of the lengths that rows are padded to


class Reader(Protocol):
  """How one augmenting model with its own tokenizer follows one text."""

  def read(
    self, ids: Rows[int], prompt_length: int
  ) -> tuple[list[int], list[int]]:
    """Reads the first tokens of the anchor.

    Args:
      ids: what there is of the text.
      prompt_length: how many of them are its prompt, at most all.

    Returns:
      (the augmenting model's tokens that are complete, how many of them each
      anchor token may see).
    """

  def push(self, token: int) -> list[int]:
    """Reads one more token of the anchor; the tokens that it completes."""


class Batch(NamedTuple):
  """Rows of token ids as all models read them.

  Attributes:
    anchor: [B, L], padded on the left.
    augmenting: by name, [B, M], padded on the left.
    visible: by name int32 [B, L]; see `composition.visible_tokens`.
  """

  anchor: Sequence
  augmenting: dict[str, Sequence]
  visible: dict[str, np.ndarray]


def pad_left(rows_of_ids, rows: int, length: int, first=None) -> Sequence:
  """Ids as [rows, length], padded on the left; spare rows are padding.

  Args:
    rows_of_ids: lists of ids; may be empty.
    rows, length: the shape.
    first: position of each row's first id; 0 if None.
  """
  out = Sequence(*(np.zeros((rows, length), np.int32) for _ in range(3)))
  for row, ids in enumerate(rows_of_ids):
    here = slice(length - len(ids), length)
    out.tokens[row, here] = ids
    out.segments[row, here] = 1
    begin = 0 if first is None else first[row]
    out.positions[row, here] = begin + np.arange(len(ids))
  return out


def lay_out(
  spec: Composition,
  rows_of_ids: Rows[Rows[int]],
  prompt_lengths: Rows[int],
  readers: dict[str, list[Reader]],
  *,
  rows: int,
) -> Batch:
  """A batch of token rows as every model reads them.

  Args:
    spec: what reads them.
    rows_of_ids: the anchor's tokens of each row.
    prompt_lengths: how many of them are the prompt, all that
      visibility="encoder" shows.
    readers: of the augmenting models with tokenizers of their own, one a row.
    rows: how many rows there are with the spare ones.

  Raises:
    InputError: an augmenting model reads more tokens than it was made for.
  """
  length = round_up(max(map(len, rows_of_ids)))
  anchor = pad_left(rows_of_ids, rows, length)
  ends_B = np.full(rows, length)
  for row, (ids, given) in enumerate(
    zip(rows_of_ids, prompt_lengths, strict=True)
  ):
    ends_B[row] += given - len(ids)
  augmenting, visible = {}, {}
  for name, joined in spec.augmenting:
    augmenting[name] = anchor
    visible_BL = np.broadcast_to(np.arange(1, length + 1), (rows, length))
    if name in readers:
      read = [
        reader.read(ids, given)
        for reader, ids, given in zip(
          readers[name], rows_of_ids, prompt_lengths, strict=True
        )
      ]
      longest = max(len(ids) for ids, _ in read)
      check_length(name, joined, longest)
      M = round_up(longest)
      augmenting[name] = pad_left([ids for ids, _ in read], rows, M)
      visible_BL = np.zeros((rows, length), np.int32)
      for row, (ids, counts) in enumerate(read):
        visible_BL[row, length - len(counts) :] = (
          M - len(ids) + np.array(counts)
        )
    if joined.visibility == "unmasked":
      visible_BL = np.full((rows, length), np.iinfo(np.int32).max)
    elif joined.visibility == "encoder":
      last_B1 = np.take_along_axis(visible_BL, ends_B[:, None] - 1, axis=1)
      visible_BL = np.minimum(visible_BL, last_B1)
    visible[name] = visible_BL.astype(np.int32)
  return Batch(anchor, augmenting, visible)


def check_length(name: str, joined: Augmenting, length: int) -> None:
  """Raises InputError if an augmenting model would read beyond its limit."""
  if length > joined.config.max_length:
    raise InputError(
      f"augmenting model {name!r} would read {length} tokens of its own; its "
      f"length limit is {joined.config.max_length}"
    )


def max_length(spec: Composition, readers: dict | None = None) -> int:
  """The longest sequence of the anchor's tokens that every model can read."""
  configs = [
    a.config for name, a in spec.augmenting if name not in (readers or {})
  ]
  return min(c.max_length for c in [spec.anchor, *configs])


def round_up(n: int) -> int:
  """The next length that programs are compiled for."""
  if n > FINEST:
    return -(-n // FINEST) * FINEST
  return max(SHORTEST, 1 << (n - 1).bit_length())


def batches(
  rows_of_ids: Rows[Rows[int]], batch_size: int
) -> Iterator[tuple[list[int], int]]:
  """(indices, rows) of batches of like length, so that padding stays small."""
  order = sorted(range(len(rows_of_ids)), key=lambda i: len(rows_of_ids[i]))
  rows = min(batch_size, 1 << max(len(order) - 1, 0).bit_length())
  for at in range(0, len(order), rows):
    yield order[at : at + rows], rows


def check_prompts(prompts, max_new_tokens: int, limit: int) -> None:
  """Raises InputError for a prompt that is empty, or too long to continue."""
  for i, ids in enumerate(prompts):
    if not ids:
      raise InputError(f"prompt {i} has no tokens: nothing to continue from")
    if len(ids) + max_new_tokens > limit:
      raise InputError(
        f"prompt {i} has {len(ids)} tokens; with max_new_tokens="
        f"{max_new_tokens} that exceeds the models' length limit of {limit}"
      )
