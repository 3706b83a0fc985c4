"""Signals: noted within a loop, raised outside of it, and heeded in time."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
import spelled
import tiny

from calm_jax.core.errors import InputError, Interrupted, Preempted
from calm_jax.training import signals, trainer

ROOT = Path(__file__).parents[2]


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
      signals.deferred(kept) as request,
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
    signals.deferred(kept) as request,
  ):
    send(signal.SIGTERM)
    assert request.signal


def test_a_second_interrupt_is_not_deferred():
  with pytest.raises(KeyboardInterrupt), signals.deferred(kept) as request:
    send(signal.SIGINT)
    assert request.signal == signal.SIGINT
    send(signal.SIGINT)
    pytest.fail("not reached")


def test_a_thread_hears_of_no_signal():
  heard = []

  def work():
    with signals.deferred(kept) as request:
      heard.append(request.signal)

  before = handlers()
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert heard == [None] and handlers() == before


def a_broken_compiler(*_):
  """Fails as XLA does when a signal ends ptxas, which it waits for."""
  with subprocess.Popen(["sleep", "60"]) as ptxas:
    ptxas.terminate()
  code = -ptxas.returncode
  message = f"INTERNAL: ptxas exited with non-zero error code {code}"
  raise jax.errors.JaxRuntimeError(f"{message}\nand more")


BLAMED = r"step 4 is kept \(it ended in JaxRuntimeError: .* error code 15\)$"


@pytest.mark.parametrize("late", [0, 0.2])
@pytest.mark.parametrize("way", ["raised", "deferred", "both"])
@pytest.mark.parametrize(
  ("number", "kind"),
  [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)],
)
def test_what_a_signal_broke_is_no_failure(number, kind, way, late):
  before = handlers()
  with pytest.raises(kind) as caught, contextlib.ExitStack() as stack:
    if way != "deferred":
      stack.enter_context(signals.raised(60, kept))
    if way != "raised":
      stack.enter_context(signals.deferred(kept))
    timer = threading.Timer(late, send, [number])
    timer.start()
    if not late:
      timer.join()
    a_broken_compiler()
  cause = caught.value.__cause__ or caught.value.__context__
  if way != "raised":  # There the signal itself is raised, wherever it comes.
    assert caught.match(f"{number.name}: {BLAMED}")
    assert isinstance(cause, jax.errors.JaxRuntimeError)
  assert type(caught.value) is kind and handlers() == before


def test_a_swallowed_signal_is_blamed_too():
  with pytest.raises(Preempted, match=BLAMED), signals.raised(60, kept):
    with contextlib.suppress(Preempted):  # As in __del__, or in a callback.
      send(signal.SIGTERM)
    a_broken_compiler()


@pytest.mark.parametrize(
  ("number", "kind"),
  [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)],
)
def test_a_signal_in_a_callback_of_the_garbage_collector(number, kind, capsys):
  """JAX has such a callback, and Python ignores what is raised in it."""
  arrivals = [number]

  def callback(phase, info):
    if arrivals:
      send(arrivals.pop())

  gc.callbacks.append(callback)
  try:
    with pytest.raises(kind, match="step 4 is kept"), signals.raised(60, kept):
      gc.collect()
      time.sleep(10)
  finally:
    gc.callbacks.remove(callback)
  assert not capsys.readouterr().err


@pytest.mark.parametrize("context", [signals.deferred, None])
def test_without_a_signal_an_error_stays_what_it_is(context):
  context = context(kept) if context else signals.raised(60, kept)
  with pytest.raises(jax.errors.JaxRuntimeError, match="code 15"), context:
    a_broken_compiler()


def test_wrong_input_stays_wrong_whatever_comes():
  with pytest.raises(InputError), signals.deferred(kept):
    send(signal.SIGTERM)
    raise InputError("no such file")


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


def test_a_compiler_that_a_signal_ends_leaves_what_is_kept(
  tmp_path, monkeypatch
):
  def make_step(*_):
    def step(*_):
      threading.Timer(0.1, send, [signal.SIGTERM]).start()
      a_broken_compiler()

    return step

  run = tiny.Run(tmp_path, tiny.stage())
  with monkeypatch.context() as patch:
    patch.setattr(trainer.step_lib, "make_step", make_step)
    with pytest.raises(Preempted, match=r"has no checkpoint yet .*code 15"):
      run()
  with pytest.raises(Preempted):
    tiny.Run(tmp_path, tiny.stage(), Signalling(3, signal.SIGTERM))()
  [saved] = (tmp_path / "checkpoints").iterdir()
  with monkeypatch.context() as patch:
    patch.setattr(trainer.step_lib, "make_step", make_step)
    said = f"SIGTERM: the last good checkpoint is step {saved.name} in .*15"
    with pytest.raises(Preempted, match=said):
      run()
  run()  # It goes on.


def test_a_command_ends_with_75_while_its_first_step_compiles(tmp_path):
  models = [
    f"--config.{side}={spelled.save(tmp_path / side, seed)}"
    for seed, side in enumerate(("anchor", "augmenting"))
  ]
  text = tmp_path / "text.txt"
  text.write_text("abc def\n\n" * 40)
  workdir = tmp_path / "run"
  command = [
    sys.executable, "-m", "calm_jax.train", "--config=configs/compose.py",
    *models, f"--config.data={text}", f"--config.eval_data={text}",
    f"--config.workdir={workdir}", "--config.stages.compose.length=16",
    "--config.stages.compose.data.mixture.data.fraction=1.0",
    "--config.task.num_samples=0",
  ]  # fmt: skip
  env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
  env |= {"JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
  run = subprocess.Popen(
    command, env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    start_new_session=True,
  )  # fmt: skip
  said = []
  try:
    for line in run.stderr:
      said.append(line)
      if "Compiling jit(step)" in line:
        os.killpg(run.pid, signal.SIGTERM)
    code = run.wait(timeout=60)
  finally:
    run.kill()
  assert code == 75, "".join(said[-30:])
  assert said[-1] == "error: SIGTERM: stage 'compose', step 1 is saved\n"
  assert (workdir / "compose" / "checkpoints" / "1").is_dir()
