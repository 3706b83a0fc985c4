"""SIGTERM and SIGINT: a run that is asked to stop saves its state and ends.

A spot machine gets SIGTERM some 30 seconds before it is taken away.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from signal import Signals

from calm_jax.core import errors
from calm_jax.core.errors import Interrupted, Preempted

SIGNALS = {signal.SIGTERM: Preempted, signal.SIGINT: Interrupted}
# A signal to a group of processes also ends the compiler's own, such as ptxas;
# their failure may be known this many seconds before the signal is.
_LATENESS = 0.5
# These say what is wrong with the input, whatever signal came meanwhile.
_NEVER_CAUSED = (errors.InputError, errors.TrainingDiverged)


class Request:
  """A request to stop: the signal that came, None until one does."""

  signal: Signals | None = None
  # Whether its error was raised where Python ignores errors, as in the callback
  # of JAX for the garbage collector.
  ignored: bool = False

  def error(self, kept: str) -> Preempted:
    """Returns the error to raise once everything is saved."""
    # Another process may have got the signal, and this one none.
    received = self.signal or signal.SIGTERM
    return SIGNALS[received](f"{received.name}: {kept}")


@contextlib.contextmanager
def deferred(kept: Callable[[], str]) -> Iterator[Request]:
  """Records signals for a loop instead of raising; a second SIGINT raises.

  A signal after which the block ends without an exception is sent again; one
  that ends it in an exception, of a compiler's process that got it too or of a
  file that went away, is raised as the request's error. `kept` says what is on
  disk, for its message. Only the main thread can record signals.
  """
  request = Request()

  def note(number, frame):
    request.signal = signal.Signals(number)
    if number == signal.SIGINT:
      signal.signal(number, before[number])

  with _handled_by(note, request, kept) as before:
    yield request
  if request.signal is not None:
    signal.raise_signal(request.signal)


@contextlib.contextmanager
def raised(grace: float, kept: Callable[[], str]) -> Iterator[None]:
  """Raises signals as errors, and ends the process `grace` seconds after one.

  Python runs a handler only once the main thread comes back from, say, the
  compiler; so a thread ends a process that is still there when the machine is
  about to go. For exceptions and `kept` see `deferred`.
  """
  request = Request()

  def stop(number, frame):
    if number == signal.SIGTERM == request.signal and not request.ignored:
      return  # Some send it twice; the first one holds.
    request.signal, request.ignored = signal.Signals(number), False
    raise request.error(kept())

  def note_ignored(unraisable):
    if not isinstance(unraisable.exc_value, Preempted):
      return hook(unraisable)
    request.ignored = True

  with _handled_by(stop, request, kept) as before:
    if not before:
      yield
      return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    args = reader, grace, kept, request
    thread = threading.Thread(target=_end_after, args=args, daemon=True)
    thread.start()
    hook, sys.unraisablehook = sys.unraisablehook, note_ignored
    try:
      yield
    finally:
      sys.unraisablehook = hook
      signal.set_wakeup_fd(wakeup)
      os.close(writer)
      thread.join()
      os.close(reader)


@contextlib.contextmanager
def _handled_by(
  handler: Callable, request: Request, kept: Callable[[], str]
) -> Iterator[dict]:
  """Sets the handler of all signals, and yields those that were there before.

  An exception that a signal may have caused becomes the request's error.
  """
  before = {}
  if threading.current_thread() is threading.main_thread():
    before = {number: signal.signal(number, handler) for number in SIGNALS}
  try:
    yield before
  except _NEVER_CAUSED:
    raise
  except Exception as error:
    deadline = time.monotonic() + _LATENESS
    while before and request.signal is None and time.monotonic() < deadline:
      time.sleep(0.01)
    if request.signal is None:
      raise
    [first, *_] = str(error).splitlines() or [""]
    said = f"{kept()} (it ended in {type(error).__name__}: {first:.200})"
    raise request.error(said) from error
  finally:
    for number, previous in before.items():
      signal.signal(number, previous)


def _end_after(
  reader: int, grace: float, kept: Callable[[], str], request: Request
) -> None:
  """Ends the process `grace` seconds after a signal; returns at end of file.

  Meanwhile it sends a signal again whose error was ignored.
  """
  while (received := os.read(reader, 1)) and received[0] not in SIGNALS:
    pass
  if not received:
    return
  deadline = time.monotonic() + grace
  known = kept()
  while (left := deadline - time.monotonic()) > 0:
    ready, _, _ = select.select([reader], [], [], min(left, 0.1))
    if ready and not os.read(reader, 64):
      return
    if request.ignored:
      os.kill(os.getpid(), received[0])
  number = signal.Signals(received[0])
  message = f"error: {number.name}: not at an end after {grace:g} s; {known}"
  print(message, file=sys.stderr, flush=True)
  os._exit(errors.EXIT_CODES[SIGNALS[number]])
