"""Reading and writing small files: atomic writes, JSON, JSON lines, hashes.

Errors name the file, and the line of a file of lines. Nothing here needs JAX.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError


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


def check_content(path: Path) -> None:
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
    value = json.loads(path.read_text(encoding="utf-8"))
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
  path: Path, fields: Sequence[str] = (), *, drop_unfinished: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number from 1, JSON object) of each line that is not blank.

  Raises InputError where a line is no object with the `fields`.
  `drop_unfinished` leaves out a last line without a newline, which a process
  that was killed may have cut short.
  """
  for number, line in read_lines(path):
    if drop_unfinished and not line.endswith(b"\n"):
      return
    try:
      record = parse_json_line(line, number)
    except ValueError as error:
      raise InputError(f"{path}, line {number}: {error}") from error
    if record is None:
      continue
    if missing := [field for field in fields if field not in record]:
      names = " and no ".join(map(repr, missing))
      raise InputError(f"{path}, line {number}: it has no {names}")
    yield number, record


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
  """Yields (number from 1, line) of a file; see `decode_line`.

  Lines are split as bytes: str.splitlines also splits at U+2028. Raises
  InputError if the file does not exist.
  """
  if not path.exists() or path.is_dir():
    raise InputError(f"{path}: no such file")
  check_content(path)
  with path.open("rb") as file:
    yield from enumerate(file, start=1)


def decode_line(line: bytes, number: int) -> str:
  """Returns the text of a line; raises ValueError if it is not UTF-8."""
  try:
    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8 text ({error}); convert the file") from error
  return text.rstrip("\r\n")


def parse_json_line(line: bytes, number: int) -> dict[str, Any] | None:
  """Returns the JSON object of a line (ValueError if none), None if blank."""
  text = decode_line(line, number)
  if not text.strip():
    return None
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
