"""Leaves read from the tensors of files: whole, in shards, in few bits."""

from __future__ import annotations

import functools

import jax
import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.models import quantisation
from calm_jax.models.hf import safetensors, tensors

_AT_ONCE = 1 << 22  # weights that are quantised together


def view_shape(entry: tensors.Entry) -> tuple[int, ...]:
  """The shape of the part of a leaf that an entry is."""
  return entry.view(np.empty(entry.shape, bool)).shape  # touches no memory


def reads(found, entries: list[tensors.Entry], block: np.ndarray, start):
  """What fills the block of a leaf that begins at index `start`."""
  stop = [a + n for a, n in zip(start, block.shape, strict=True)]
  for entry in entries:
    axes = len(entry.at)
    inside = zip(start, entry.at, stop, strict=False)
    if all(a <= i < b for a, i, b in inside):
      at = tuple(i - a for i, a in zip(entry.at, start, strict=False))
      region = tuple(map(slice, start[axes:], stop[axes:]))
      yield safetensors.Read(
        found[entry.tensor],
        entry.view,
        *_split(entry, region, block[(*at, ...)]),
      )


def _split(entry: tensors.Entry, region: tuple[slice, ...], target: np.ndarray):
  """A region of leaf[at] and its block, with the view's axes.

  Where a file has parts that take turns head by head, the view splits the last
  axis into heads.
  """
  *_, width = shape = view_shape(entry)
  if len(shape) == len(region):
    return region, target
  *outer, last = region
  if last.start % width or last.stop % width:
    raise InputError(
      f"{entry} is sharded inside heads of {width}, which {entry.tensor} does "
      "not allow; shard it between heads or along another axis"
    )
  heads = slice(last.start // width, last.stop // width)
  target = target.reshape(*target.shape[:-1], -1, width)
  return (*outer, heads, slice(0, width)), target


def sharded(found, entries, shape, dtype, sharding) -> jax.Array:
  """One leaf, of which this process reads what its devices hold."""
  blocks: dict[tuple, np.ndarray] = {}
  held = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    start = tuple(a for a, _ in bounds)
    held[device] = start
    # Devices that hold the same part share what is read for them.
    if start not in blocks:
      size = tuple(b - a for a, b in bounds)
      blocks[start] = safetensors.empty(size, dtype)
  safetensors.read_all(
    read
    for start, block in blocks.items()
    for read in reads(found, entries, block, start)
  )
  arrays = [jax.device_put(blocks[s], device) for device, s in held.items()]
  whole = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
  # Or the buffers of leaf after leaf would wait for the device together.
  return whole.block_until_ready()


def quantised(
  found, entries: list[tensors.Entry], name: str, shape, kind: str
) -> dict[str, np.ndarray]:
  """A leaf in few bits, of which a part of a layer at a time is read."""
  make = functools.partial(quantisation.of_leaf, name)
  whole = jax.ShapeDtypeStruct(shape, np.float32)
  made = jax.eval_shape(functools.partial(make, kind=kind), whole)
  if "int8" in made:
    kind = "int8"  # A part of an odd axis may be even.
  held = {part: safetensors.empty(x.shape, x.dtype) for part, x in made.items()}
  last = len(shape) - 1
  inputs = quantisation.input_axis(name, len(shape))
  cut = 2 * last - 1 - inputs  # of the last two axes the other one
  step = 2 * max(1, _AT_ONCE // (2 * shape[inputs]))
  if len(view_shape(entries[0])) + len(entries[0].at) > len(shape):
    step = shape[cut]  # or parts would end inside of heads
  for lead in np.ndindex(shape[:-2]):
    for at in range(0, shape[cut], step):
      stop = min(at + step, shape[cut])
      start, size = [*lead, 0, 0], [*(1 for _ in lead), *shape[-2:]]
      start[cut], size[cut] = at, stop - at
      block = safetensors.empty(tuple(size), np.float32)
      safetensors.read_all(reads(found, entries, block, tuple(start)))
      for part, x in make(block, kind=kind).items():
        share = 2 if part == "int4" and cut == last else 1
        where = [slice(i, i + 1) for i in lead] + [slice(None)] * 2
        where[cut] = slice(at // share, stop // share)
        held[part][tuple(where)] = x
  return held
