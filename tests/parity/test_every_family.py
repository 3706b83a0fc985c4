"""Every family and option live against transformers; skipped without torch."""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile

import numpy as np
import pytest
from golden import options
from safetensors.numpy import load_file

pytest.importorskip(
  "torch", reason="parity is measured against torch, which is not installed"
)
import reference

from calm_jax.models.hf import export, loading


@functools.cache
def base(family: str) -> dict[int, np.ndarray]:
  with tempfile.TemporaryDirectory() as folder:
    config = options.config_json(family)
    folder = reference.write(pathlib.Path(folder), config)
    return reference.alone(reference.read(folder))


@pytest.mark.parametrize(("family", "case"), options.CASES)
def test_logits_and_round_trip(family, case, tmp_path):
  config = options.config_json(family, case)
  folder = reference.write(tmp_path / "theirs", config)
  model = reference.read(folder)
  errors = reference.errors(folder, model, reference.decode_quickly)
  assert max(errors.values()) <= 1e-4, errors

  # Or the option was not seen at all.
  theirs = reference.alone(model)
  changed = max(
    np.abs(theirs[n] - base(family)[n]).max() for n in options.LENGTHS
  )
  inert = case == "base" or (family, case) in options.INERT
  assert changed <= 1e-5 if inert else changed > 1e-3

  read = loading.load_config(folder)
  written = json.loads((folder / "config.json").read_text())
  export.save_params(
    tmp_path / "ours", read, loading.load_params(folder, read), written
  )
  before = load_file(folder / "model.safetensors")
  after = load_file(tmp_path / "ours" / "model.safetensors")
  assert before.keys() == after.keys()
  for name in before:
    np.testing.assert_array_equal(after[name], before[name], err_msg=name)
  again = reference.alone(reference.read(tmp_path / "ours"))
  for n in options.LENGTHS:
    np.testing.assert_array_equal(again[n], theirs[n])
