"""Compositions and models as folders: written, found again, refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil

import helpers
import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import calm_jax
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.models.hf import export
from calm_jax.text import tokenizer

TOKENS = np.random.default_rng(0).integers(0, 14, (2, 7))
TEXT = "abcdefghij"


def save(folder: pathlib.Path, seed: int, **changes) -> pathlib.Path:
  """A checkpoint with a tokenizer of 14 tokens."""
  export.save_params(folder, *helpers.model(seed, vocab_size=14, **changes))
  tokenizer.train_sentencepiece([TEXT], folder / "tokenizer", vocab_size=14)
  return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  path = tmp_path_factory.mktemp("bases")
  return {
    "anchor": save(path / "anchor", 1),
    "kv": save(path / "kv", 2, width=24),
    "code": save(path / "code", 3, width=16, num_layers=3),
  }


def trained(model):
  """The same composition with a random Θ_C."""
  theta = helpers.random_params(model.params["composition"], 7)
  return dataclasses.replace(
    model, params=model.params | {"composition": theta}
  )


def compose(bases, names=("kv",), dtype="float32", **options):
  loaded = {k: calm_jax.load_model(str(v), dtype) for k, v in bases.items()}
  several = {n: loaded[n] for n in names}
  return trained(calm_jax.compose(loaded["anchor"], several, **options))


@pytest.fixture(scope="module")
def composed(bases):
  return compose(bases)


@pytest.fixture(scope="module")
def saved(composed, tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved") / "composition"
  composed.save(folder)
  return folder


@pytest.fixture
def copied(bases, saved, tmp_path):
  """A composition and its bases, to be damaged."""
  for name, folder in bases.items():
    shutil.copytree(folder, tmp_path / name)
  shutil.copytree(saved, tmp_path / "composition")
  return tmp_path


def load(folder):
  """Loads a composition whose bases were copied along."""
  return calm_jax.load_composed(
    folder / "composition", folder / "anchor", {"kv": folder / "kv"}
  )


def assert_same(a, b):
  assert a.spec == b.spec
  trees.check_same_structure(a.params, b.params, "the loaded model")
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


# Compositions.


def test_a_composition_comes_back(composed, saved):
  again = calm_jax.load_composed(saved)
  assert_same(again, composed)
  assert again.sources == composed.sources
  assert again.generate(["abc"], 4) == composed.generate(["abc"], 4)
  assert sorted(p.name for p in saved.iterdir()) == [
    "README.md", "calm_config.json", "composition.safetensors"
  ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_with_options(bases, dtype, tmp_path):
  model = compose(bases, ("kv", "code"), dtype, norm=False)
  model = trained(model.drop("code").add(
    "other", calm_jax.load_model(str(bases["code"]), dtype), [(1, 2), (3, 2)],
    output_init="normal", visibility="unmasked",
  ))  # fmt: skip
  model.save(tmp_path / "new")
  assert_same(calm_jax.load_composed(tmp_path / "new"), model)


def test_different_tokenizers(bases, tmp_path):
  folder = tmp_path / "other"
  export.save_params(folder, *helpers.model(5, vocab_size=9))
  tokenizer.train_sentencepiece(["abcde"], folder / "tokenizer", vocab_size=9)
  model = compose(bases | {"other": folder}, ("kv", "other"))
  assert model.tokenizers.keys() == {"other"}
  model.save(tmp_path / "new")
  again = calm_jax.load_composed(tmp_path / "new")
  assert_same(again, model)
  prints = {n: t.fingerprint for n, t in again.tokenizers.items()}
  assert prints == {n: t.fingerprint for n, t in model.tokenizers.items()}
  assert model.part("augmenting/other").tokenizer.vocab_size == 9
  assert model.part("augmenting/kv").tokenizer.vocab_size == 14
  assert model.drop("kv").tokenizers.keys() == {"other"}
  assert not model.drop("other").tokenizers
  saved = json.loads((tmp_path / "new" / "calm_config.json").read_text())
  sizes = [m["tokenizer"]["vocab_size"] for m in saved["models"].values()]
  assert sizes == [14, 14, 9]


def test_theta_in_another_dtype(composed, tmp_path):
  composed.save(tmp_path, "bfloat16")
  theta = calm_jax.load_composed(tmp_path).params["composition"]
  want = helpers.in_dtype(composed.params["composition"], "bfloat16")
  trees.check_same_structure(theta, want, "Θ_C")
  jax.tree.map(np.testing.assert_array_equal, theta, want)
  halved = calm_jax.load_composed(tmp_path, dtype="bfloat16")
  assert halved.spec.anchor.compute.dtype == "bfloat16"
  with pytest.raises(InputError, match="int8"):
    composed.save(tmp_path / "new", "int8")


def test_the_file_holds_theta_only(composed, saved):
  leaves = load_file(saved / "composition.safetensors")
  want = trees.flatten({"composition": composed.params["composition"]})
  assert leaves.keys() == want.keys()
  assert "composition/kv/layer_4_to_4/output/kernel" in leaves


def test_size_is_that_of_the_parameters(tmp_path):
  # Wide enough that the names weigh nothing, as in a real model.
  paths = [
    save(tmp_path / n, i, width=w, num_heads=4, num_layers=4)
    for i, (n, w) in enumerate({"a": 256, "b": 128}.items())
  ]
  model = calm_jax.compose(*(calm_jax.load_model(str(p)) for p in paths))
  model.save(tmp_path / "c")
  size = (tmp_path / "c" / "composition.safetensors").stat().st_size
  assert model.num_composition_params * 4 == pytest.approx(size, rel=0.01)


def test_what_the_config_says(composed, saved, bases):
  config = json.loads((saved / "calm_config.json").read_text())
  assert config["calm_jax_version"] == calm_jax.__version__
  assert config["num_params"] == composed.num_composition_params
  anchor = config["models"]["anchor"]
  assert anchor["name"] == str(bases["anchor"])
  assert anchor["revision"] is None
  assert anchor["tokenizer"] == {
    "fingerprint": composed.tokenizer.fingerprint, "vocab_size": 14
  }  # fmt: skip
  assert anchor["sha256"].keys() == {"config.json", "model.safetensors"}
  assert config["augmenting"] == [{
    "name": "kv", "connections": [[4, 4]], "visibility": "causal",
    "norm": True, "positions": "none", "output_init": "zeros",
    "output_scale": "none", "control": "none", "control_seed": 0,
  }]  # fmt: skip


def test_the_card_names_what_the_hub_has(composed, bases, saved, tmp_path):
  card = huggingface_hub.ModelCard.load(saved / "README.md")
  assert card.data.library_name == "calm_jax"
  assert card.data.base_model is None
  assert str(bases["anchor"].parent) not in card.content
  source = composed.sources["anchor"]._replace(name="org/m", revision="abc")
  model = dataclasses.replace(
    composed, sources=composed.sources | {"anchor": source}
  )
  model.save(tmp_path)
  card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
  assert card.data.base_model == ["org/m"]
  assert "composition" in card.data.tags
  assert "`org/m` at `abc`" in card.content


def flip(path: pathlib.Path, at: int = -1) -> None:
  data = bytearray(path.read_bytes())
  data[at] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize(
  ("file", "said"),
  [
    ("anchor/model.safetensors", r"anchor.model.safetensors has changed: its"),
    (
      "kv/model.safetensors",
      r"kv.model.safetensors has changed.*augmenting/kv",
    ),
    ("composition/composition.safetensors", "composition.safetensors is not"),
  ],
)
def test_a_changed_byte_is_refused(copied, file, said):
  load(copied)
  flip(copied / file)
  with pytest.raises(InputError, match=said):
    load(copied)


def test_a_changed_config_is_refused(copied):
  path = copied / "anchor" / "config.json"
  path.write_text(path.read_text().replace("100.0", "101.0"))
  with pytest.raises(InputError, match=r"config.json has changed"):
    load(copied)


def test_other_tokenizers_are_refused(copied):
  (copied / "kv" / "tokenizer.model").unlink()
  with pytest.raises(InputError, match=r"tokenizer is not that.*augmenting/kv"):
    load(copied)


def test_other_files_are_refused(copied, bases):
  config, params = helpers.model(1, vocab_size=14)
  for name in ("model.safetensors", "config.json"):
    (copied / "anchor" / name).unlink()
  export.save_params(copied / "anchor", config, params, max_shard_size=9000)
  with pytest.raises(InputError, match=r"00001-of-.*was not there when"):
    load(copied)
  shutil.copy(bases["anchor"] / "config.json", copied / "kv" / "config.json")
  with pytest.raises(InputError, match=r"kv.config.json has changed"):
    calm_jax.load_composed(copied / "composition", augmenting=copied / "kv")


@pytest.fixture
def run(bases, tmp_path):
  """A run's folder: two models and the composition of them."""
  folder = tmp_path / "here" / "run"
  for name in ("anchor", "kv"):
    shutil.copytree(bases[name], folder / "models" / name)
  models = {n: folder / "models" / n for n in ("anchor", "kv")}
  compose(models).save(folder / "composition")
  return folder


