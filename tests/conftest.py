"""Fixtures of more than one test file; plain helpers are in helpers.py.

pytest puts the folder of this file on the path, hence `import helpers` and
`from golden import cases` in tests.
"""

from __future__ import annotations

import jax
import pytest


@pytest.fixture
def x64():
  """float64 for the length of one test."""
  with jax.enable_x64(True):
    yield
