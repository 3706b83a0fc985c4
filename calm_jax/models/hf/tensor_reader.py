"""Reads tensors of safetensors files into arrays, piece by piece.

No file is mapped, since touched pages of a mapping count as memory.
"""

import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.lib.array_utils import byte_bounds

from calm_jax.core.errors import InputError
from calm_jax.models.hf.weight_files import FLOATS, Tensor

_PIECE = 4 << 20  # bytes of a file that are read at once
_STRIP = 128  # rows transposed together, few enough for a core's cache
# More than cores: some wait for the disk while others transpose.
_THREADS = min(16, 2 + (os.cpu_count() or 1))
_ALIGNMENT = 64  # of memory that JAX uses as it is, on a CPU


class Read(NamedTuple):
  """A region of a numpy view of a tensor, and the array to read it into."""

  tensor: Tensor
  view: Callable[[np.ndarray], np.ndarray]
  region: tuple[slice, ...]
  target: np.ndarray


class Piece(NamedTuple):
  """Bytes [start, stop) of a file, and the array that they are read into.

  `shape` and `strides` (in elements, from element `offset` on) say which of
  these elements `target` takes; if `contiguous`, all of them in their order.
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
  """Allocates memory that `jax.device_put` takes over on a CPU, uncopied."""
  dtype = np.dtype(dtype)
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  skip = -raw.ctypes.data % _ALIGNMENT
  return raw[skip : skip + size].view(dtype).reshape(shape)


def pieces(read: Read) -> Iterator[Piece]:
  """Yields the parts of a file that a read needs, each of a few megabytes."""
  # One byte an element, never touched: only its strides are looked at.
  probe = np.empty(read.tensor.shape, np.uint8)
  source = read.view(probe)[read.region]
  if not source.size:
    return
  if not np.may_share_memory(source, probe):
    raise ValueError(f"the view of {read.tensor} is a copy: it reads nothing")
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
  """Cuts both arrays alike into parts; `source`'s span at most `limit`."""
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
  """Performs all reads, in the order of the files; see `read_bytes`."""
  todo = [piece for read in reads for piece in pieces(read)]
  todo.sort(key=lambda piece: (piece.path, piece.start))
  if not todo:
    return
  # A list's iterator can be shared: each piece goes to one thread.
  rest = iter(todo)

  def read_pieces(_):
    # Kept, since fresh memory is zeroed by the system whenever it is taken.
    raw = np.empty(max(piece.stop - piece.start for piece in todo), np.uint8)
    for piece in rest:
      _read_piece(piece, raw[: piece.stop - piece.start])

  count = min(_THREADS, len(todo))
  with ThreadPoolExecutor(count) as pool:
    for _ in pool.map(read_pieces, range(count)):
      pass


def _read_piece(piece: Piece, raw: np.ndarray) -> None:
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
  """Sets target[...] = source, in strips if one is the other transposed."""
  bits = np.dtype(f"u{target.itemsize}")
  if source.dtype == target.dtype:
    # numpy copies the elements of a custom dtype one by one.
    source, target = source.view(bits), target.view(bits)
  order = np.argsort(source.strides)[::-1]
  source, target = source.transpose(order), target.transpose(order)
  if source.ndim < 2 or target.strides[-1] == target.itemsize:
    target[...] = source
  elif source.ndim > 2:
    for source_part, target_part in zip(source, target, strict=True):
      copy_strips(source_part, target_part)
  else:
    rows, columns = source.shape
    # Rows a power of two apart would drive each other out of the cache: they
    # are put a little further apart first.
    strip = np.empty((_STRIP, columns + _ALIGNMENT), target.dtype)[:, :columns]
    for at in range(0, rows, _STRIP):
      here = strip[: rows - at]
      here[...] = source[at : at + _STRIP]
      target.view(bits)[at : at + _STRIP] = here.view(bits)


def read_bytes(path: pathlib.Path, start: int, into: np.ndarray) -> None:
  """Fills an array of bytes from a file; InputError if that ends before."""
  try:
    with path.open("rb", buffering=0) as file:
      file.seek(start)
      count = file.readinto(into)
  except OSError as error:
    raise InputError(f"cannot read {path}: {error}") from error
  if count != into.size:
    raise InputError(
      f"{path} ends at byte {start + count}, and {into.size - count} more are "
      "needed; download it again"
    )


def same(a: Tensor, b: Tensor) -> bool:
  """Returns whether two tensors hold the same bits, read piece by piece."""
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