def change_config(folder: pathlib.Path, change) -> None:
  path = folder / "calm_config.json"
  config = json.loads(path.read_text())
  change(config)
  path.write_text(json.dumps(config))


def as_earlier_versions(run: pathlib.Path) -> None:
  """Names the models as versions before did: by absolute paths."""

  def change(config):
    del config["folder"]
    for part, model in config["models"].items():
      model["name"] = str(run / "models" / part.removeprefix("augmenting/"))

  change_config(run / "composition", change)


def test_models_of_a_run_are_named_relative_to_it(run, bases):
  config = json.loads((run / "composition" / "calm_config.json").read_text())
  names = {part: model["name"] for part, model in config["models"].items()}
  assert names == {
    "anchor": "../models/anchor",
    "augmenting/kv": "../models/kv",
  }


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_that_was_moved(run, earlier, tmp_path, monkeypatch):
  want = calm_jax.load_composed(run / "composition")
  if earlier:
    as_earlier_versions(run)
  moved = tmp_path / "there" / "renamed"
  moved.parent.mkdir()
  run.rename(moved)
  again = calm_jax.load_composed(moved / "composition")
  assert_same(again, want)
  folders = {source.folder for source in again.sources.values()}
  assert folders == {moved / "models" / "anchor", moved / "models" / "kv"}
  # A link to it, and a name relative to where one stands.
  (tmp_path / "link").symlink_to(moved / "composition")
  if not earlier:
    assert_same(calm_jax.load_composed(tmp_path / "link"), want)
  monkeypatch.chdir(moved / "composition")
  assert_same(calm_jax.load_composed("."), want)
  # What is there is still compared, to the bit.
  flip(moved / "models" / "kv" / "model.safetensors")
  with pytest.raises(InputError, match=r"kv.model.safetensors has changed"):
    calm_jax.load_composed(moved / "composition")


