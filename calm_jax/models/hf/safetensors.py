"""Tensors of safetensors files, read into place piece by piece.

Nothing is mapped, since touched pages of a mapping count as memory; a piece is
read straight to where it belongs, or through a small buffer where it must be
cast or transposed on the way.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib.array_utils import byte_bounds

from calm_jax.core.errors import InputError
from calm_jax.core.hub import INDEX, WEIGHTS

SHARD = "model-{:05}-of-{:05}.safetensors"
FLOATS = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_PIECE = 4 << 20  # bytes of a file that are read at once
_STRIP = 128  # rows transposed together, few enough for a core's cache
# More than cores: some wait for the disk while others transpose.
_THREADS = min(16, 2 + (os.cpu_count() or 1))
_ALIGNMENT = 64  # of memory that JAX uses as it is, on a CPU


class Tensor(NamedTuple):
  """A tensor in a file: `start` is its first byte there."""

  name: str
  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  start: int

  def __str__(self) -> str:
    return f"{self.name} {list(self.shape)} ({self.path.name})"


class Read(NamedTuple):
  """A part of a tensor, and where it goes.

  Attributes:
    tensor: where to read.
    view: the tensor's array -> a numpy view of it.
    region: which part of that view; a tuple of slices.
    target: array of the region's shape.
  """

  tensor: Tensor
  view: Callable[[np.ndarray], np.ndarray]
  region: tuple[slice, ...]
  target: np.ndarray


class Piece(NamedTuple):
  """Bytes of a file, [start, stop), and where they go.

  `strides` (in elements) and `shape` say how `target` lies in them, from
  element `offset` on; `contiguous`, that it is all of them in their order.
  """

  path: pathlib.Path
  start: int
  stop: int
  dtype: np.dtype
  offset: int
  strides: tuple[int, ...]
  shape: tuple[int, ...]
  contiguous: bool
  target: np.ndarray


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
  """Memory that `jax.device_put` takes over without a copy, on a CPU."""
  dtype = np.dtype(dtype)
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  skip = -raw.ctypes.data % _ALIGNMENT
  return raw[skip : skip + size].view(dtype).reshape(shape)


def pieces(read: Read) -> Iterator[Piece]:
  """The parts of a file that a read needs, each of a few megabytes."""
  # One byte an element, never touched: only its strides are looked at.
  probe = np.empty(read.tensor.shape, np.uint8)
  source = read.view(probe)[read.region]
  if not source.size:
    return
  if not np.may_share_memory(source, probe):
    raise ValueError(
      f"the view of {read.tensor} is a copy, which reads nothing"
    )
  dtype = FLOATS[read.tensor.dtype]
  for part, target in _split(source, read.target, _PIECE // dtype.itemsize):
    low, high = byte_bounds(part)
    first = read.tensor.start - probe.ctypes.data * dtype.itemsize
    yield Piece(
      read.tensor.path,
      first + low * dtype.itemsize,
      first + high * dtype.itemsize,
      dtype,
      part.ctypes.data - low,
      part.strides,
      part.shape,
      part.flags.c_contiguous,
      target,
    )


def _split(source, target, limit: int):
  """Cuts both arrays alike, so that each part of `source` spans <= limit."""
  low, high = byte_bounds(source)
  if high - low <= limit:
    yield source, target
    return
  strides = [
    abs(stride) if n > 1 else 0
    for n, stride in zip(source.shape, source.strides, strict=True)
  ]
  axis = strides.index(max(strides))
  step = max(1, limit // strides[axis])
  for at in range(0, source.shape[axis], step):
    here = (slice(None),) * axis + (slice(at, at + step),)
    yield from _split(source[here], target[here], limit)


def read_all(reads: Iterable[Read]) -> None:
  """Does all reads, in the order of the files.

  Raises:
    InputError: a file ends before a tensor does, or cannot be read.
  """
  todo = [piece for read in reads for piece in pieces(read)]
  todo.sort(key=lambda piece: (piece.path, piece.start))
  if not todo:
    return
  # A list's iterator can be shared: each piece goes to one thread.
  rest = iter(todo)

  def work(_):
    # Kept, since fresh memory is zeroed by the system whenever it is taken.
    raw = np.empty(max(piece.stop - piece.start for piece in todo), np.uint8)
    for piece in rest:
      _do(piece, raw[: piece.stop - piece.start])

  count = min(_THREADS, len(todo))
  with ThreadPoolExecutor(count) as pool:
    for _ in pool.map(work, range(count)):
      pass


def _do(piece: Piece, raw: np.ndarray) -> None:
  """Reads one piece; `raw` is memory for its bytes."""
  target = piece.target
  in_order = piece.contiguous and target.flags.c_contiguous
  if in_order and piece.dtype == target.dtype:
    read_bytes(piece.path, piece.start, target.reshape(-1).view(np.uint8))
    return
  read_bytes(piece.path, piece.start, raw)
  size = piece.dtype.itemsize
  strides = tuple(stride * size for stride in piece.strides)
  source = np.ndarray(
    piece.shape, piece.dtype, raw, piece.offset * size, strides
  )
  copy_strips(source, target)


def copy_strips(source: np.ndarray, target: np.ndarray) -> None:
  """target[...] = source, quickly where one is the other transposed."""
  bits = np.dtype(f"u{target.itemsize}")
  if source.dtype == target.dtype:
    # numpy copies the elements of a custom dtype one by one.
    source, target = source.view(bits), target.view(bits)
  order = np.argsort(source.strides)[::-1]
  source, target = source.transpose(order), target.transpose(order)
  if source.ndim < 2 or target.strides[-1] == target.itemsize:
    target[...] = source
  elif source.ndim > 2:
    for one, its_target in zip(source, target, strict=True):
      copy_strips(one, its_target)
  else:
    rows, columns = source.shape
    # Rows a power of two apart share few lines of the cache, and would drive
    # each other out of it: they are put a little further apart first.
    strip = np.empty((_STRIP, columns + _ALIGNMENT), target.dtype)[:, :columns]
    for at in range(0, rows, _STRIP):
      here = strip[: rows - at]
      here[...] = source[at : at + _STRIP]
      target.view(bits)[at : at + _STRIP] = here.view(bits)


def read_bytes(path: pathlib.Path, start: int, into: np.ndarray) -> None:
  """Fills an array of bytes from a file.

  Raises:
    InputError: the file ends before, or cannot be read.
  """
  try:
    with path.open("rb", buffering=0) as file:
      file.seek(start)
      count = file.readinto(into)
  except OSError as error:
    raise InputError(f"cannot read {path}: {error}") from error
  if count != into.size:
    raise InputError(
      f"cannot read {path}: it ends at byte {start + count}, and "
      f"{into.size - count} more are needed; download it again"
    )


def same(a: Tensor, b: Tensor) -> bool:
  """Whether two tensors hold the same bits; neither is kept in memory."""
  if (a.shape, a.dtype) != (b.shape, b.dtype):
    return False
  size = math.prod(a.shape) * FLOATS[a.dtype].itemsize
  for at in range(0, size, _PIECE):
    both = [np.empty(min(_PIECE, size - at), np.uint8) for _ in range(2)]
    for tensor, raw in zip((a, b), both, strict=True):
      read_bytes(tensor.path, tensor.start + at, raw)
    if not np.array_equal(*both):
      return False
  return True


def write(
  folder: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  dtype: str,
  value: Callable[[str], np.ndarray],
  max_shard_size: int,
) -> None:
  """Writes tensors as model.safetensors, or as shards and their index.

  Args:
    folder: must exist.
    shapes: of each tensor, in the order in which they are written.
    dtype: of all of them.
    value: gives a tensor when its turn comes; it is not kept.
    max_shard_size: bytes of tensors in one file, unless a single one is
      larger.
  """
  itemsize = np.dtype(dtype).itemsize
  shards: list[dict[str, tuple[int, ...]]] = [{}]
  size = 0
  for name, shape in shapes.items():
    more = math.prod(shape) * itemsize
    if shards[-1] and size + more > max_shard_size:
      shards.append({})
      size = 0
    shards[-1][name] = shape
    size += more
  if len(shards) == 1:
    write_file(folder / WEIGHTS, shards[0], dtype, value)
    return
  weight_map = {}
  for i, shard in enumerate(shards):
    file = SHARD.format(i + 1, len(shards))
    write_file(folder / file, shard, dtype, value)
    weight_map |= dict.fromkeys(shard, file)
  total = sum(math.prod(shape) * itemsize for shape in shapes.values())
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: pathlib.Path, shapes, dtype: str, value) -> None:
  """Writes one safetensors file, a tensor at a time; see `write`.

  The library's own writer wants all of a file's tensors in memory at once.
  """
  codes = {found: code for code, found in FLOATS.items()}
  # transformers refuses a file that does not say who wrote it.
  header: dict = {"__metadata__": {"format": "pt"}}
  at = 0
  for name, shape in shapes.items():
    end = at + math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {
      "dtype": codes[np.dtype(dtype)],
      "shape": list(shape),
      "data_offsets": [at, end],
    }
    at = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
  part = path.with_name(path.name + ".part")
  with part.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in shapes:
      file.write(np.ascontiguousarray(value(name)).reshape(-1).view(np.uint8))
  part.replace(path)
