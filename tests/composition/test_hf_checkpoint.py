"""Models written back as Hugging Face checkpoints."""

from __future__ import annotations

import dataclasses
import json

import helpers
import jax
import numpy as np
import pytest
import spelled
from golden import cases
from safetensors.numpy import load_file

import calm_jax
from calm_jax.composition.connections import Composition
from calm_jax.composition.execution import Device
from calm_jax.core import files, trees
from calm_jax.core.errors import InputError
from calm_jax.models.hf import weight_files
from calm_jax.models.rope import Rope
from calm_jax.text import tokenizer


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
  path = tmp_path_factory.mktemp("bases")
  anchor, kv = (
    calm_jax.load_model(str(spelled.save(path / name, seed)))
    for seed, name in enumerate(("anchor", "kv"))
  )
  return calm_jax.compose(anchor, {"kv": kv}, output_init="normal")


def assert_same(a, b):
  assert a.spec == b.spec
  trees.check_same_structure(a.params, b.params, "the loaded model")
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


@pytest.mark.parametrize("case", ["gqa_untied", "tied", "biases"])
def test_exported_is_what_was_loaded(case, tmp_path):
  folder = cases.write(tmp_path / "old", case)
  (folder / "config.json").write_text(json.dumps(cases.config_json(case)))
  texts = (
    "generation_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
  )  # fmt: skip
  (folder / "additional_chat_templates").mkdir()
  for name in texts:
    (folder / name).write_text("{}")
  model = calm_jax.load_model(str(folder))
  model.export_hf(tmp_path / "new", max_shard_size=60_000)
  written = {
    name: array
    for file in weight_files.weight_files(tmp_path / "new")
    for name, array in load_file(file).items()
  }
  jax.tree.map(np.testing.assert_array_equal, written, cases.tensors(case))
  old, new = (
    files.read_json(tmp_path / n / "config.json") for n in ("old", "new")
  )
  assert new == old | {"dtype": "float32"}
  assert all((tmp_path / "new" / name).exists() for name in texts)
  half = calm_jax.load_model(str(folder), "bfloat16")
  half.export_hf(tmp_path / "half")
  config = files.read_json(tmp_path / "half" / "config.json")
  assert config["dtype"] == "bfloat16"
  again = calm_jax.load_model(str(tmp_path / "half"), "bfloat16")
  assert_same(again, half)


def test_a_model_from_scratch_is_a_llama(tmp_path):
  text = tokenizer.train_sentencepiece(
    ["abcdefghij"], tmp_path / "m", vocab_size=14
  )
  config, params = helpers.model(1, vocab_size=14)
  model = calm_jax.LanguageModel(Composition(config), {"anchor": params}, text)
  model.export_hf(tmp_path / "new")
  again = calm_jax.load_model(str(tmp_path / "new"))
  assert_same(again, model)
  assert again.tokenizer.fingerprint == text.fingerprint
  dataclasses.replace(model, tokenizer=None).export_hf(tmp_path / "bare")
  assert calm_jax.load_model(str(tmp_path / "bare")).tokenizer is None


def test_what_cannot_be_exported(composed, tmp_path):
  anchor = composed.part("anchor")
  with pytest.raises(InputError, match="holds a model already"):
    anchor.export_hf(anchor.origin)
  config = dataclasses.replace(anchor.spec.anchor, rope=Rope(4, theta=5.0))
  other = dataclasses.replace(anchor, spec=Composition(config))
  with pytest.raises(InputError, match="describes another model"):
    other.export_hf(tmp_path / "new")


def test_a_part_is_exported_and_composed_again(composed, tmp_path):
  for part in ("anchor", "augmenting/kv"):
    composed.part(part).export_hf(tmp_path / part)
  again = calm_jax.compose(
    calm_jax.load_model(str(tmp_path / "anchor")),
    {"kv": calm_jax.load_model(str(tmp_path / "augmenting/kv"))},
    output_init="normal",
  )
  theta = {"composition": composed.params["composition"]}
  again = dataclasses.replace(again, params=again.params | theta)
  assert_same(again, composed)
  tokens = np.arange(14).reshape(2, 7)
  np.testing.assert_array_equal(again.logits(tokens), composed.logits(tokens))


def test_a_model_is_loaded_with_the_kernel_of_the_device(tmp_path, monkeypatch):
  path = str(spelled.save(tmp_path / "model", 0))
  assert calm_jax.load_model(path).spec.anchor.compute.attention == "xla"
  monkeypatch.setattr(Device, "here", lambda: Device("tpu"))
  loaded = calm_jax.load_model(path, "bfloat16")
  assert loaded.spec.anchor.compute.attention == "splash"
  # XLA would not partition it.
  held = calm_jax.load_model(
    path,
    "bfloat16",
    shardings=lambda shapes: jax.tree.map(
      lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes
    ),
  )
  assert held.spec.anchor.compute.attention == "xla"
