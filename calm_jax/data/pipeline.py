"""Text examples to batches, mixtures, and resumable iteration over sources."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import grain

from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError
from calm_jax.data.documents import RowOptions, make_segments
from calm_jax.data.examples import TextExample
from calm_jax.data.rows import TextSource

# NumPy computes outside of Python's lock, and a GPU can train a small model on
# a batch in less time than one thread takes to make the next.
_THREADS = 4


class BatchSource(Protocol):
  """Random access to global batches, as `BatchIterator` takes it."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Batch: ...

  def describe(self, index: int) -> str: ...

  @property
  def fingerprint(self) -> str: ...


def text_source(
  parts: Mapping[str, tuple[Sequence[TextExample], float]], options: RowOptions
) -> TextSource:
  """Tokenises examples and lays them out in rows, of one part or of a mixture.

  Each part is packed, shuffled and repeated on its own: each of its rows comes
  once in each of its epochs, in an order that its name and the seed say,
  whatever the other parts are. All tokens are held in memory.

  Args:
    parts: examples and weight of each part, by name; the name of the only part
      may be "". Of any long run of rows, a part has its weight's share to the
      row, and the weights themselves are kept to 0.5%.
    options: the tokenizers, the shape and the order of the rows.

  Raises:
    InputError: parts that cannot be mixed, an example that is too long or has
      nothing to predict, or a tokenizer that cannot tell where its tokens end.
  """
  if not parts:
    raise InputError("a mixture without parts")
  if len(parts) > 1 and options.seed is None:
    raise InputError("a mixture has no end, so it takes a seed")
  for name, (examples, weight) in parts.items():
    if not examples:
      where = f"the part {name!r} of the mixture has no examples"
      nothing = "there are no examples to make batches of"
      raise InputError(where if name else nothing)
    if not 0 < weight < float("inf"):
      raise InputError(
        f"the part {name!r} of the mixture has the weight {weight}; it must be"
        " above 0: leave the part out to have none of it"
      )
  seeds, weights = dict.fromkeys(parts, options.seed), {}
  if len(parts) > 1:
    seeds = {name: _part_seed(options.seed, name) for name in parts}
    least = min(weight for _, weight in parts.values())
    # grain scales the least to 100 and drops the rest; here, nothing is left.
    weights = {n: round(100 * w / least) for n, (_, w) in parts.items()}
  segments = {
    name: make_segments(examples, options, seeds[name])
    for name, (examples, _) in parts.items()
  }
  return TextSource(segments, seeds, weights, options)


def _part_seed(seed: int | None, name: str) -> int:
  """A seed for each part, so that parts do not follow each other's order."""
  digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
  return int.from_bytes(digest[:4], "little")


class BatchIterator(Iterator[Batch]):
  """Iterates over a source, reads ahead in threads, and can be resumed."""

  def __init__(self, source: BatchSource):
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=8)
    batches = grain.MapDataset.source(source).to_iter_dataset(options)
    self._source, self._iterator = source, iter(batches)

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> dict:
    """The position of the iteration, as JSON can hold it."""
    index = self._iterator.get_state()["next_index"]
    return {"next_index": index, "source": self._source.fingerprint}

  def set_state(self, state: dict) -> None:
    """Continues exactly from a state of `get_state` of the same batches."""
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
