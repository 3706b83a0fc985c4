"""A process that hangs is ended, with its stacks; one that moves is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import cached_runs
import pytest
import spelled
import tiny

import calm_jax
from calm_jax import state_cache, train, watchdog
from calm_jax.experiments.text import Text, TextTask

HANGS = """
import threading, time
from calm_jax.watchdog import Watchdog
def waits_forever():
  threading.Event().wait()
with Watchdog(float({seconds})) as watch:
  for step in range(4):
    watch.expect(f"step {{step}}", compiles=step == 0)
    time.sleep({pause})
  {then}
print("ended")
"""


GENERATES = """
import dataclasses, sys, threading
import calm_jax
from calm_jax import decode
from calm_jax.watchdog import Watchdog
def waits_forever(*args, **kwargs):
  threading.Event().wait()
model = calm_jax.load_model(sys.argv[1])
decode.start = waits_forever
with Watchdog(0.1) as watch:
  dataclasses.replace(model, watch=watch).generate("ab", 4)
"""


def run(**values):
  return python(HANGS.format(**values))


def python(*program):
  return subprocess.run(
    [sys.executable, "-c", *program],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_a_hang_is_ended_with_the_stacks():
  done = run(seconds=0.5, pause=0.01, then="waits_forever()")
  assert done.returncode == 77
  assert "watchdog: step 3 did not come to its end" in done.stderr
  assert "in waits_forever" in done.stderr
  assert done.stdout == ""


@pytest.mark.parametrize(
  ("seconds", "pause"), [(2, 0.4), (0, 0.1)], ids=["moving", "off"]
)
def test_what_moves_is_not_ended(seconds, pause):
  done = run(seconds=seconds, pause=pause, then="pass")
  assert done.returncode == 0, done.stderr
  assert done.stdout == "ended\n"


class Recorder(watchdog.Watchdog):
  """Notes what it is told."""

  def __init__(self, seconds: float):
    super().__init__(0)
    self.seconds, self.told = seconds, []

  def expect(self, what, *, compiles=False):
    self.told.append((what, compiles))

  def rest(self):
    self.told.append("rest")


@pytest.fixture
def recorders(monkeypatch):
  """Stand for the watchdogs of `train` and of `state_cache`."""
  made = []

  def make(seconds):
    made.append(Recorder(seconds))
    return made[-1]

  for module in (train, state_cache):
    monkeypatch.setattr(module, "Watchdog", make)
  return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return spelled.save(tmp_path_factory.mktemp("models") / "anchor", 1)


def test_a_hung_generation_is_ended(folder):
  done = python(GENERATES, str(folder))
  assert done.returncode == 77, done.stderr
  assert "watchdog: the next tokens of a generation" in done.stderr
  assert "in waits_forever" in done.stderr


def test_every_wait_of_an_evaluation_is_watched(folder, tmp_path, recorders):
  path = tmp_path / "held_out.jsonl"
  path.write_text((json.dumps({"text": "abc"}) + "\n") * 5)
  model = calm_jax.load_model(str(folder))
  task = TextTask(
    languages=(), sources={}, held_out={"domain": {"path": str(path)}},
    evals={}, skip_evals=(), allow_code_execution=False, num_samples=2,
    sample_tokens=40, prompt_tokens=30, eval_batch_size=2, eval_length=8,
    seed=0,
  )  # fmt: skip
  fitted = types.SimpleNamespace(
    experiment=Text(task, tmp_path, {"anchor": model})
  )
  settings = {"watchdog": 3.0, "stages": {"compose": {"data": {}}}}
  train.evaluate(fitted, {"anchor": model}, "compose", settings)
  [watch] = recorders
  assert watch.seconds == 3
  sampled, domain, own, nothing = " ".join(
    told if told == "rest" else f"{told[0]} {told[1]};" for told in watch.told
  ).split("rest")
  # Before the first token, after it, and after each chunk of others.
  assert sampled.count("the next tokens of a generation True;") > 3
  batch = "batch {} of held-out text {};"
  texts = [batch.format(i, i == 0) for i in range(3)]
  assert domain.strip() == " ".join(texts)
  assert batch.format(0, True) in own
  assert not nothing


def test_every_batch_of_states_is_watched(tmp_path, recorders):
  spec, params = tiny.compose()
  stage = tiny.stage(cache_states="float32")
  frozen = {"augmenting/kv": {"sha256": ""}}
  state_cache.cached(
    "compose", stage, spec, params, cached_runs.source(), tmp_path, frozen,
    None, 3.0,
  )  # fmt: skip
  [watch] = recorders
  assert watch.seconds == 3
  assert len(watch.told) > 2
  assert watch.told == [
    (f"states of kv, batch {i}", i == 1) for i in range(1, len(watch.told) + 1)
  ]
