"""Errors with a cause outside of the program, and their exit codes.

The command lines print the message of such an error without a traceback;
docs/faults.md has the whole table.
"""

from collections.abc import Collection
from typing import Any


class InputError(ValueError):
  """Bad input: says what was wrong, where, and what to do about it."""


def check_choice(name: str, value: Any, known: Collection) -> None:
  """Raises InputError unless `value`, of an option `name`, is a known one."""
  if value not in known:
    raise InputError(f"{name}={value!r} is none of {known}")


class TrainingDiverged(RuntimeError):
  """The loss or the gradient is not finite; names the step and its batch."""


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


EXIT_CODES = {
  InputError: 2,
  TrainingDiverged: 65,
  StorageError: 74,
  Preempted: 75,
  LostProcess: 76,
  Interrupted: 130,
}
HUNG = 77  # The watchdog cannot raise: the main thread hangs.
