"""Leaves read from the tensors of files: whole, in shards, in few bits."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

from calm_jax.errors import InputError
from calm_jax.models import hf, quantisation, streaming

_AT_ONCE = 1 << 24  # weights that are quantised together


def view_shape(entry: hf.Entry) -> tuple[int, ...]:
  """The shape of the part of a leaf that an entry is."""
  return entry.view(np.empty(entry.shape, bool)).shape  # touches no memory


def reads(found, entries: list[hf.Entry], block: np.ndarray, start):
  """What fills the block of a leaf that begins at index `start`."""
  stop = [a + n for a, n in zip(start, block.shape, strict=True)]
  for entry in entries:
    axes = len(entry.at)
    inside = zip(start, entry.at, stop, strict=False)
    if all(a <= i < b for a, i, b in inside):
      at = tuple(i - a for i, a in zip(entry.at, start, strict=False))
      region = tuple(map(slice, start[axes:], stop[axes:]))
      yield streaming.Read(
        found[entry.tensor],
        entry.view,
        *_split(entry, region, block[(*at, ...)]),
      )


def _split(entry: hf.Entry, region: tuple[slice, ...], target: np.ndarray):
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
      blocks[start] = streaming.empty(size, dtype)
  streaming.read_all(
    read
    for start, block in blocks.items()
    for read in reads(found, entries, block, start)
  )
  arrays = [jax.device_put(blocks[s], device) for device, s in held.items()]
  whole = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
  # Or the buffers of leaf after leaf would wait for the device together.
  return whole.block_until_ready()


def quantised(
  found, entries: list[hf.Entry], name: str, shape, kind: str
) -> dict[str, np.ndarray]:
  """A leaf in few bits, of which a part at a time is read."""
  make = functools.partial(quantisation.of_leaf, name, kind=kind)
  made = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, np.float32))
  held = {part: streaming.empty(x.shape, x.dtype) for part, x in made.items()}
  step = max(1, _AT_ONCE // math.prod(shape[1:]))
  if quantisation.input_axis(name, len(shape)) == 0:
    step = shape[0]  # which has one scale
  for at in range(0, shape[0], step):
    block = streaming.empty((min(step, shape[0] - at), *shape[1:]), np.float32)
    start = (at, *(0 for _ in shape[1:]))
    streaming.read_all(reads(found, entries, block, start))
    for part, x in make(block).items():
      held[part][at : at + step] = x
  return held
