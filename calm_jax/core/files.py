"""Reading and writing small files: atomic writes, JSON, JSON lines, hashes.

Errors name the file, and the line of a file of lines. Nothing here needs JAX.
"""

import functools
import gzip
import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from calm_jax.core.errors import InputError

T = TypeVar("T")
# A record to be read: its origin, "a.tsv line 3", and a function that returns
# it, or None where a line is blank. The function raises ValueError for a bad
# record, so that the next can be read.
Entry = tuple[str, Callable[[], T | None]]
Check = Callable[[str, Any], Any]  # of the name and value of a field
Readable = Path | zipfile.Path

_GZIP = b"\x1f\x8b"
_NO_LINES = {
  b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
  b"\xfd7zXZ": "compressed by xz; unpack it",
  b"BZh91AY&SY": "compressed by bzip2; unpack it",
  b"PK\x03\x04": "a zip file; unpack it",
  b"PAR1\x15": "a Parquet file; convert it to jsonl",
}
_UNREADABLE = (
  *(gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError),
  PermissionError,
  RuntimeError,  # of zip files: a password, an unknown compression
)


def write_atomically(path: Path, content: str | bytes) -> None:
  """Writes a file, and the folders above it, completely or not at all."""
  if isinstance(content, str):
    content = content.encode()
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def sha256(path: Path) -> str:
  """Returns the sha256 (hex) of a file, as the Hugging Face hub shows it."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_content(path: Readable) -> None:
  """Raises InputError if a file is git-lfs's pointer, without its content."""
  if not path.is_file():
    return
  with path.open("rb") as file:
    if file.read(40).startswith(b"version https://git-lfs"):
      raise InputError(
        f"{path} is only git-lfs's pointer to the file: run `git lfs pull` "
        "there, or download the file itself"
      )


def to_json(value: Any) -> Any:
  """Returns arrays, tuples and paths as values of JSON's types.

  A number that is not finite becomes a string such as "NaN"; what JSON does not
  know stays as it is.
  """
  if isinstance(value, Mapping):
    return {str(name): to_json(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  # A type has it too, unbound: a dtype in a configuration.
  if hasattr(value, "tolist") and not isinstance(value, type):
    return to_json(value.tolist())
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, float) and not math.isfinite(value):
    return json.dumps(value)
  return value


def number_from_json(value: Any) -> Any:
  """Returns a number that `to_json` wrote; any other value as it is."""
  if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
    return float(value)
  return value


def write_json(path: Path, value: Any) -> None:
  """Writes `to_json(value)` atomically; what JSON does not know as its str."""
  text = json.dumps(
    to_json(value), indent=2, ensure_ascii=False, allow_nan=False, default=str
  )
  write_atomically(path, text + "\n")


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object; raises InputError if the file is anything else."""
  try:
    value = json.loads(path.read_text(encoding="utf-8-sig"))
  except FileNotFoundError as error:
    raise InputError(f"{path}: no such file") from error
  except (OSError, ValueError, RecursionError) as error:
    check_content(path)
    raise InputError(f"{path} is not JSON: {error}") from error
  if not isinstance(value, dict):
    raise InputError(f"{path}: {_not_an_object(value)}")
  return value


def write_json_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
  """Writes one JSON object a line, atomically."""
  lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
  write_atomically(path, "".join(lines))


def read_json_lines(
  path: Path, fields: Mapping[str, Check], *, drop_unfinished: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number from 1, JSON object) of each line that is not blank.

  `fields` are those that each object must have, with their checks, such as
  `errors.check_text`. Raises InputError where a line is anything else.
  `drop_unfinished` leaves out a last line without a newline, which a process
  that was killed may have cut short.
  """

  def parse(line: bytes) -> dict[str, Any] | None:
    if drop_unfinished and not line.endswith(b"\n"):
      return None
    record = parse_json_line(line)
    if record is not None:
      if missing := [name for name in fields if name not in record]:
        raise ValueError(f"it has no {' and no '.join(map(repr, missing))}")
      for name, check in fields.items():
        check(repr(name), record[name])
    return record

  return read_entries(entries(path, parse))


def read_text(path: Path) -> str:
  """Returns a file's lines, see `read_lines`, with newlines between them."""
  return "\n".join(line for _, line in read_entries(entries(path, decode_line)))


def read_entries(lines: Iterable[Entry[T]]) -> Iterator[tuple[int, T]]:
  """Yields (number from 1, record) of entries; InputError at a bad one."""
  for number, (origin, read) in enumerate(lines, start=1):
    try:
      record = read()
    except ValueError as error:
      raise InputError(f"{origin}: {error}") from error
    if record is not None:
      yield number, record


def entries(
  path: Path, parse: Callable[[bytes], T | None]
) -> Iterator[Entry[T]]:
  """Yields the lines of a file, see `read_lines`, as entries."""
  for number, line in read_lines(path):
    yield f"{path} line {number}", functools.partial(parse, line)


def suffix(path: Path) -> str:
  """Returns the suffix of a name, without the .gz of a compressed file."""
  return Path(path.name.lower().removesuffix(".gz")).suffix


def read_lines(path: Readable) -> Iterator[tuple[int, bytes]]:
  """Yields (number from 1, line) of a file of text; see `decode_line`.

  The file may be compressed by gzip, whatever its name, or lie in a zip file.
  Lines end at \\n; in a file without any, at \\r. They are split as bytes:
  str.splitlines also splits at U+2028. Raises InputError if the file cannot be
  read.
  """
  if not path.exists() or path.is_dir():
    raise InputError(f"{path}: no such file")
  number = 0
  try:
    check_content(path)
    with path.open("rb") as raw:
      start = raw.peek(64)  # pyrefly: ignore [missing-attribute]  # Buffered.
      for magic, is_what in _NO_LINES.items():
        if start.startswith(magic):
          raise InputError(f"{path} is no file of lines of text but {is_what}")
      file = gzip.GzipFile(fileobj=raw) if start.startswith(_GZIP) else raw
      for number, line in enumerate(file, start=1):
        if number == 1 and not line.endswith(b"\n"):
          yield from enumerate(line.splitlines(keepends=True), start=1)
        else:
          yield number, line
  except _UNREADABLE as error:
    after = f" after line {number}" if number else ""
    raise InputError(f"{path} cannot be read{after}: {error}") from error


def decode_line(line: bytes) -> str:
  """Returns the text of a line without its end, and without a BOM.

  Raises ValueError if it is not UTF-8.
  """
  if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")):
    raise ValueError(
      "not UTF-8 text: it has NUL bytes, or the mark of UTF-16; convert the"
      " file, such as by iconv -f UTF-16 -t UTF-8"
    )
  try:  # A BOM may stand in any line: files are joined.
    return line.decode("utf-8-sig").rstrip("\r\n")
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8 text ({error}); convert the file") from error


def parse_json_line(line: bytes) -> dict[str, Any] | None:
  """Returns the JSON object of a line (ValueError if none), None if blank."""
  text = decode_line(line).strip()
  if not text:
    return None
  if text.startswith("["):
    raise ValueError(
      "a JSON array, where one object a line (jsonl) is expected; convert the"
      " file by jq -c '.[]'"
    )
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    text = f"not JSON ({error}); a line must be one JSON object"
    raise ValueError(text) from error
  if not isinstance(record, dict):
    raise ValueError(_not_an_object(record))
  return record


def _not_an_object(value: Any) -> str:
  return f"a JSON {type(value).__name__}, where an object is expected"
