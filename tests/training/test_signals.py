"""Signals: noted within a loop, raised outside of it, and heeded in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from calm_jax.core.errors import Interrupted, Preempted
from calm_jax.training import signals


def send(number):
  os.kill(os.getpid(), number)


def handlers():
  return [signal.getsignal(number) for number in signals.SIGNALS]


def kept() -> str:
  return "step 4 is kept"


@pytest.mark.parametrize(
  ("number", "kind"),
  [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)],
)
def test_a_signal_is_raised_outside_of_a_loop(number, kind):
  before = handlers()
  with (
    pytest.raises(kind, match=f"{number.name}: step 4 is kept") as caught,
    signals.raised(60, kept),
  ):
    send(number)
  assert type(caught.value) is kind
  # No handler of failures takes it for one.
  assert not isinstance(caught.value, Exception)
  assert handlers() == before


def test_a_second_sigterm_does_not_hinder_the_end():
  ended = []
  with pytest.raises(Preempted), signals.raised(60, kept):
    try:
      send(signal.SIGTERM)
    finally:
      send(signal.SIGTERM)
      ended.append(True)
  assert ended


def test_a_signal_is_noted_within_a_loop():
  with signals.raised(60, kept):
    before = handlers()
    with (
      pytest.raises(Preempted, match="SIGTERM: saved"),
      signals.deferred() as request,
    ):
      assert request.signal is None
      send(signal.SIGTERM)
      send(signal.SIGTERM)
      assert request.signal == signal.SIGTERM
      raise request.error("saved")
    assert handlers() == before


def test_a_signal_that_was_not_heeded_is_sent_again():
  with (
    pytest.raises(Preempted, match="step 4 is kept"),
    signals.raised(60, kept),
    signals.deferred() as request,
  ):
    send(signal.SIGTERM)
    assert request.signal


def test_a_second_interrupt_is_not_deferred():
  with pytest.raises(KeyboardInterrupt), signals.deferred() as request:
    send(signal.SIGINT)
    assert request.signal == signal.SIGINT
    send(signal.SIGINT)
    pytest.fail("not reached")


def test_a_thread_hears_of_no_signal():
  heard = []

  def work():
    with signals.deferred() as request:
      heard.append(request.signal)

  before = handlers()
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert heard == [None] and handlers() == before


# The main thread is in C, where Python hears of no signal.
DEAF = """
import hashlib, sys
from calm_jax.training import signals
with signals.raised(0.3, lambda: "step 4 is kept"):
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""


def test_a_process_that_does_not_hear_is_ended():
  run = subprocess.Popen(
    [sys.executable, "-c", DEAF],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert run.stdout.readline() == "ready\n"
    time.sleep(1)  # Until it is where it does not hear.
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
  finally:
    run.kill()
  assert run.returncode == 75
  assert said == "error: SIGTERM: not at an end after 0.3 s; step 4 is kept\n"


class Signalling(tiny.Source):
  """The process gets a signal when a batch is made."""

  def __init__(self, at: int, number):
    super().__init__()
    self.at, self.number = at, number

  def __getitem__(self, index: int):
    if index == self.at:
      send(self.number)
    return super().__getitem__(index)


def test_a_run_saves_and_goes_on_bit_by_bit(tmp_path):
  with tiny.compilation_cache(tmp_path / "programs"):
    want = tiny.Run(tmp_path / "whole", tiny.stage(checkpoint_every=100))()
    # Between two checkpoints; batches are made some steps ahead.
    stage = tiny.stage(checkpoint_every=100)
    run = tiny.Run(tmp_path / "run", stage, Signalling(3, signal.SIGTERM))
    with pytest.raises(Preempted) as caught:
      run()
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(saved.name)
    assert 1 <= step <= 5
    said = f"SIGTERM: stage 'compose', step {step} is saved"
    assert str(caught.value) == said
    got = tiny.Run(tmp_path / "run", stage)()
  for name, leaf in tiny.leaves(want).items():
    assert tiny.leaves(got)[name].tobytes() == leaf.tobytes(), name
