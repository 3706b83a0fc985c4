"""Traces of a few steps of a stage."""

from __future__ import annotations

import shutil

import jax
import pytest
import tiny

from calm_jax.core.errors import InputError
from calm_jax.experiments import recipe
from calm_jax.experiments.settings import Settings
from calm_jax.training import profiler
from calm_jax.training.stage import Stage

STAGE = {"steps": 4, "checkpoint_every": 1, "keep_last": 4}


def traced_steps(directory) -> list[tuple[list[int], int]]:
  """The annotated steps of each trace of a run, and calls of the program."""
  found = []
  for path in sorted(directory.glob("profile/plugins/profile/*/*.xplane.pb")):
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [
      e for plane in data.planes for ln in plane.lines for e in ln.events
    ]
    steps = [dict(e.stats)["step_num"] for e in events if e.name == "train"]
    calls = {e.start_ns for e in events if e.name == "PjitFunction(step)"}
    found.append((sorted(steps), len(calls)))
  return found


def test_a_window_of_steps_is_traced(tmp_path, capsys):
  tiny.Run(tmp_path, tiny.stage(**STAGE), profile="2:3")()
  [(steps, calls)] = traced_steps(tmp_path)
  assert steps == [2, 3]
  assert calls >= 2
  assert f"a trace is in {tmp_path / 'profile'}" in capsys.readouterr().out


def test_a_run_that_goes_on_traces_what_is_left(tmp_path):
  broken = tiny.Source(broken=(2,))
  stage = tiny.stage(**STAGE)
  with pytest.raises(OSError, match="step 3"):
    tiny.Run(tmp_path, stage, source=broken, profile="2:4")()
  # What was traced until the error is kept.
  [(steps, _)] = traced_steps(tmp_path)
  assert steps == [2]
  shutil.rmtree(tmp_path / "profile")
  tiny.Run(tmp_path, stage, profile="2:4")()
  [(steps, _)] = traced_steps(tmp_path)
  assert steps == [3, 4]


def test_a_run_past_the_window_traces_nothing(tmp_path):
  stage = tiny.stage(**STAGE)
  with pytest.raises(OSError, match="step 4"):
    tiny.Run(tmp_path, stage, source=tiny.Source(broken=(3,)))()
  tiny.Run(tmp_path, stage, profile="1:2")()
  assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
  ("profile", "message"),
  [
    ("20", "'20' is not FIRST:LAST"),
    ("0:5", "'0:5' is not FIRST:LAST"),
    ("5:4", "'5:4' is not FIRST:LAST"),
    ("2:11", "'2:11': stage 'compose' ends with step 10"),
  ],
)
def test_windows_that_cannot_be(profile, message, tmp_path):
  settings = Settings(
    "text", None, str(tmp_path), profile=profile,
    stages={"compose": Stage(steps=10)},
  )  # fmt: skip
  with pytest.raises(InputError, match=message):
    recipe.check(settings)


def test_windows():
  assert profiler.parse("", "compose", 10) == range(0)
  assert profiler.parse("2:10", "compose", 10) == range(2, 11)
