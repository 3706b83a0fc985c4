"""SIGTERM and SIGINT: a run is asked to stop, and stops while it can.

A machine that is taken away says so by SIGTERM, and is gone some 30 seconds
later.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from calm_jax.core.errors import EXIT_CODES, Interrupted, Preempted

SIGNALS = {signal.SIGTERM: Preempted, signal.SIGINT: Interrupted}


class Request:
  """What `deferred` yields.

  Attributes:
    signal: the signal that came, None until one does.
  """

  signal: signal.Signals | None = None

  def error(self, kept: str) -> Preempted:
    """What to raise once everything is saved."""
    # Another process may have got it, and this one none.
    got = self.signal or signal.SIGTERM
    return SIGNALS[got](f"{got.name}: {kept}")


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
  """Within, a signal is noted for a loop to heed; a second SIGINT is not.

  One that was not heed by an exception is sent again at the end. In a thread
  that is not the main one, none is noted.
  """
  request = Request()
  if threading.current_thread() is not threading.main_thread():
    yield request
    return

  def note(number, frame):
    request.signal = signal.Signals(number)
    if number == signal.SIGINT:
      signal.signal(number, before[number])

  before = {number: signal.signal(number, note) for number in SIGNALS}
  try:
    yield request
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if request.signal is not None:
    signal.raise_signal(request.signal)


@contextlib.contextmanager
def raised(grace: float, kept: Callable[[], str]) -> Iterator[None]:
  """Within, a signal is raised as an error, and the process then ends.

  Python hears of a signal only once the main thread comes back from, say, the
  compiler. Hence a thread, which ends a process that is still there after
  `grace` seconds: by then it can no more be hoped to save anything.

  Args:
    grace: seconds.
    kept: says what is on disk.
  """

  def stop(number, frame):
    if number == signal.SIGTERM:  # Some send it twice; the first one holds.
      signal.signal(number, signal.SIG_IGN)
    raise SIGNALS[number](f"{signal.Signals(number).name}: {kept()}")

  end, told = os.pipe()
  os.set_blocking(told, False)
  before = {number: signal.signal(number, stop) for number in SIGNALS}
  wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
  thread = threading.Thread(
    target=_end_after, args=(end, grace, kept), daemon=True
  )
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(wakeup)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.close(told)
    thread.join()
    os.close(end)


def _end_after(end: int, grace: float, kept: Callable[[], str]) -> None:
  """Ends the process `grace` seconds after a signal; returns at end of file."""
  while True:
    came = os.read(end, 1)
    if not came:
      return
    if came[0] in SIGNALS:
      break
  deadline = time.monotonic() + grace
  known = kept()
  while (left := deadline - time.monotonic()) > 0:
    if select.select([end], [], [], left)[0] and not os.read(end, 64):
      return
  number = signal.Signals(came[0])
  print(
    f"error: {number.name}: not at an end after {grace:g} s; {known}",
    file=sys.stderr,
    flush=True,
  )
  os._exit(EXIT_CODES[SIGNALS[number]])
