"""Where the shared data is, and how an evaluation is run on a function."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def folder(name: str) -> Path:
  """A folder of the shared data; skips the test where there is none."""
  if not os.environ.get("CALM_SHARED"):
    pytest.skip("CALM_SHARED is unset: the shared data is not here")
  return Path(os.environ["CALM_SHARED"], "data", name)


def answer(evaluation, generate, fits=lambda prompt: True):
  """The judgement of what `generate` makes of an evaluation's prompts."""
  prompts = evaluation.prompts(fits)
  return evaluation.judge(prompts, generate([p.text for p in prompts]))
