"""Fills the leaves of a parameter tree from the tensors of a checkpoint."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from calm_jax.models import quantisation
from calm_jax.models.hf import tensor_reader
from calm_jax.models.hf.tensor_tables import Entry
from calm_jax.models.hf.weight_files import Tensor

Array = jax.Array | np.ndarray
_AT_ONCE = 1 << 22  # weights that are quantised together


class StoredModel(NamedTuple):
  """A checkpoint that was opened and checked; no tensor is read yet."""

  tensors: dict[str, Tensor]
  entries: dict[str, list[Entry]]  # the parts of tensors that fill each leaf
  shapes: dict[str, tuple[int, ...]]  # of each leaf


def read(
  stored: StoredModel,
  names: Sequence[str],
  dtype: Any,
  shardings: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
  """Reads leaves by name, all pieces in the order of the files.

  Args:
    shardings: a `jax.sharding.Sharding` for each leaf, of which this process
      then reads what its devices hold. None for whole numpy arrays.
  """
  places = dict.fromkeys(names) if shardings is None else shardings
  blocks = {n: _blocks(stored.shapes[n], dtype, places[n]) for n in names}
  tensor_reader.read_all(
    read
    for name, parts in blocks.items()
    for start, block in parts.items()
    for read in reads(stored.tensors, stored.entries[name], block, start)
  )
  return {n: _assemble(blocks[n], stored.shapes[n], places[n]) for n in names}


def read_quantised(
  stored: StoredModel,
  name: str,
  kind: str,
  shardings: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
  """Reads one leaf in float32, and returns the arrays that stand for it.

  Their names are such as "layers/.../kernel/int8". Without shardings the
  float32 weights of a part of a layer are held at a time.
  """
  if shardings is None:
    arrays = _quantise_in_parts(stored, name, kind)
  else:
    start = f"{name}/"
    leaves = [leaf for leaf in shardings if leaf.startswith(start)]
    places = {leaf.removeprefix(start): shardings[leaf] for leaf in leaves}
    # The float32 weights are sharded as the integers will be.
    [values] = [s for part, s in places.items() if part != "scale"]
    whole = read(stored, [name], "float32", {name: values})[name]
    make = functools.partial(quantisation.quantise_leaf, name, kind=kind)
    arrays = jax.block_until_ready(jax.jit(make, out_shardings=places)(whole))
  return {f"{name}/{part}": array for part, array in arrays.items()}


def reads(
  tensors: Mapping[str, Tensor],
  entries: Sequence[Entry],
  block: np.ndarray,
  start: Sequence[int],
) -> Iterator[tensor_reader.Read]:
  """Yields the reads that fill the block of a leaf from index `start` on."""
  stop = [a + n for a, n in zip(start, block.shape, strict=True)]
  for entry in entries:
    axes = len(entry.at)
    at = [i - a for i, a in zip(entry.at, start, strict=False)]
    low = max(entry.columns.start, start[-1])
    high = min(entry.columns.stop, stop[-1])
    inside = all(0 <= i < n for i, n in zip(at, block.shape, strict=False))
    if inside and low < high:
      target = block[(*at, ..., slice(low - start[-1], high - start[-1]))]
      shift = entry.start - entry.columns.start
      columns = slice(low + shift, high + shift)
      region = (*map(slice, start[axes:-1], stop[axes:-1]), columns)
      if entry.transposed:
        region, target = region[::-1], target.T
      yield tensor_reader.Read(tensors[entry.tensor], region, target)


def _blocks(shape, dtype, sharding) -> dict[tuple[int, ...], np.ndarray]:
  """Memory for the parts of a leaf that this process holds, by first index."""
  indices = [(slice(None),) * len(shape)]
  if sharding is not None:
    indices = sharding.addressable_devices_indices_map(shape).values()
  blocks: dict[tuple[int, ...], np.ndarray] = {}
  for index in indices:
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    start = tuple(a for a, _ in bounds)
    if start not in blocks:
      size = tuple(b - a for a, b in bounds)
      blocks[start] = tensor_reader.empty(size, dtype)
  return blocks


def _assemble(blocks, shape, sharding) -> Array:
  """The leaf of which `_blocks` are the parts."""
  if sharding is None:
    [whole] = blocks.values()
    return whole

  def block(index):
    starts = (s.indices(n)[0] for s, n in zip(index, shape, strict=True))
    return blocks[tuple(starts)]

  whole = jax.make_array_from_callback(shape, sharding, block)
  # Or the buffers of leaf after leaf would wait for the device together.
  return whole.block_until_ready()


def _quantise_in_parts(
  stored: StoredModel, name: str, kind: str
) -> dict[str, np.ndarray]:
  """A leaf in few bits, of which a part of a layer at a time is read."""
  shape = stored.shapes[name]
  make = functools.partial(quantisation.quantise_leaf, name)
  whole = jax.ShapeDtypeStruct(shape, np.float32)
  made = jax.eval_shape(functools.partial(make, kind=kind), whole)
  if "int8" in made:
    kind = "int8"  # A part of an odd axis may be even.
  arrays = {n: tensor_reader.empty(x.shape, x.dtype) for n, x in made.items()}
  last = len(shape) - 1
  inputs = quantisation.input_axis(name, len(shape))
  cut = 2 * last - 1 - inputs  # the other one of the last two axes
  step = 2 * max(1, _AT_ONCE // (2 * shape[inputs]))
  for lead in np.ndindex(shape[:-2]):
    entries = [e for e in stored.entries[name] if e.at == lead]
    for at in range(0, shape[cut], step):
      stop = min(at + step, shape[cut])
      start, size = [*lead, 0, 0], [*(1 for _ in lead), *shape[-2:]]
      start[cut], size[cut] = at, stop - at
      block = tensor_reader.empty(tuple(size), np.float32)
      tensor_reader.read_all(reads(stored.tensors, entries, block, start))
      for part, x in make(block, kind=kind).items():
        share = 2 if part == "int4" and cut == last else 1
        where = [slice(i, i + 1) for i in lead] + [slice(None)] * 2
        where[cut] = slice(at // share, stop // share)
        arrays[part][tuple(where)] = x
  return arrays
