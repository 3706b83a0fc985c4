"""Text examples to batches, mixtures, and resumable iteration over sources."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import grain

from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError
from calm_jax.data.packing import host_rows
from calm_jax.data.rows import Epochs, RowTable, TextSource
from calm_jax.data.segments import TextLike, segments
from calm_jax.text.alignment import ChunkEncoder
from calm_jax.text.tokenizer import Tokenizer


class BatchSource(Protocol):
  """Random access to global batches, as `make_iterator` takes it."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Batch: ...

  def describe(self, index: int) -> str: ...

  @property
  def fingerprint(self) -> str: ...


def text_source(
  examples: Sequence[TextLike],
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  length: int,
  pack: bool = True,
  seed: int | None,
  process_index: int = 0,
  process_count: int = 1,
  augmenting: Mapping[str, ChunkEncoder] = MappingProxyType({}),
  augmenting_length: int = 0,
  too_long: str = "error",
) -> TextSource:
  """Tokenises examples and lays them out in rows of `length` slots.

  An example is BOS + prompt + completion + EOS, as far as the tokenizer has
  them. Plain text (an empty prompt) longer than a row goes on in windows, each
  of which starts with the last token of the one before, so that every token is
  a target once. All tokens are held in memory.

  Args:
    examples: of `read_source`, or of `calm_jax.data.arithmetic.examples`.
    tokenizer: of the model to train.
    batch_size: B, rows of the global batch.
    length: L, slots of a row.
    pack: fill rows with consecutive examples; else one example a row.
    seed: the rows come in an endless random order, another one each epoch,
      and the examples are shuffled before they are packed. None: one pass in
      order, the last batch filled up with empty rows.
    process_index, process_count: which share of the rows to take.
    augmenting: by name, of the augmenting models with other tokens.
    augmenting_length: M, slots of a row of theirs; 0 for what the longest
      row needs.
    too_long: what becomes of an example with a prompt that is longer than a
      row: "error"; "cut", its completion loses its end, and it is dropped if
      nothing is left of that; "drop". `TextSource.truncation` counts them.

  Raises:
    InputError: no examples, an example with a prompt longer than a row, or
      `tokenizer` cannot tell where its tokens end and has to.
  """
  if not examples:
    raise InputError("there are no examples to make batches of")
  return _make(
    {"": (examples, 1.0)},
    tokenizer,
    batch_size=batch_size,
    length=length,
    pack=pack,
    seed=seed,
    rows=host_rows(batch_size, process_index, process_count),
    augmenting=augmenting,
    augmenting_length=augmenting_length,
    too_long=too_long,
  )


def mix(
  parts: Mapping[str, tuple[Sequence[TextLike], float]],
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  **options,
) -> TextSource:
  """A mixture of examples: rows of several parts, in proportion to weights.

  Each part is packed, shuffled and repeated on its own: each of its rows comes
  once in each of its epochs, in an order that its name and `seed` say, whatever
  the other parts are. All have the same shapes. A single part gives the batches
  of `text_source`.

  Args:
    parts: examples and weight of each part, by name. Of any long run of rows,
      a part has its weight's share to the row, and the weights themselves are
      kept to 0.5%.
    tokenizer, batch_size, seed, process_index, process_count, options: see
      `text_source`.

  Raises:
    InputError: no parts, a part without examples, a weight that is not above 0,
      no seed; and as `text_source`.
  """
  if not parts:
    raise InputError("a mixture without parts")
  if seed is None:
    raise InputError("a mixture has no end, so it takes a seed")
  for name, (examples, weight) in parts.items():
    if not examples:
      raise InputError(f"the part {name!r} of the mixture has no examples")
    if not 0 < weight < float("inf"):
      raise InputError(
        f"the part {name!r} of the mixture has the weight {weight}; it must be"
        " above 0: leave the part out to have none of it"
      )
  return _make(
    parts,
    tokenizer,
    batch_size=batch_size,
    seed=seed,
    rows=host_rows(batch_size, process_index, process_count),
    **options,
  )


