"""Rows of token ids, laid out so that few programs serve many lengths.

Prompts are padded on the left, so that all rows write the same cache slot at
each step; lengths and numbers of rows are rounded up.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Rows

import numpy as np

from calm_jax.composition.connections import Augmenting, Composition
from calm_jax.composition.model import Model
from calm_jax.core.batch import Batch, Sequence, plain_batch
from calm_jax.core.errors import InputError, check_int
from calm_jax.generation.replacements import Replacement
from calm_jax.text.alignment import AlignedReader, chunk_encoder

SHORTEST, FINEST = 32, 1024  # of the lengths that rows are padded to

Ids = Rows[Rows[int]]
# By name of each augmenting model with other tokens, one a row.
Readers = dict[str, list[AlignedReader]]


def batches(
  model: Model,
  rows_of_ids: Ids,
  prompt_lengths: Rows[int],
  batch_size: int,
  least: int = 1,
  replacement: Replacement | None = None,
) -> Iterator[tuple[list[int], Batch, Readers]]:
  """Batches of rows of like length, so that padding stays small.

  Args:
    model: reads the batches.
    rows_of_ids: the anchor's tokens of each row.
    prompt_lengths: how many of them visibility="encoder" shows.
    batch_size: rows of a batch at most, and
    least: at least; spare ones come last.
    replacement: of the augmenting models' states. The prompts of a batch then
      end at one slot, and a last batch with too few rows to take the states of
      others from gets those of the batch before as spare ones.

  Yields:
    (the places of its rows in `rows_of_ids`, a batch, readers that have read
    its rows).

  Raises:
    InputError: an augmenting model reads more tokens than it was made for.
  """
  order = sorted(range(len(rows_of_ids)), key=lambda i: len(rows_of_ids[i]))
  rows = min(batch_size, 1 << max(len(order) - 1, 0).bit_length())
  rows = max(rows, least)
  for at in range(0, len(order), rows):
    chosen = order[at : at + rows]
    read = chosen
    if replacement is not None and replacement.draw is not None:
      read = chosen + order[max(0, at - rows + len(chosen)) : at]
    ids = [rows_of_ids[i] for i in read]
    given = [prompt_lengths[i] for i in read]
    readers = _readers(model, len(read))
    aligned = replacement is not None
    batch = _left_padded(model.spec, ids, given, readers, rows, aligned)
    if replacement is not None:
      control = replacement.control(model.spec, ids, given, rows)
      batch = batch._replace(control=control)
    yield chosen, batch, readers


def token_batch(
  model: Model, tokens_BL: np.ndarray, prompt_length: int | None = None
) -> Batch:
  """A batch of full rows of the anchor's ids [B, L], without padding.

  The first `prompt_length` ids of each row are its prompt, if that is known.

  Raises:
    InputError: tokens_BL is not that, has an id outside the vocabulary or rows
      that are longer than a model reads; or the anchor's tokenizer cannot tell
      what its ids spell.
  """
  tokens_BL = _check_ids(model, tokens_BL, "tokens", 2)
  limit = model.max_length
  if (length := tokens_BL.shape[1]) > limit:
    raise InputError(
      f"rows of {length} tokens exceed the models' length limit of {limit}"
    )
  batch = plain_batch(tokens_BL.astype(np.int32))
  shape = batch.anchor.tokens.shape
  if prompt_length is not None:
    prompt_length = check_int("prompt_length", prompt_length, 0, shape[1])
    # Without a prompt or BOS nothing predicts the first token: it is given.
    ends_BL = np.full(shape, max(prompt_length, 1), np.int32)
    batch = batch._replace(prompt_ends=ends_BL)
  readers = _readers(model, shape[0])
  ids, given = batch.anchor.tokens.tolist(), [prompt_length or 0] * shape[0]
  augmenting, visible = _augmenting_rows(
    model.spec, ids, given, readers, shape, left=False
  )
  return batch._replace(augmenting=augmenting, visible=visible)


def _check_ids(model: Model, ids, name: str, ndim: int) -> np.ndarray:
  """Returns ids as an array that is not empty; raises InputError for what is
  none, and for ids that a model which reads them has no row for."""
  try:
    array = np.asarray(ids)
  except ValueError as error:
    raise InputError(f"{name} are rows of different lengths") from error
  if array.ndim != ndim or not array.size or array.dtype.kind not in "iu":
    raise InputError(
      f"{name} must be integers [{'B, L' if ndim == 2 else 'L'}], got "
      f"{array.dtype} {list(array.shape)}"
    )
  least, most, V = array.min(), array.max(), model.num_ids
  if not 0 <= least <= most < V:
    pieces = model.tokenizer.pieces if model.tokenizer else ()
    piece = f" ({pieces[most]!r})" if V <= most < len(pieces) else ""
    raise InputError(
      f"{name}: token ids run from {least} to {most}{piece}; the vocabulary "
      f"has ids 0 to {V - 1}, the rows of the smallest table that is read"
    )
  return array


def _readers(model: Model, rows: int) -> Readers:
  return {
    name: [
      AlignedReader(model.text(), chunk_encoder(other)) for _ in range(rows)
    ]
    for name, other in model.tokenizers.items()
  }


def _left_padded(
  spec: Composition,
  rows_of_ids: Ids,
  prompt_lengths: Rows[int],
  readers: Readers,
  rows: int,
  aligned: bool = False,
) -> Batch:
  """A batch of token rows, padded on the left, as every model reads them.

  If `aligned`, they are padded on the right too, so that prompts end together.
  """
  lengths = np.array([len(ids) for ids in rows_of_ids])
  gaps = _gaps(lengths, prompt_lengths, aligned)
  L = round_up(int(max(lengths + gaps)))
  shape = rows, L
  ends_B1 = np.full((rows, 1), L, np.int32)
  ends_B1[: len(lengths), 0] += prompt_lengths - lengths - gaps
  augmenting, visible = _augmenting_rows(
    spec, rows_of_ids, prompt_lengths, readers, shape, True, aligned
  )
  # Counts for all models, so that scoring masks as generation does.
  slots_BL = np.broadcast_to(np.arange(1, L + 1, dtype=np.int32), shape)
  visible = {n: visible.get(n, slots_BL) for n, _ in spec.augmenting}
  ends_BL = np.broadcast_to(ends_B1, shape)
  anchor = pad(rows_of_ids, *shape, gaps=gaps)
  return Batch(anchor, augmenting, visible, ends_BL)


def _gaps(lengths: np.ndarray, prompts: Rows[int], aligned: bool) -> np.ndarray:
  """Returns the slots after each row that let prompts end together, or 0."""
  after = np.subtract(lengths, prompts)
  return after.max() - after if aligned else np.zeros_like(after)


def _augmenting_rows(
  spec: Composition,
  rows_of_ids: Ids,
  prompt_lengths: Rows[int],
  readers: Readers,
  shape: tuple[int, int],
  left: bool,
  aligned: bool = False,
) -> tuple[dict[str, Sequence], dict[str, np.ndarray]]:
  """`augmenting` and `visible` of a `Batch` whose anchor's rows have a shape.

  Rows padded on the left have lengths rounded up. If `aligned`, all prompts end
  together, in each model's rows.
  """
  B, L = shape
  lengths = np.array([len(ids) for ids in rows_of_ids])
  gaps = _gaps(lengths, prompt_lengths, aligned)
  augmenting, visible = {}, {}
  for name, row_readers in readers.items():
    texts = [
      reader.read(ids, given)
      for reader, ids, given in zip(
        row_readers, rows_of_ids, prompt_lengths, strict=True
      )
    ]
    lengths = np.array([len(ids) for ids, _ in texts])
    check_length(name, dict(spec.augmenting)[name], lengths.max())
    ends = [
      counts[max(given, 1) - 1]
      for (_, counts), given in zip(texts, prompt_lengths, strict=True)
    ]
    own_gaps = _gaps(lengths, ends, aligned)
    longest = int(max(lengths + own_gaps))
    M = round_up(longest) if left else max(1, longest)
    rows = [ids for ids, _ in texts]
    augmenting[name] = pad(rows, B, M, left=left, gaps=own_gaps)
    visible[name] = np.zeros((B, L), np.int32)
    for row, (ids, counts) in enumerate(texts):
      offset = _slots(len(ids), M, left, own_gaps[row]).start
      slots = _slots(len(counts), L, left, gaps[row])
      visible[name][row, slots] = offset + np.array(counts)
  return augmenting, visible


def pad(
  rows_of_ids: Ids,
  rows: int,
  length: int,
  *,
  left: bool = True,
  first: Rows[int] | np.ndarray | None = None,
  gaps: np.ndarray | None = None,
) -> Sequence:
  """Ids as [rows, length], one segment a row; spare rows are padding.

  `first` gives the position of each row's first id, 0 if None; `gaps`, if they
  are padded on the left, the slots that stay free after each.
  """
  out = Sequence(*(np.zeros((rows, length), np.int32) for _ in range(3)))
  for row, ids in enumerate(rows_of_ids):
    gap = 0 if gaps is None else gaps[row]
    slots = _slots(len(ids), length, left, gap)
    out.tokens[row, slots] = ids
    out.segments[row, slots] = 1
    begin = 0 if first is None else first[row]
    out.positions[row, slots.start :] = begin + np.arange(length - slots.start)
  return out


def _slots(count: int, length: int, left: bool, gap: int = 0) -> slice:
  """The slots of `count` tokens in a row that is padded on one side, but for
  a gap after those that are padded on the left."""
  start = length - count - gap if left else 0
  return slice(start, start + count)


def round_up(n: int) -> int:
  """The next length that programs are compiled for."""
  if n > FINEST:
    return -(-n // FINEST) * FINEST
  return max(SHORTEST, 1 << (n - 1).bit_length())


def allowed_ids(model: Model) -> np.ndarray | None:
  """True at the ids that may be picked, bool [V]; None if all of them may.

  Tables are padded with rows that are no token of the tokenizer, and what
  training never touched there may be the likeliest.
  """
  V, ids = model.spec.anchor.vocab_size, np.arange(model.num_ids)
  if model.tokenizer is not None:
    ids = model.tokenizer.ids[model.tokenizer.ids < model.num_ids]
  if len(ids) == V:
    return None
  allowed_V = np.zeros(V, bool)
  allowed_V[ids] = True
  return allowed_V


def num_readable(
  model: Model, ids: Rows[int], prompt_length: int, new_tokens: int = 0
) -> int:
  """Counts the ids of the anchor, from the first on, that all models can read.

  Each is left room for `new_tokens` of its own.
  """
  count = min(len(ids), model.max_length - new_tokens)
  joined = dict(model.spec.augmenting)
  for name in model.tokenizers:
    limit, last = joined[name].config.max_length - new_tokens, -1
    while count != last:  # The end of a prompt that is cut closes a chunk.
      last, [reader] = count, _readers(model, 1)[name]
      _, visible = reader.read(ids[:count], min(prompt_length, count))
      count = int(np.searchsorted(visible, limit, "right"))
  return count


def check_length(name: str, joined: Augmenting, length: int) -> None:
  """Raises InputError if an augmenting model would read beyond its limit."""
  if length > joined.config.max_length:
    raise InputError(
      f"augmenting model {name!r} would read {length} tokens of its own; its "
      f"length limit is {joined.config.max_length}: shorten the text, or "
      "generate fewer tokens"
    )


def check_rows(
  model: Model,
  rows_of_ids: Ids,
  name: str = "prompt",
  max_new_tokens: int = 0,
  is_filled: bool = True,
) -> list[list[int]]:
  """Returns rows of ids as lists; InputError for one that cannot be read.

  It is too long to continue, an id is outside the vocabulary, or there is none
  though it must be filled.
  """
  limit, rows = model.max_length, []
  for i, ids in enumerate(rows_of_ids):
    ids = [] if ids is None else ids
    if len(ids):
      ids = _check_ids(model, ids, f"{name} {i}", 1).tolist()
    elif is_filled:
      raise InputError(f"{name} {i} has no tokens: nothing to continue from")
    rows.append(ids)
    if len(ids) + max_new_tokens > limit:
      raise InputError(
        f"{name} {i} has {len(ids)} tokens; with max_new_tokens="
        f"{max_new_tokens} that exceeds the models' length limit of {limit}"
      )
  return rows