def test_a_run_that_was_copied_has_its_own_models(run, tmp_path):
  shutil.copytree(run, tmp_path / "copy")
  again = calm_jax.load_composed(tmp_path / "copy" / "composition")
  folder = again.sources["anchor"].folder
  assert folder == tmp_path / "copy" / "models" / "anchor"


def test_a_composition_that_was_moved_alone(run, tmp_path):
  alone = tmp_path / "alone" / "best"
  shutil.move(run / "composition", alone)
  want = calm_jax.load_composed(alone)
  assert want.sources["anchor"].folder == run / "models" / "anchor"
  # On another machine.
  elsewhere = tmp_path / "elsewhere"
  shutil.move(run / "models", elsewhere)
  with pytest.raises(InputError) as caught:
    calm_jax.load_composed(alone)
  for said in (
    f"\n  anchor: no folder '{alone.parent}/models/anchor'",
    f"\n  augmenting/kv: no folder '{alone.parent}/models/kv'",
    "--anchor=FOLDER and --augmenting=FOLDER",
    "load_composed(..., anchor=FOLDER, augmenting=FOLDER)",
  ):
    assert said in str(caught.value)
  with pytest.raises(InputError, match=r"not found:\n  augmenting/kv: no"):
    calm_jax.load_composed(alone, elsewhere / "anchor")
  for augmenting in (elsewhere / "kv", f"kv={elsewhere / 'kv'}"):
    again = calm_jax.load_composed(alone, elsewhere / "anchor", augmenting)
    assert_same(again, want)


def test_a_folder_of_the_same_name_is_not_the_model(run, tmp_path):
  as_earlier_versions(run)
  moved = tmp_path / "there"
  run.rename(moved)
  shutil.rmtree(moved / "models" / "anchor")
  shutil.copytree(moved / "models" / "kv", moved / "models" / "anchor")
  said = f"anchor: no folder '{run}/models/anchor'"
  with pytest.raises(InputError, match=re.escape(said)):
    calm_jax.load_composed(moved / "composition")


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"calm_config.json": None}, "no calm_config.json: "),
    ({"calm_config.json": "{"}, "is not JSON"),
    ({"calm_config.json": '{"format": 2}'}, "has format 2"),
    ({"composition.safetensors": None}, "composition.safetensors is missing"),
  ],
)
def test_broken_compositions(copied, changes, said):
  for name, text in changes.items():
    path = copied / "composition" / name
    path.unlink() if text is None else path.write_text(text)
  with pytest.raises(InputError, match=said):
    load(copied)


