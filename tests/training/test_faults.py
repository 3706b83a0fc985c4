"""Three rows of the fault table, made once, in processes of their own.

Of the others, damaged files are in test_checkpoint_integrity.py, a signal to
one process in test_signals.py, kills of one process in test_kill.py, other
devices in test_mesh.py, what is not finite in test_trainer.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = {
  "kill -9, second of two processes": {76, 134, -6},
  "SIGTERM to one of two processes": {75},
  "disk full": {74},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  path = tmp_path_factory.mktemp("faults") / "table.json"
  done = subprocess.run(
    [
      sys.executable, "-m", "benchmarks.faults", "--repeats=1",
      f"--json={path}", "--only", "second,one of two,disk",
    ],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-5000:]
  return json.loads(path.read_text())


@pytest.mark.parametrize("name", ROWS)
def test_a_fault_costs_what_was_not_saved(name, table):
  row = table[name]
  if "skipped" in row:
    pytest.skip(row["skipped"])
  print(row)
  assert set(row["codes"]) <= ROWS[name]
  assert row["equal"] == 1
  # A save in flight does not count yet, and steps go on during it.
  assert row["lost"] <= (0 if "SIGTERM" in name else 12)
