"""A watchdog that ends a hung process, so that it can be started again."""

import faulthandler
import os
import sys
import threading
import time
from typing import Self

from calm_jax.core.errors import HUNG

_COMPILING = 10  # Times the seconds, for work that includes compiling.


class Watchdog:
  """Prints all stacks and ends the process with `HUNG` when nothing moves.

  It is a thread, which 0 seconds leave out: a hung collective cannot be
  interrupted, and `faulthandler` would end with the exit code of any fault.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._what, self._deadline = "", float("inf")
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def expect(self, what: str, *, compiles: bool = False) -> None:
    """Starts to count the seconds for the work that comes next."""
    allowance = self._seconds * (_COMPILING if compiles else 1)
    self._what, self._deadline = what, time.monotonic() + allowance

  def __enter__(self) -> Self:
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *exc_info) -> None:
    self._over.set()

  def _watch(self) -> None:
    while time.monotonic() <= self._deadline:
      if self._over.wait(min(1.0, self._seconds / 4)):
        return
    print(
      f"error: watchdog: {self._what} did not come to its end in its "
      f"{self._seconds:g} s (--config.watchdog; {_COMPILING} times that where "
      "programs are compiled); the checkpoints are as they were. The stacks "
      "of all threads:",
      file=sys.__stderr__,
      flush=True,
    )
    if sys.__stderr__ is not None:
      faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    os._exit(HUNG)