def test_leaves_that_do_not_fit(copied):
  path = copied / "composition" / "calm_config.json"
  config = json.loads(path.read_text())
  config["augmenting"][0]["norm"] = False
  path.write_text(json.dumps(config))
  with pytest.raises(InputError, match="unexpected"):
    load(copied)


def test_places_of_no_part(saved, bases, tmp_path):
  with pytest.raises(InputError, match=r"no augmenting model 'x'"):
    calm_jax.load_composed(saved, augmenting={"x": "y"})
  compose(bases, ("kv", "code")).save(tmp_path)
  several = r"which of \['kv', 'code'\] is at y, by kv=FOLDER,code=FOLDER"
  with pytest.raises(InputError, match=several):
    calm_jax.load_composed(tmp_path, augmenting="y")
  given = f"code={bases['code']},kv={bases['kv']}"
  again = calm_jax.load_composed(tmp_path, augmenting=given)
  assert again.sources["augmenting/code"].folder == bases["code"]


def test_what_cannot_be_saved(composed, saved, tmp_path):
  with pytest.raises(InputError, match="holds a composition already"):
    composed.save(saved)
  with pytest.raises(InputError, match="export_hf"):
    composed.part("anchor").save(tmp_path / "a")
  nowhere = dataclasses.replace(composed, sources={})
  with pytest.raises(InputError, match=r"anchor was not loaded.*export_hf"):
    nowhere.save(tmp_path / "a")
  params = composed.params | {
    "anchor": jax.tree.map(lambda p: p + 1, composed.params["anchor"])
  }
  with pytest.raises(InputError, match="anchor is no longer what"):
    dataclasses.replace(composed, params=params).save(tmp_path / "a")
  assert not (tmp_path / "a").exists()


class Api:
  """What `push_to_hub` uses of huggingface_hub, without a network."""

  def __init__(self, token):
    self.asked = {"token": token}
    Api.last = self

  def create_repo(self, repo_id, **options):
    if repo_id == "org/taken":
      raise OSError("403 Forbidden")
    self.asked |= {"repo_id": repo_id, **options}
    return f"https://hub/{repo_id}"

  def upload_folder(self, repo_id, folder_path, commit_message):
    folder = pathlib.Path(folder_path)
    self.files = {p.name: p.read_bytes() for p in folder.iterdir()}


def test_push(composed, bases, saved, monkeypatch):
  monkeypatch.setattr(huggingface_hub, "HfApi", Api)
  url = composed.push_to_hub("org/new", private=True, token="t")
  assert url == "https://hub/org/new"
  assert Api.last.asked == {
    "token": "t", "repo_id": "org/new", "private": True, "exist_ok": True
  }  # fmt: skip
  weights = "composition.safetensors"
  assert Api.last.files[weights] == (saved / weights).read_bytes()
  # A local path is of no use to others, and none of their business.
  assert str(bases["anchor"].parent).encode() not in b"".join(
    Api.last.files.values()
  )
  with pytest.raises(InputError, match=r"cannot push to org/taken: 403"):
    composed.push_to_hub("org/taken")


# The hub.


@pytest.fixture
def hub(bases, saved, tmp_path, monkeypatch):
  """A hub with the bases and a composition: {id: (folder, revisions asked)}."""
  asked = []

  def download(name, revision, allow_patterns):
    asked.append((name, revision))
    at = tmp_path / name / (revision or "c0ffee")
    if not at.exists():
      shutil.copytree((bases | {"saved": saved})[name.split("/")[1]], at)
    return str(at)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  return asked


def test_revisions_are_pinned(hub, tmp_path):
  anchor = calm_jax.load_model("org/anchor", revision="v1")
  augmenting = calm_jax.load_model("org/kv")
  # Each twice: the weights that the index names come last, at one commit.
  assert hub[::2] == [("org/anchor", "v1"), ("org/kv", None)]
  assert hub[1::2] == [("org/anchor", "v1"), ("org/kv", "c0ffee")]
  calm_jax.compose(anchor, augmenting).save(tmp_path / "new")
  del hub[:]
  again = calm_jax.load_composed(tmp_path / "new")
  assert hub[::2] == hub[1::2] == [("org/anchor", "v1"), ("org/kv", "c0ffee")]
  assert again.sources["augmenting/augmenting"].revision == "c0ffee"


def test_a_composition_on_the_hub(hub, composed):
  assert_same(calm_jax.load_composed("org/saved", revision="v2"), composed)
  assert hub == [("org/saved", "v2")]


def test_a_folder_has_no_revision(bases):
  with pytest.raises(InputError, match="is a folder, which has no revision"):
    calm_jax.load_model(str(bases["anchor"]), revision="v1")
