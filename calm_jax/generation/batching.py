"""Rows of token ids, laid out so that few programs serve many lengths.

Prompts are padded on the left, so that all rows write the same cache slot at
each step; lengths and numbers of rows are rounded up.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Sequence as Rows

import numpy as np

from calm_jax.composition.connections import Augmenting, Composition
from calm_jax.composition.model import Model
from calm_jax.core.batch import Batch, Sequence, plain_batch
from calm_jax.core.errors import InputError
from calm_jax.text.alignment import AlignedReader, ChunkEncoder

SHORTEST, FINEST = 32, 1024  # of the lengths that rows are padded to

Ids = Rows[Rows[int]]
# By name, makers of readers for augmenting models with other tokens.
Readers = Mapping[str, Callable[[], AlignedReader]]


def readers(model: Model) -> Readers:
  """Makers of readers for a model's augmenting models with other tokens."""
  return {
    name: functools.partial(AlignedReader, model.text(), ChunkEncoder(other))
    for name, other in model.tokenizers.items()
  }


def pad(
  rows_of_ids: Ids,
  rows: int,
  length: int,
  *,
  left: bool = True,
  first: Rows[int] | None = None,
) -> Sequence:
  """Ids as [rows, length], one segment a row; spare rows are padding.

  `first` gives the position of each row's first id, 0 if None.
  """
  out = Sequence(*(np.zeros((rows, length), np.int32) for _ in range(3)))
  for row, ids in enumerate(rows_of_ids):
    slots = _slots(len(ids), length, left)
    out.tokens[row, slots] = ids
    out.segments[row, slots] = 1
    begin = 0 if first is None else first[row]
    out.positions[row, slots.start :] = begin + np.arange(length - slots.start)
  return out


def _slots(count: int, length: int, left: bool) -> slice:
  """The slots of `count` tokens in a row that is padded on one side."""
  start = length - count if left else 0
  return slice(start, start + count)


def lay_out(
  spec: Composition,
  rows_of_ids: Ids,
  prompt_lengths: Rows[int],
  row_readers: Mapping[str, Rows[AlignedReader]],
  *,
  rows: int,
) -> Batch:
  """A batch of token rows, padded on the left, as every model reads them.

  Args:
    spec: the models.
    rows_of_ids: the anchor's tokens of each row.
    prompt_lengths: how many of them visibility="encoder" shows.
    row_readers: one reader a row, by name of the models with other tokens.
    rows: how many rows there are with the spare ones.

  Raises:
    InputError: an augmenting model reads more tokens than it was made for.
  """
  length = round_up(max(map(len, rows_of_ids)))
  ends_B1 = np.full((rows, 1), length, np.int32)
  for row, ids in enumerate(rows_of_ids):
    ends_B1[row] += prompt_lengths[row] - len(ids)
  shape = rows, length
  augmenting, visible = _augmenting_rows(
    spec, rows_of_ids, prompt_lengths, row_readers, shape, left=True
  )
  # Counts for all models, so that scoring masks as generation does.
  slots_BL = np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), shape)
  visible = {n: visible.get(n, slots_BL) for n, _ in spec.augmenting}
  ends_BL = np.broadcast_to(ends_B1, shape)
  return Batch(pad(rows_of_ids, *shape), augmenting, visible, ends_BL)


def token_batch(
  model: Model, tokens_BL: np.ndarray, prompt_length: int | None = None
) -> Batch:
  """A batch of full rows of the anchor's ids [B, L], without padding.

  The first `prompt_length` ids of each row are its prompt, if that is known.

  Raises:
    InputError: the anchor's tokenizer cannot tell what its ids spell, or an
      augmenting model reads more tokens than it was made for.
  """
  batch = plain_batch(np.asarray(tokens_BL, np.int32))
  shape = batch.anchor.tokens.shape
  if prompt_length is not None:
    ends_BL = np.full(shape, prompt_length, np.int32)
    batch = batch._replace(prompt_ends=ends_BL)
  if not model.tokenizers:
    return batch
  ids, given = batch.anchor.tokens.tolist(), [prompt_length or 0] * shape[0]
  row_readers = {n: [make() for _ in ids] for n, make in readers(model).items()}
  augmenting, visible = _augmenting_rows(
    model.spec, ids, given, row_readers, shape, left=False
  )
  return batch._replace(augmenting=augmenting, visible=visible)


