"""Hidden states of examples on disk: computed once, read at every step after.

An example is known by its tokens alone: a causal model's states of them depend
neither on the row that they stand in nor on their neighbours. A folder holds

  store.json        what the states are of; those of something else are refused
  00000.states      records, one a token, of whole examples one after the other
  00000.index       keys, lengths and checksums of the examples in it
  lock              held by the run that adds to it

A file is written under another name and renamed, an index after its records.
So a process that is killed loses what it had not written, and no more.

B batch, M augmenting length.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes "bfloat16" a name that numpy knows
import numpy as np

from calm_jax.core.errors import InputError, StorageError

_DIGEST = 16
_ENTRY = np.dtype([("key", "u1", _DIGEST), ("length", "i4"), ("crc", "u4")])


class Span(NamedTuple):
  """An example in a batch: slots [start, stop) of all, of `length` records.

  A run of padding is one of a single record, which all its slots share.
  """

  start: int
  stop: int
  length: int
  key: bytes


def spans(
  tokens_BM: np.ndarray, segments_BM: np.ndarray, positions_BM: np.ndarray
) -> list[Span]:
  """The examples of a batch, which together cover all of its slots."""
  tokens = np.ascontiguousarray(tokens_BM, np.int32).ravel()
  padding = segments_BM.ravel() == 0
  begins = positions_BM.ravel() == 0
  begins[1:] &= ~(padding[1:] & padding[:-1])
  starts = np.flatnonzero(begins).tolist()
  found = []
  for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
    length = 1 if padding[start] else stop - start
    key = hashlib.blake2b(tokens[start : start + length], digest_size=_DIGEST)
    found.append(Span(start, stop, length, key.digest()))
  return found


class _Place(NamedTuple):
  """Where the records of an example are."""

  shard: int
  first: int
  length: int
  crc: int


class StateStore:
  """The states of one model, in one folder.

  Attributes:
    folder: of the files.
    record: numpy's dtype of one token's states.
  """

  def __init__(
    self,
    folder: Path,
    fields: Mapping[str, tuple[str, int]],
    meaning: Mapping[str, Any],
    *,
    writes: bool = True,
    shard_bytes: int = 1 << 28,
  ):
    """Opens a folder, which is made if absent.

    Args:
      folder: of this store alone.
      fields: by name the dtype and width of each part of a record.
      meaning: what the states are of; JSON.
      writes: whether what is added is written; of several processes that add
        the same, the first writes, and it is `locked` to others.
      shard_bytes: of a file, about.

    Raises:
      InputError: the folder holds states of something else, or is damaged.
    """
    self.folder = Path(folder)
    self.record = np.dtype(
      [(name, dtype, (width,)) for name, (dtype, width) in fields.items()]
    )
    self._writes, self._shard_bytes = writes, shard_bytes
    self._pending: list[tuple[bytes, np.ndarray]] = []
    self._pending_records = 0
    self._places: dict[bytes, _Place] = {}
    self._shard = 0  # that is written next
    self._maps: dict[int, np.ndarray] = {}
    self._checked: set[bytes] = set()
    fields = {name: list(field) for name, field in fields.items()}
    self._check_meaning(dict(meaning) | {"fields": fields})
    for path in sorted(self.folder.glob("*.index")):
      self._read_index(int(path.stem))
    if writes:
      for path in self.folder.glob("*.tmp"):
        path.unlink()

  def __contains__(self, key: bytes) -> bool:
    return key in self._places

  def check_space(self, records: int) -> int:
    """Bytes that are free; raises InputError if so many records are more."""
    free = shutil.disk_usage(self.folder).free
    if (needed := records * self.record.itemsize) > free:
      raise InputError(
        f"{self.folder}: the states take {needed:,} bytes and {free:,} are "
        "free; make room, choose another cache_folder, or a smaller "
        "cache_states"
      )
    return free

  def add(self, found: list[Span], values: Mapping[str, np.ndarray]) -> None:
    """Adds those examples of a batch that are not there.

    Args:
      found: of `spans`.
      values: by field [B, M, width].
    """
    flat = {n: v.reshape(-1, v.shape[-1]) for n, v in values.items()}
    for start, _, length, key in found:
      if key in self._places:
        continue
      records = np.empty(length, self.record)
      for name, value in flat.items():
        records[name] = value[start : start + length]
      self._places[key] = _Place(
        self._shard, self._pending_records, length, _checksum(records)
      )
      self._pending.append((key, records))
      self._pending_records += length
      if self._pending_records * self.record.itemsize >= self._shard_bytes:
        self.flush()

  def flush(self) -> None:
    """Writes what was added, and is not written."""
    if not self._pending:
      return
    if self._writes:
      keys, records = zip(*self._pending, strict=True)
      index = np.empty(len(keys), _ENTRY)
      index["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(
        -1, _DIGEST
      )
      index["length"] = [len(r) for r in records]
      index["crc"] = [self._places[key].crc for key in keys]
      body = index.tobytes()
      _write(self._path(self._shard, "states"), records)
      _write(self._path(self._shard, "index"), [_digest(body), body])
    self._shard += 1
    self._pending, self._pending_records = [], 0

  def rows(
    self,
    tokens_BM: np.ndarray,
    segments_BM: np.ndarray,
    positions_BM: np.ndarray,
  ) -> dict[str, np.ndarray]:
    """The states of a batch, by field [B, M, width].

    Raises:
      InputError: a file is not as it was written.
    """
    out = {
      name: np.empty((tokens_BM.size, *dtype.shape), dtype.base)
      for name, (dtype, _) in self.record.fields.items()
    }
    for span in spans(tokens_BM, segments_BM, positions_BM):
      records = self._read(span.key)
      for name, values in out.items():
        values[span.start : span.stop] = records[name]
    return {n: v.reshape(*tokens_BM.shape, -1) for n, v in out.items()}

  def _path(self, shard: int, kind: str) -> Path:
    return self.folder / f"{shard:05}.{kind}"

  def _check_meaning(self, meaning: dict) -> None:
    path = self.folder / "store.json"
    if not path.exists():
      if self._writes:
        _write(path, [json.dumps(meaning, indent=2).encode()])
      return
    try:
      old = json.loads(path.read_text())
    except ValueError as error:
      raise InputError(f"{path} is damaged: {error}; remove the folder") from (
        error
      )
    # As JSON gives it back.
    new = json.loads(json.dumps(meaning))
    odd = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if odd:
      lines = [f"  {k}: was {old.get(k)}, is {new.get(k)}" for k in odd]
      raise InputError(
        f"{self.folder} holds states that differ in\n"
        + "\n".join(lines)
        + "\nchoose another cache_folder, or remove that one"
      )

  def _read_index(self, shard: int) -> None:
    path = self._path(shard, "index")
    data = path.read_bytes()
    body = data[_DIGEST:]
    if _digest(body) != data[:_DIGEST]:
      raise self._damaged(path)
    index = np.frombuffer(body, _ENTRY)
    firsts = np.cumsum(index["length"]) - index["length"]
    for entry, first in zip(index, firsts.tolist(), strict=True):
      self._places[entry["key"].tobytes()] = _Place(
        shard, first, int(entry["length"]), int(entry["crc"])
      )
    path = self._path(shard, "states")
    size = path.stat().st_size if path.exists() else 0
    if size != int(index["length"].sum()) * self.record.itemsize:
      raise self._damaged(path)
    self._shard = shard + 1

  def _read(self, key: bytes) -> np.ndarray:
    shard, first, length, crc = self._places[key]
    path = self._path(shard, "states")
    if shard not in self._maps:
      self._maps[shard] = np.memmap(path, self.record, "r")
    found = self._maps[shard][first : first + length]
    # Once: what was read is in memory or on a disk that has kept it.
    if key not in self._checked:
      if _checksum(found) != crc:
        raise self._damaged(path)
      self._checked.add(key)
    return found

  def _damaged(self, path: Path) -> InputError:
    return InputError(
      f"{path} is missing or not as it was written; remove {path.stem}.states "
      f"and {path.stem}.index, and what they held is computed again"
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Keeps other processes from adding to a store; waits for one that does."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"waiting for the run that adds to {folder}", flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _checksum(records: np.ndarray) -> int:
  # A buffer of bytes: there is none of bfloat16.
  return zlib.crc32(records.view(np.uint8))


def _digest(data: bytes) -> bytes:
  return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def _write(path: Path, parts: Iterable[bytes | np.ndarray]) -> None:
  """A whole file or none."""
  temporary = path.with_name(path.name + ".tmp")
  try:
    with temporary.open("wb") as file:
      for part in parts:
        file.write(part if isinstance(part, bytes) else part.view(np.uint8))
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    raise StorageError(f"{path} could not be written: {error}") from error
