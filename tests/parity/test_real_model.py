"""The comparison of real checkpoints, on a small one that was trained."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys

import pytest

pytest.importorskip(
  "torch", reason="parity is measured against torch, which is not installed"
)
import real_model


def test_a_small_trained_model(tmp_path, monkeypatch, capsys):
  if not os.environ.get("CALM_SHARED"):
    pytest.skip("CALM_SHARED does not name the folder of shared models")
  folder = pathlib.Path(os.environ["CALM_SHARED"], "models", "stories260k")
  text = (
    "One day, a little cat saw a big red ball in the park and ran to it.\n\n"
    "Tom was sad. His mom gave him a hug, and then they went to the shop.\n"
  )
  (tmp_path / "stories.txt").write_text(text)
  (tmp_path / "more.jsonl").write_text('{"prompt": "He said:\\n \\"Hi!\\""}\n')
  files = [str(path) for path in sorted(tmp_path.iterdir())]
  has_harness = importlib.util.find_spec("lm_eval") is not None
  flags = ["--tokens=20", *["--lm_eval"] * has_harness]
  monkeypatch.setattr(
    sys, "argv", ["real_model.py", str(folder), *files, *flags]
  )
  real_model.main()
  printed = capsys.readouterr().out
  assert printed.count("1 of 1") == 2
  assert not has_harness or "3 scores" in printed
