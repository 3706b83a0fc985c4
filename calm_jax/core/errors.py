"""Errors with a cause outside of the program, and their exit codes.

The command lines print the message of such an error without a traceback;
docs/faults.md has the whole table. The checks here are for what a user gives:
functions and commands that a user calls check their arguments by them, and
what is below those does not check again.
"""

import math
import operator
import os
import pathlib
import reprlib
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any

LARGEST_SEED = 2**32 - 1  # JAX would drop the higher bits without a word.


class InputError(ValueError):
  """Bad input: says what was wrong, where, and what to do about it."""


def check_choice(name: str, value: Any, known: Collection) -> None:
  """Raises InputError unless `value`, of an option `name`, is a known one."""
  if value not in known:
    raise InputError(f"{name}={value!r} is none of {known}")


def check_int(
  name: str, value: Any, least: int = 0, most: int | None = None
) -> int:
  """Returns a whole number, which may be numpy's, as an int.

  Raises InputError if it is something else, or outside its range.
  """
  try:
    number = None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    number = None
  if number is None or number < least or (most is not None and number > most):
    end = "or more" if most is None else f"to {most}"
    raise InputError(
      f"{name}={reprlib.repr(value)} must be a whole number, {least} {end}"
    )
  return number


def check_seed(name: str, value: Any) -> int:
  """`check_int` of a seed, which has 32 bits."""
  return check_int(name, value, 0, LARGEST_SEED)


def check_float(
  name: str,
  value: Any,
  least: float,
  most: float,
  *,
  excluded: float = math.nan,
) -> float:
  """Returns a number of a range, whole or not, as a float; or InputError.

  `excluded` is one of its ends that does not belong to it.
  """
  try:
    number = math.nan if isinstance(value, str | bool) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not least <= number <= most or number == excluded:
    but = "" if math.isnan(excluded) else f", but not {excluded}"
    raise InputError(
      f"{name}={reprlib.repr(value)} must be a number from {least} to "
      f"{most}{but}"
    )
  return number


def check_text(name: str, value: Any) -> str:
  """Returns a string; InputError if it is none, or UTF-8 cannot hold it."""
  if not isinstance(value, str):
    kind = type(value).__name__
    raise InputError(f"{name} is a {kind}, where a string is expected")
  try:
    value.encode()  # JSON, and a command line, can hold half a character.
  except UnicodeEncodeError as error:
    raise InputError(
      f"{name} is not text that UTF-8 can hold ({error})"
    ) from error
  return str(value)


def check_texts(name: str, value: Any) -> list[str]:
  """Returns the strings of a list or the like; one string is an InputError."""
  unordered = str | bytes | Mapping | Set
  if isinstance(value, unordered) or not isinstance(value, Iterable):
    kind = type(value).__name__
    raise InputError(f"{name} is a {kind}, where a list of strings is expected")
  return [check_text(f"{name}[{i}]", text) for i, text in enumerate(value)]


def check_type(name: str, value: Any, kind: type, advice: str) -> None:
  """Raises InputError, with advice, unless a value is of a type."""
  if not isinstance(value, kind):
    found = type(value).__name__
    raise InputError(f"{name} is a {found}, not a {kind.__name__}: {advice}")


def check_path(name: str, value: Any) -> str:
  """Returns a path as a string; InputError if it is none, or empty."""
  if not isinstance(value, str | os.PathLike) or not os.fspath(value):
    raise InputError(
      f"{name}={reprlib.repr(value)} must be a path: a string or a pathlib.Path"
    )
  return check_text(name, os.fspath(value))


def check_folder(name: str, value: Any) -> pathlib.Path:
  """Returns a path that is a folder, or can become one; else InputError."""
  path = pathlib.Path(check_path(name, value)).expanduser()
  for part in (path, *path.parents):
    if part.is_file():
      raise InputError(f"{name}={path}: {part} is a file, give a folder")
  return path


class TrainingDiverged(RuntimeError):
  """The loss or the gradient is not finite; names the step and its batch."""


class OutOfMemory(RuntimeError):
  """A device's memory is not enough; says what takes it and what to change."""


class StorageError(OSError):
  """A file could not be read or written; names it and what is still usable."""


class LostProcess(RuntimeError):
  """Another process of the run is gone or does not answer."""


class Preempted(BaseException):
  """SIGTERM arrived; the message names the checkpoint that is kept.

  Like KeyboardInterrupt it is no `Exception`: a signal may arrive anywhere, and
  no `except Exception` may take it for a failure of its own code.
  """


class Interrupted(Preempted):
  """SIGINT arrived; the message names the checkpoint that is kept."""


EXIT_CODES: dict[type[BaseException], int] = {
  InputError: 2,
  TrainingDiverged: 65,
  OutOfMemory: 71,
  StorageError: 74,
  Preempted: 75,
  LostProcess: 76,
  Interrupted: 130,
}
HUNG = 77  # The watchdog cannot raise: the main thread hangs.
