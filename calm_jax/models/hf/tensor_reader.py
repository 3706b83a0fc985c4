"""Reads tensors of safetensors files into arrays, piece by piece.

No file is mapped, since touched pages of a mapping count as memory.
"""

import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.models.hf.weight_files import FLOATS, Tensor

_PIECE = 4 << 20  # bytes of a file that are read at once
_STRIP = 128  # rows transposed together, few enough for a core's cache
# More than cores: some wait for the disk while others transpose.
_THREADS = min(16, 2 + (os.cpu_count() or 1))
_ALIGNMENT = 64  # of memory that JAX uses as it is, on a CPU


class Read(NamedTuple):
  """Rows and columns of a tensor, and the array to read them into."""

  tensor: Tensor
  region: tuple[slice, ...]  # of a vector its elements alone
  target: np.ndarray


class Piece(NamedTuple):
  """Bytes [start, stop) of a file, and the matrix that is filled from them."""

  path: pathlib.Path
  start: int
  stop: int
  stride: int  # bytes from one row to the next
  dtype: np.dtype
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
  tensor, region, target = read
  if len(region) == 1:  # a vector is read as a row
    region, target = (slice(0, 1), *region), target[None]
  rows, columns = region
  dtype = FLOATS[tensor.dtype]
  stride = tensor.shape[-1] * dtype.itemsize
  step = max(1, _PIECE // stride)
  for at in range(rows.start, rows.stop, step):
    stop = min(at + step, rows.stop)
    first = tensor.start + at * stride
    last = tensor.start + (stop - 1) * stride
    yield Piece(
      tensor.path,
      first + columns.start * dtype.itemsize,
      last + columns.stop * dtype.itemsize,
      stride,
      dtype,
      target[at - rows.start : stop - rows.start],
    )


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
  target, size = piece.target, piece.dtype.itemsize
  in_order = len(raw) == target.size * size
  if in_order and target.flags.c_contiguous and piece.dtype == target.dtype:
    read_bytes(piece.path, piece.start, target.reshape(-1).view(np.uint8))
    return
  read_bytes(piece.path, piece.start, raw)
  strides = (piece.stride, size)
  source = np.ndarray(target.shape, piece.dtype, raw, strides=strides)
  copy_strips(source, target)


def copy_strips(source: np.ndarray, target: np.ndarray) -> None:
  """Sets target[...] = source, in strips if a matrix is transposed."""
  bits = np.dtype(f"u{target.itemsize}")
  if source.dtype == target.dtype:
    # numpy copies the elements of a custom dtype one by one.
    source, target = source.view(bits), target.view(bits)
  order = np.argsort(source.strides)[::-1]
  source, target = source.transpose(order), target.transpose(order)
  if source.ndim < 2 or target.strides[-1] == target.itemsize:
    target[...] = source
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
      count = file.readinto(into.data)
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
    one, other = (np.empty(min(_PIECE, size - at), np.uint8) for _ in range(2))
    for tensor, raw in zip((a, b), (one, other), strict=True):
      read_bytes(tensor.path, tensor.start + at, raw)
    if not np.array_equal(one, other):
      return False
  return True
