"""SIGTERM and SIGINT: a run that is asked to stop saves its state and ends.

A spot machine gets SIGTERM some 30 seconds before it is taken away.
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
  """A request to stop: the signal that came, None until one does."""

  signal: signal.Signals | None = None

  def error(self, kept: str) -> Preempted:
    """Returns the error to raise once everything is saved."""
    # Another process may have got the signal, and this one none.
    received = self.signal or signal.SIGTERM
    return SIGNALS[received](f"{received.name}: {kept}")


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
  """Records signals for a loop instead of raising; a second SIGINT raises.

  A signal after which the block ends without an exception is sent again. Only
  the main thread can record signals.
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
  """Raises signals as errors, and ends the process `grace` seconds after one.

  Python runs a handler only once the main thread comes back from, say, the
  compiler; so a thread ends a process that is still there when the machine is
  about to go. `kept` says what is on disk, for the message.
  """

  def stop(number, frame):
    if number == signal.SIGTERM:  # Some send it twice; the first one holds.
      signal.signal(number, signal.SIG_IGN)
    raise SIGNALS[number](f"{signal.Signals(number).name}: {kept()}")

  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  before = {number: signal.signal(number, stop) for number in SIGNALS}
  wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  args = reader, grace, kept
  thread = threading.Thread(target=_end_after, args=args, daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(wakeup)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.close(writer)
    thread.join()
    os.close(reader)


def _end_after(reader: int, grace: float, kept: Callable[[], str]) -> None:
  """Ends the process `grace` seconds after a signal; returns at end of file."""
  while (received := os.read(reader, 1)) and received[0] not in SIGNALS:
    pass
  if not received:
    return
  deadline = time.monotonic() + grace
  known = kept()
  while (left := deadline - time.monotonic()) > 0:
    if select.select([reader], [], [], left)[0] and not os.read(reader, 64):
      return
  number = signal.Signals(received[0])
  message = f"error: {number.name}: not at an end after {grace:g} s; {known}"
  print(message, file=sys.stderr, flush=True)
  os._exit(EXIT_CODES[SIGNALS[number]])
