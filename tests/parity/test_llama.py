"""Live against transformers: run with torch installed, skipped without."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
from golden import cases

from calm_jax.models.hf import export, loading

torch = pytest.importorskip(
  "torch", reason="parity is measured against torch, which is not installed"
)
transformers = pytest.importorskip(
  "transformers", reason="parity is measured against transformers"
)

LENGTH = sum(cases.LENGTHS)


def reference(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()


@torch.no_grad()
def logits(model, tokens, **inputs):
  tensors = {k: torch.from_numpy(np.int64(v)) for k, v in inputs.items()}
  ids = torch.from_numpy(np.int64(tokens))
  return model(input_ids=ids, **tensors).logits.numpy()


def ours(folder, sequence):
  config = loading.load_config(folder)
  params = loading.load_params(folder, config)
  return np.asarray(helpers.decode_rows(params, config, sequence))


def assert_close(a, b):
  assert np.abs(a - b).max() <= 1e-4


@pytest.mark.parametrize("case", cases.CASES)
def test_saved_by_transformers(case, tmp_path):
  # In shards, and padded: left as for generation, right as for training.
  model = reference(cases.write(tmp_path / "first", case))
  folder = tmp_path / "theirs"
  model.save_pretrained(folder, max_shard_size="60KB")
  assert (folder / "model.safetensors.index.json").exists()
  a, b = cases.tokens(case)
  for side in ("left", "right"):
    sequence, _ = helpers.layouts(a, b, LENGTH)[side]
    real = sequence.segments > 0
    theirs = logits(
      model,
      sequence.tokens,
      attention_mask=real,
      position_ids=sequence.positions,
    )
    assert_close(ours(folder, sequence)[real], theirs[real])


@pytest.mark.parametrize("case", cases.CASES)
def test_packed_as_if_alone(case, tmp_path):
  folder = cases.write(tmp_path, case)
  model = reference(folder)
  sequence, places = helpers.layouts(*cases.tokens(case), LENGTH)["packed"]
  packed = ours(folder, sequence)
  for (row, slot), ids in places.items():
    alone = logits(model, ids[None])[0]
    assert_close(packed[row, slot : slot + len(ids)], alone)


@pytest.mark.parametrize("case", cases.CASES)
def test_saved_by_us(case, tmp_path):
  folder = cases.write(tmp_path / "theirs", case)
  config = loading.load_config(folder)
  params = loading.load_params(folder, config)
  export.save_params(tmp_path / "ours", config, params)
  tokens = cases.tokens(case)[0][None]
  np.testing.assert_array_equal(
    logits(reference(tmp_path / "ours"), tokens),
    logits(reference(folder), tokens),
  )


@pytest.mark.parametrize("case", cases.CASES)
def test_golden_files_are_what_torch_computes(case, tmp_path):
  model = reference(cases.write(tmp_path, case))
  for ids, stored in zip(cases.tokens(case), cases.logits(case), strict=True):
    assert_close(logits(model, ids[None])[0], stored)
