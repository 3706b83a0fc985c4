"""An exported composition against calm_jax and transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import runpy
import shutil

import helpers
import numpy as np
import pytest
from golden import options

import calm_jax
from calm_jax.composition import transformers_folder
from calm_jax.composition.model import untrained
from calm_jax.core import files

pytest.importorskip(
  "torch", reason="parity is measured against torch, which is not installed"
)
import reference
import torch
import transformers

PROMPTS = (21, 9)  # tokens of the two rows
NEW = 40
OPTIONS = {
  "plain": {"norm": False},
  "turned": {"positions": "rope", "output_scale": "state"},
}


def with_random(composed, seed: int):
  """A composition as if it were trained."""
  theta = helpers.random_params(helpers.theta_shapes(composed.spec), seed)
  params = composed.params | {"composition": theta}
  return dataclasses.replace(composed, params=params)


def load(folder, **how):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, **how
  ).eval()


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
  """Experts with windows, and two augmenting models of other families."""
  folder = tmp_path_factory.mktemp("models")
  configs = {
    "anchor": options.config_json("mixtral") | options.WINDOW,
    "plain": options.config_json("gemma2"),
    "turned": options.config_json("gpt2"),
  }
  models = {
    name: calm_jax.load_model(str(reference.write(folder / name, config)))
    for name, config in configs.items()
  }
  anchor = models.pop("anchor")
  made = None
  for name, model in models.items():
    one = untrained(anchor, {name: model}, [(2, 2), (3, 4)], **OPTIONS[name])
    made = one if made is None else calm_jax.join_compositions([made, one])
  return with_random(made, 0)


@pytest.fixture(scope="module")
def exported(composed, tmp_path_factory):
  folder = tmp_path_factory.mktemp("exported") / "whole"
  composed.export_hf(folder, max_shard_size=100_000)
  return folder


@pytest.fixture(scope="module")
def loaded(exported):
  return load(exported)


def ragged() -> dict:
  """Two prompts, padded on the left."""
  ids, mask = torch.zeros(2, max(PROMPTS)).long(), torch.zeros(2, max(PROMPTS))
  for row, length in enumerate(PROMPTS):
    ids[row, -length:] = torch.tensor(options.tokens(length))
    mask[row, -length:] = 1
  return {"input_ids": ids, "attention_mask": mask.long()}


@torch.no_grad()
def test_logits_and_greedy_tokens(composed, loaded):
  given = ragged()
  made = loaded.generate(
    **given,
    max_new_tokens=NEW,
    do_sample=False,
    output_logits=True,
    return_dict_in_generate=True,
  )
  ids = made.sequences
  assert ids.shape == (2, max(PROMPTS) + NEW)
  mask = torch.cat([given["attention_mask"], torch.ones(2, NEW).long()], -1)
  total = ids.shape[1]
  rows = [
    [total - length - NEW, row.numpy()[-length - NEW :]]
    for length, row in zip(PROMPTS, ids, strict=True)
  ]
  sequence = helpers.rows(*rows, length=total)
  ours = np.asarray(helpers.composed(composed.params, composed.spec, sequence))
  theirs = loaded(ids, attention_mask=mask).logits.numpy()
  real = mask.numpy().astype(bool)
  np.testing.assert_allclose(theirs[real], ours[real], atol=1e-4)
  cached = torch.stack(made.logits, 1).numpy()
  np.testing.assert_allclose(cached, ours[:, -NEW - 1 : -1], atol=1e-4)
  # So ours, too, continues these prompts by these tokens.
  greedy = ours[:, -NEW - 1 : -1].argmax(-1)
  np.testing.assert_array_equal(ids[:, -NEW:], greedy)
  # The connections matter, or all of this says little.
  anchor = loaded.anchor(ids, attention_mask=mask).logits.numpy()
  assert np.abs(anchor - theirs)[real].max() > 0.1


@torch.no_grad()
def test_beams_follow_the_cache(loaded):
  beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
  with_cache = loaded.generate(**ragged(), **beams)
  without = loaded.generate(**ragged(), **beams, use_cache=False)
  assert torch.equal(with_cache, without)


def same_weights(a, b) -> None:
  ours, theirs = a.state_dict(), b.state_dict()
  assert ours.keys() == theirs.keys()
  for name, tensor in ours.items():
    assert torch.equal(tensor, theirs[name]), name


@torch.no_grad()
def test_saved_by_transformers_and_loaded_again(loaded, exported, tmp_path):
  loaded.save_pretrained(tmp_path / "again")
  again = load(tmp_path / "again")
  same_weights(again, loaded)
  assert torch.equal(again(**ragged()).logits, loaded(**ragged()).logits)
  half = load(exported, dtype=torch.bfloat16)
  assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_references(composed, loaded, tmp_path):
  folder = tmp_path / "references"
  composed.export_hf(folder, references=True)
  size = sum(path.stat().st_size for path in folder.iterdir())
  assert size < 4 * composed.num_composition_params + 40_000
  found = load(folder)
  same_weights(found, loaded)
  assert torch.equal(found(**ragged()).logits, loaded(**ragged()).logits)
  found.save_pretrained(tmp_path / "whole")
  same_weights(load(tmp_path / "whole"), loaded)

  config = files.read_json(folder / "config.json")
  source = folder / config["sources"][1]["name"]
  copy = shutil.copytree(source, tmp_path / "copy")
  helpers.flip(copy / "model.safetensors")
  config["sources"][1]["name"] = str(copy)
  files.write_json(folder / "config.json", config)
  with pytest.raises(ValueError, match="has changed since it was composed"):
    load(folder)


@pytest.fixture(scope="module")
def modeling():
  spec = importlib.util.spec_from_file_location(
    "modeling_calm", transformers_folder.MODELING
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def random_model(modeling, config_json: dict, **changes):
  """A model composed with one of its own shape, in torch alone."""
  joined = {
    "name": "kv", "config": config_json, "connections": [[1, 2], [3, 4]],
    "visibility": "causal", "norm": True, "positions": "none",
    "output_scale": "none",
  } | changes  # fmt: skip
  model = modeling.CalmForCausalLM(modeling.CalmConfig(config_json, [joined]))
  random = torch.Generator().manual_seed(0)
  for parameter in model.parameters():
    if parameter.ndim > 1:
      scale = parameter.shape[-1] ** -0.5
      parameter.data.normal_(0, scale, generator=random)
  return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("positions", ["none", "rope"])
def test_the_future_is_not_seen(modeling, positions):
  config = options.config_json("llama")
  ids = ragged()["input_ids"][:1]
  models = {
    visibility: random_model(
      modeling, config, visibility=visibility, positions=positions
    )
    for visibility in ("causal", "unmasked")
  }
  for at in (1, 8, 20):
    other = ids.clone()
    other[:, at:] = (other[:, at:] + 1) % config["vocab_size"]
    differ = {
      name: (model(ids).logits - model(other).logits)[:, :at].abs().max()
      for name, model in models.items()
    }
    assert differ["causal"] == 0 < differ["unmasked"]


def test_what_it_does_not_take_is_named(modeling):
  model = random_model(modeling, options.config_json("llama"))
  with pytest.raises(TypeError, match=r"does not take.*output_hidden_states"):
    model(**ragged(), output_hidden_states=True)
  with pytest.raises(ValueError, match="no static or sliding cache"):
    model.generate(**ragged(), cache_implementation="static", max_new_tokens=2)


def test_transformers_4_is_refused(monkeypatch):
  monkeypatch.setattr("transformers.__version__", "4.57.6")
  with pytest.raises(ImportError, match=r"transformers 5, and this is 4\.57"):
    runpy.run_path(str(transformers_folder.MODELING))


@pytest.mark.parametrize("family", options.FAMILIES)
@torch.no_grad()
def test_the_layers_of_every_family(family, modeling):
  """With connections that add nothing it is the anchor of transformers."""
  given = ragged()
  real = given["attention_mask"].bool()
  given["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
  for case in ("base", *options.FAMILIES[family][1]):
    model = random_model(modeling, options.config_json(family, case))
    for connection in model.augmenting[0].connections.values():
      connection.output.weight.data.zero_()
    logits = model(**given).logits[real]
    want = model.anchor(**given).logits[real]
    torch.testing.assert_close(logits, want)
