"""A process that hangs is ended, with its stacks; one that moves is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HANGS = """
import threading, time
from calm_jax.training.watchdog import Watchdog
def waits_forever():
  threading.Event().wait()
with Watchdog(float({seconds})) as watch:
  for step in range(4):
    watch.expect(f"step {{step}}", compiles=step == 0)
    time.sleep({pause})
  {then}
print("ended")
"""


def run(**values):
  return subprocess.run(
    [sys.executable, "-c", HANGS.format(**values)],
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
