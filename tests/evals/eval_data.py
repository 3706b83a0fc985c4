"""Where the shared data is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def folder(name: str) -> Path:
  """A folder of the shared data; skips the test where there is none."""
  if not os.environ.get("CALM_SHARED"):
    pytest.skip("CALM_SHARED is unset: the shared data is not here")
  return Path(os.environ["CALM_SHARED"], "data", name)