def eval_batches(
  examples: Sequence[TextLike],
  tokenizer: Tokenizer,
  *,
  pack: bool = False,
  **options,
) -> Iterator[Batch]:
  """One pass over `examples` in order, nothing dropped; see `text_source`.

  Empty rows (segments and weights 0) fill the last batch, so that all batches
  have one shape and all hosts the same number of them.
  """
  source = text_source(examples, tokenizer, pack=pack, seed=None, **options)
  return (source[i] for i in range(len(source)))


def _make(
  parts: Mapping[str, tuple[Sequence[TextLike], float]],
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  length: int,
  seed: int | None,
  rows: slice,
  pack: bool = True,
  augmenting: Mapping[str, ChunkEncoder] = MappingProxyType({}),
  augmenting_length: int = 0,
  too_long: str = "error",
) -> TextSource:
  if length < 2:
    raise InputError(f"length {length}: a row needs at least 2 slots")
  several = len(parts) > 1
  seeds = {name: _seed(seed, name) if several else seed for name in parts}
  made = {
    name: segments(
      examples, tokenizer, length, seeds[name], augmenting, augmenting_length,
      too_long,
    )
    for name, (examples, _) in parts.items()
  }  # fmt: skip
  table = RowTable(
    made, length=length, augmenting_length=augmenting_length, pack=pack
  )
  order, weights = None, {}
  if seed is not None:
    orders = [Epochs(table.ranges[name], seeds[name]) for name in parts]
    order = orders[0]
  if several:
    least = min(weight for _, weight in parts.values())
    # grain scales the least to 100 and drops the rest; here, nothing is left.
    weights = {n: round(100 * w / least) for n, (_, w) in parts.items()}
    order = grain.MapDataset.mix(
      [grain.MapDataset.source(rows) for rows in orders], list(weights.values())
    )
  return TextSource(
    table,
    order,
    batch_size=batch_size,
    seed=seed,
    rows=rows,
    weights=weights,
    truncation={name: part.truncation for name, part in made.items()},
  )


def _seed(seed: int, name: str) -> int:
  """Of a part, so that parts do not follow each other's order."""
  digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
  return int.from_bytes(digest[:4], "little")


class BatchIterator(Iterator[Batch]):
  """Iterates over a source. Made by `make_iterator`."""

  def __init__(self, source: BatchSource, iterator):
    self._source = source
    self._iterator = iterator

  def __next__(self) -> Batch:
    return next(self._iterator)

  @property
  def next_index(self) -> int:
    """Index in the source of the batch that comes next."""
    return self._iterator.get_state()["next_index"]

  def get_state(self) -> dict:
    """Where the iteration stands, as JSON can hold it."""
    return {"next_index": self.next_index, "source": self._source.fingerprint}

  def set_state(self, state: dict) -> None:
    """Continues exactly from a state of `get_state`.

    Raises:
      InputError: the state is of another sequence of batches.
    """
    if state["source"] != self._source.fingerprint:
      raise InputError(
        "the saved position belongs to other data: the examples, tokenizer,"
        " seed, batch_size, length or task have changed since it was saved;"
        " restore them, or start a new run"
      )
    self._iterator.set_state({"next_index": state["next_index"]})

  def close(self) -> None:
    """Stops reading ahead."""
    self._iterator.close()


def make_iterator(
  source: BatchSource, *, start: int = 0, prefetch: int = 2, threads: int = 1
) -> BatchIterator:
  """Iterates over `source` from batch `start`, reading ahead in threads.

  The order of the batches does not depend on `prefetch` or `threads`.

  Args:
    source: a `TextSource` or an `ArithmeticSource`.
    start: index of the first batch.
    prefetch: how many batches to prepare ahead; 0 for none.
    threads: how many threads prepare them.

  Raises:
    InputError: `start` is beyond the end of the source.
  """
  if not 0 <= start <= len(source):
    raise InputError(f"start {start}: the data has {len(source)} batches")
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=prefetch
  )
  dataset = grain.MapDataset.source(source).to_iter_dataset(options)
  iterator = iter(dataset)
  iterator.set_state({"next_index": start})
  return BatchIterator(source, iterator)
