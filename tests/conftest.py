"""Fixtures of more than one test file; plain helpers are in helpers.py.

pytest puts the folder of this file on the path, hence `import helpers` and
`from golden import cases` in tests.
"""

from __future__ import annotations

import os
import shutil
import signal

import compiler
import jax
import pytest
import stand_ins

os.environ.setdefault("XLA_FLAGS", compiler.FLAGS)

# A shell starts what runs in the background with SIGINT ignored, and so would
# be all processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Kills, faults, meshes and whole commands: left to `make test-all`.
SLOW = {
  *("test_mesh", "test_faults", "test_kill", "test_plan_truth"),
  *("test_notebook", "test_ablations", "test_benchmarks"),
  *("test_launch", "test_launch_clusters", "test_documented"),
}
# The files that take longest, so that none of them runs alone at the end.
FIRST = (
  *("test_mesh", "test_decode", "test_faults", "test_train", "test_kill"),
  *("test_notebook", "test_step", "test_quantisation", "test_trainer"),
)


def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.stem in SLOW:
      item.add_marker(pytest.mark.slow)
  items.sort(key=lambda item: (*FIRST, item.path.stem).index(item.path.stem))


@pytest.fixture
def x64():
  """float64 for the length of one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def place(tmp_path):
  """Where the scripts of launch/ run against stand-ins."""
  missing = [name for name in stand_ins.TOOLS if not shutil.which(name)]
  if missing:
    pytest.skip(f"the scripts need {missing}, which this machine lacks")
  return stand_ins.Place(tmp_path)
