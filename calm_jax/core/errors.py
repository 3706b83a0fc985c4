"""What can go wrong outside of the program, and the exit code of each.

The command lines print the message of such an error without a traceback;
docs/faults.md has the whole table.
"""

from __future__ import annotations

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
  """What was to be saved or read is not: names it, and what is still good."""


class LostProcess(RuntimeError):
  """Another process of the run is gone or does not answer."""


class Preempted(BaseException):
  """SIGTERM; says what is kept.

  No `Exception`, as KeyboardInterrupt is none: a signal may come anywhere, and
  nothing may take it for a failure of its own.
  """


class Interrupted(Preempted):
  """SIGINT; says what is kept."""


EXIT_CODES = {
  InputError: 2,
  TrainingDiverged: 65,
  StorageError: 74,
  Preempted: 75,
  LostProcess: 76,
  Interrupted: 130,
}
HUNG = 77  # The watchdog cannot raise: the main thread hangs.
