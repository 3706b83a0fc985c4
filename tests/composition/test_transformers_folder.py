"""Compositions written for transformers: their folders, and what is refused.

What they compute is compared in tests/parity/test_composition_in_torch.py.
"""

from __future__ import annotations

import dataclasses

import helpers
import pytest
import spelled

import calm_jax
from calm_jax import cli, export
from calm_jax.composition import transformers_folder
from calm_jax.composition.model import untrained
from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.models import quantisation


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  path = tmp_path_factory.mktemp("bases")
  return [
    calm_jax.load_model(str(spelled.save(path / name, seed, text)))
    for seed, (name, text) in enumerate(
      {"anchor": "abc .", "kv": "abc .", "other": "cba.x y"}.items()
    )
  ]


def compose(anchor, augmenting, **options):
  made = untrained(anchor, {"kv": augmenting}, 1, **options)
  theta = helpers.random_params(helpers.theta_shapes(made.spec), 0)
  params = made.params | {"composition": theta}
  return dataclasses.replace(made, params=params)


def test_the_command(models, tmp_path, monkeypatch, capsys):
  compose(*models[:2]).save(tmp_path / "composition")

  def run(folder, *more):
    model = f"--model={tmp_path / 'composition'}"
    arguments = ["", model, f"--folder={tmp_path / folder}", *more]
    monkeypatch.setattr("sys.argv", arguments)
    cli.guarded(export.main)
    assert f"{tmp_path / folder}', trust_remote" in capsys.readouterr().out
    return {path.name for path in (tmp_path / folder).iterdir()}

  always = {
    "config.json", "generation_config.json", "model.safetensors",
    "modeling_calm.py",
  }  # fmt: skip
  assert run("whole") == always | {"tokenizer.model"}
  assert run("references", "--references", "--dtype=bfloat16") == always
  whole, references = (
    files.read_json(tmp_path / name / "config.json")
    for name in ("whole", "references")
  )
  assert whole["sources"] == [] and whole["dtype"] == "float32"
  names = [source["name"] for source in references["sources"]]
  assert names == [models[0].origin, models[1].origin]
  assert references["dtype"] == "bfloat16"
  ends = files.read_json(tmp_path / "whole" / "generation_config.json")
  assert ends == {"eos_token_id": [2]}


def test_what_is_refused(models, tmp_path):
  anchor, kv, other = models
  half = calm_jax.load_model(kv.origin, "bfloat16")
  few = calm_jax.load_model(kv.origin, quantise=quantisation.KINDS[-1])
  for composed, message in (
    (compose(anchor, other), "'kv' has other tokens than the anchor"),
    (compose(anchor, kv, visibility="encoder"), "visibility='encoder'"),
    (compose(anchor, kv, control="noise"), "control='noise'"),
    (compose(anchor, half), r"of \['bfloat16', 'float32'\].*the same dtype"),
    (compose(anchor, few), "is in int"),
  ):
    with pytest.raises(InputError, match=message):
      composed.export_hf(tmp_path / "new")
  assert not (tmp_path / "new").exists()
  with pytest.raises(InputError, match="is for compositions"):
    anchor.export_hf(tmp_path / "new", references=True)
  changed = dataclasses.replace(compose(anchor, kv), sources={})
  with pytest.raises(InputError, match="the anchor was not loaded"):
    changed.export_hf(tmp_path / "new", references=True)
  with pytest.raises(InputError, match="holds a model already"):
    compose(anchor, kv).export_hf(anchor.origin)


def test_the_code_is_copied(models, tmp_path):
  compose(*models[:2]).export_hf(tmp_path / "new")
  copy = tmp_path / "new" / "modeling_calm.py"
  assert copy.read_text() == transformers_folder.MODELING.read_text()