def _augmenting_rows(
  spec: Composition,
  rows_of_ids: Ids,
  prompt_lengths: Rows[int],
  row_readers: Mapping[str, Rows[AlignedReader]],
  shape: tuple[int, int],
  left: bool,
) -> tuple[dict[str, Sequence], dict[str, np.ndarray]]:
  """`augmenting` and `visible` of a `Batch` whose anchor's rows have a shape;
  rows padded on the left have lengths rounded up."""
  B, L = shape
  augmenting, visible = {}, {}
  for name, row_reader in row_readers.items():
    texts = [
      reader.read(*row)
      for reader, *row in zip(
        row_reader, rows_of_ids, prompt_lengths, strict=True
      )
    ]
    longest = max(len(ids) for ids, _ in texts)
    check_length(name, dict(spec.augmenting)[name], longest)
    M = round_up(longest) if left else max(1, longest)
    augmenting[name] = pad([ids for ids, _ in texts], B, M, left=left)
    visible[name] = np.zeros((B, L), np.int32)
    for row, (ids, counts) in enumerate(texts):
      offset = _slots(len(ids), M, left).start
      slots = _slots(len(counts), L, left)
      visible[name][row, slots] = offset + np.array(counts)
  return augmenting, visible


def check_tokens(spec: Composition, tokens_BL) -> np.ndarray:
  """Full rows of the anchor's ids as an array; see `LanguageModel.logits`."""
  tokens_BL = np.asarray(tokens_BL)
  if tokens_BL.ndim != 2 or tokens_BL.dtype.kind not in "iu":
    got = f"{tokens_BL.dtype} {list(tokens_BL.shape)}"
    raise InputError(f"tokens must be integers [B, L], got {got}")
  V, limit, length = (
    spec.anchor.vocab_size,
    max_length(spec),
    tokens_BL.shape[1],
  )
  if tokens_BL.size and not 0 <= tokens_BL.min() <= tokens_BL.max() < V:
    raise InputError(
      f"token ids run from {tokens_BL.min()} to {tokens_BL.max()}; the "
      f"vocabulary has ids 0 to {V - 1}"
    )
  if length > limit:
    raise InputError(
      f"rows of {length} tokens exceed the models' length limit of {limit}"
    )
  return tokens_BL


def check_length(name: str, joined: Augmenting, length: int) -> None:
  """Raises InputError if an augmenting model would read beyond its limit."""
  if length > joined.config.max_length:
    raise InputError(
      f"augmenting model {name!r} would read {length} tokens of its own; its "
      f"length limit is {joined.config.max_length}"
    )


def max_length(spec: Composition, readers: Collection[str] = ()) -> int:
  """The longest sequence of the anchor's tokens that every model can read."""
  configs = [a.config for name, a in spec.augmenting if name not in readers]
  return min(c.max_length for c in [spec.anchor, *configs])


def round_up(n: int) -> int:
  """The next length that programs are compiled for."""
  if n > FINEST:
    return -(-n // FINEST) * FINEST
  return max(SHORTEST, 1 << (n - 1).bit_length())


def batches(
  rows_of_ids: Ids, batch_size: int
) -> Iterator[tuple[list[int], int]]:
  """(indices, rows) of batches of like length, so that padding stays small."""
  order = sorted(range(len(rows_of_ids)), key=lambda i: len(rows_of_ids[i]))
  rows = min(batch_size, 1 << max(len(order) - 1, 0).bit_length())
  for at in range(0, len(order), rows):
    yield order[at : at + rows], rows


def check_prompts(prompts: Ids, max_new_tokens: int, limit: int) -> None:
  """Raises InputError for a prompt that is empty, or too long to continue."""
  for i, ids in enumerate(prompts):
    if not ids:
      raise InputError(f"prompt {i} has no tokens: nothing to continue from")
    if len(ids) + max_new_tokens > limit:
      raise InputError(
        f"prompt {i} has {len(ids)} tokens; with max_new_tokens="
        f"{max_new_tokens} that exceeds the models' length limit of {limit}"
      )
