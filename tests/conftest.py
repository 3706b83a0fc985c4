"""Fixtures of more than one test file; plain helpers are in helpers.py.

pytest puts the folder of this file on the path, hence `import helpers` and
`from golden import cases` in tests.
"""

from __future__ import annotations

import shutil

import jax
import pytest
import stand_ins


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
