"""Checkpoint folders: read strictly, written so that they read back."""

from __future__ import annotations

import json
import pathlib
import pickle

import helpers
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases
from safetensors.numpy import load_file, save_file

from calm_jax.core import hub
from calm_jax.core.errors import InputError
from calm_jax.models import decoder
from calm_jax.models.hf import export, loading

Q = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(folder: pathlib.Path, dtype: str = "float32"):
  return loading.load_params(folder, loading.load_config(folder), dtype)


def shard(folder: pathlib.Path, count: int = 3) -> list[pathlib.Path]:
  """Splits model.safetensors as transformers does."""
  named = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
  weight_map = {n: files[i % count] for i, n in enumerate(named)}
  for file in files:
    part = {n: v for n, v in named.items() if weight_map[n] == file}
    save_file(part, folder / file)
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return [folder / file for file in files]


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# Finding the folder.


def test_resolve_finds_a_folder(tmp_path):
  assert hub.locate(tmp_path).folder == tmp_path
  assert hub.locate(str(tmp_path)).folder == tmp_path


@pytest.mark.parametrize(
  "name",
  ["./nope/model", "/nope/model", "nope", "a/b/c", "../a", "~/a", "a/b@"],
)
def test_resolve_does_not_ask_the_hub_for_a_path(name, monkeypatch, tmp_path):
  def asked(*_, **__):
    raise AssertionError("asked the hub")

  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
  with pytest.raises(InputError, match="looks like org/name"):
    hub.locate(name)


def test_resolve_of_a_file_asks_for_its_folder(tmp_path):
  path = tmp_path / "model.safetensors"
  path.touch()
  with pytest.raises(InputError, match="give the folder"):
    hub.locate(path)


def test_resolve_offline_says_what_to_do(monkeypatch, tmp_path):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(
    huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache")
  )
  with pytest.raises(InputError, match="hf download org/name --local-dir"):
    hub.locate("org/name")
  with pytest.raises(InputError, match="cannot get org/name at revision 'v1'"):
    hub.locate("org/name@v1")


@pytest.mark.parametrize("asked", [("org/name", "v1"), ("org/name@v1",)])
@pytest.mark.parametrize(
  ("weights", "index"),
  [
    (["model.safetensors"], False),
    (["weights-1.safetensors", "part[2].safetensors"], True),
    (["pytorch_model-00001-of-00002.safetensors", "x.safetensors"], True),
    (["model.safetensors"], True),
  ],
)
def test_resolve_downloads_what_belongs_to_a_model(
  monkeypatch, tmp_path, weights, index, asked
):
  remote = {
    "config.json": "{}", "tokenizer.json": "{}", "added_tokens.json": "{}",
    "tokenizer.model": "", "chat_template.jinja": "", "merges.txt": "",
    "additional_chat_templates/tools.jinja": "",
  } | dict.fromkeys(weights, "")  # fmt: skip
  if index:
    names = {str(i): name for i, name in enumerate(weights)}
    remote[hub.INDEX] = json.dumps({"weight_map": names | {"x": "y.bin"}})
  others = [
    "pytorch_model.bin", "modeling_llama.py", "consolidated.00.pth", "y.bin",
    "consolidated.safetensors", "flax_model.msgpack",
  ]  # fmt: skip
  revisions = []

  def download(name, revision, allow_patterns):
    assert name == "org/name"
    revisions.append(revision)
    kept = huggingface_hub.utils.filter_repo_objects(
      [*remote, *others], allow_patterns=allow_patterns
    )
    for file in kept:
      path = tmp_path / "snapshots" / "c0ffee" / file
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(remote.get(file, ""))
    return str(tmp_path / "snapshots" / "c0ffee")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  source = hub.locate(*asked)
  here = {p.relative_to(source.folder) for p in source.folder.rglob("*.*")}
  assert {str(path) for path in here} == remote.keys()
  assert revisions == ["v1", "c0ffee"]
  assert source[:2] == ("org/name", "c0ffee")


# config.json.


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "is missing"),
    ("{", "is not JSON"),
    ("[]", "JSON list, where an object"),
    ('{"model_type": "mamba"}', "config.json: model_type='mamba'"),
  ],
)
def test_bad_config_json(tmp_path, text, message):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(InputError, match=message):
    loading.load_config(tmp_path)


# Reading.


@pytest.mark.parametrize("case", ["gqa_untied", "biases", "tied", "head_dim"])
def test_structure_and_values(case, tmp_path):
  folder = cases.write(tmp_path, case)
  params, config = load(folder), loading.load_config(folder)
  assert jax.tree.map(np.shape, params) == jax.tree.map(
    lambda leaf: leaf.shape, decoder.param_shapes(config)
  )
  np.testing.assert_array_equal(
    params["layers"]["attention"]["query"]["kernel"][1],
    cases.tensors(case)[Q].T,
  )


def test_shards_are_one_file(tmp_path):
  folder = cases.write(tmp_path, "biases")
  whole = load(folder)
  shard(folder)
  assert_same(load(folder), whole)


def test_dtypes(tmp_path):
  params = load(cases.write(tmp_path / "f32", "biases"), "bfloat16")
  leaves = jax.tree.leaves(params)
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
  halves = {
    k: v.astype(jnp.bfloat16) for k, v in cases.tensors("biases").items()
  }
  folder = cases.write(tmp_path / "bf16", "biases", **halves)
  assert_same(load(folder, "bfloat16"), params)
  assert_same(
    load(folder), jax.tree.map(lambda p: p.astype(np.float32), params)
  )
  with pytest.raises(InputError, match="int8"):
    load(folder, "int8")


def test_old_rotary_buffers_are_ignored(tmp_path):
  name = "model.layers.2.self_attn.rotary_emb.inv_freq"
  folder = cases.write(tmp_path / "a", "tied", **{name: np.ones(4, np.float32)})
  assert_same(load(folder), load(cases.write(tmp_path / "b", "tied")))


def test_tied_head_may_be_written_out_when_equal(tmp_path):
  table = cases.tensors("tied")[EMBEDDING]
  folder = cases.write(tmp_path / "a", "tied", **{HEAD: table})
  assert "head" not in load(folder)
  folder = cases.write(tmp_path / "b", "tied", **{HEAD: table + 1})
  with pytest.raises(InputError, match=r"lm_head.weight \[131, 48\].*differs"):
    load(folder)


ZEROS = np.zeros
STRICT = {
  "missing": ({Q: None}, rf"missing: {Q} \[48, 48\] for layers/attention/query"
              r"/kernel\[1\] \[48, 48\]"),
  "missing head": ({HEAD: None}, r"missing: lm_head.weight \[131, 48\] for "
                   r"head/kernel \[48, 131\]"),
  "unknown": ({"model.surprise": ZEROS(2)}, r"unknown: model.surprise \[2\]"),
  "a bias too many": ({"model.layers.0.mlp.up_proj.bias": ZEROS(88)},
                      "would be layers/mlp/up/bias, which a model with this"),
  "a layer too many": ({"model.layers.3.input_layernorm.weight": ZEROS(48)},
                       "another layer of layers/attention_norm/scale, which"
                       " has 3 only"),
  "misshapen": ({Q: ZEROS((48, 47))}, rf"misshapen: {Q} \[48, 47\].* for "
                r"layers/attention/query/kernel\[1\] \[48, 48\]"),
  "transposed": ({"model.layers.0.mlp.up_proj.weight": ZEROS((48, 88))},
                 r"\[48, 88\].* layers/mlp/up/kernel\[0\] \[48, 88\], which is "
                 r"\[88, 48\] there"),
  "quantized": ({Q: ZEROS((48, 48), np.int8)}, "is I8; quantized"),
}  # fmt: skip


@pytest.mark.parametrize("what", STRICT)
def test_strict(what, tmp_path):
  changes, message = STRICT[what]
  folder = cases.write(tmp_path, "gqa_untied", **changes)
  with pytest.raises(InputError, match=message):
    load(folder)


def test_all_problems_are_in_one_error(tmp_path):
  changes = {Q: None, "model.surprise": ZEROS(2)}
  folder = cases.write(tmp_path, "gqa_untied", **changes)
  with pytest.raises(InputError, match=rf"(?s)surprise.*missing: {Q}"):
    load(folder)


# Damaged folders.


def test_a_tensor_in_two_shards(tmp_path):
  folder = cases.write(tmp_path, "gqa_untied")
  first, second, _ = shard(folder)
  both = load_file(first) | load_file(second)
  save_file(both, second)
  with pytest.raises(InputError, match=r"two files hold one tensor: .*00001-"):
    load(folder)


def test_a_missing_shard(tmp_path):
  folder = cases.write(tmp_path, "gqa_untied")
  lost = shard(folder)[1]
  lost.unlink()
  with pytest.raises(InputError, match=f"{lost.name}, which is missing"):
    load(folder)


def test_shards_outside_the_folder_are_not_read(tmp_path):
  folder = cases.write(tmp_path / "inner", "gqa_untied")
  (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
  index = {"weight_map": {Q: "../model.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(InputError, match="outside its folder"):
    load(folder)


def test_single_file_and_shards(tmp_path):
  folder = cases.write(tmp_path, "gqa_untied")
  shard(folder)
  cases.write(tmp_path, "gqa_untied")
  with pytest.raises(InputError, match="two sets of weights"):
    load(folder)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_truncated(tmp_path, keep):
  path = cases.write(tmp_path, "gqa_untied") / "model.safetensors"
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(InputError, match=r"model.safetensors: truncated"):
    load(tmp_path)


def test_git_lfs_pointer(tmp_path):
  path = cases.write(tmp_path, "gqa_untied") / "model.safetensors"
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  with pytest.raises(InputError, match="git lfs pull"):
    load(tmp_path)


class _Bomb:
  def __reduce__(self):
    return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_unopened(tmp_path, name):
  folder = cases.write(tmp_path, "gqa_untied")
  (folder / "model.safetensors").unlink()
  (folder / name).write_bytes(pickle.dumps(_Bomb()))
  with pytest.raises(InputError, match=f"{name}.*convert them to safetensors"):
    load(folder)


def test_no_weights(tmp_path):
  folder = cases.write(tmp_path, "gqa_untied")
  (folder / "model.safetensors").unlink()
  with pytest.raises(InputError, match=r"neither model.safetensors nor"):
    load(folder)


# Writing.


@pytest.mark.parametrize("case", cases.CASES)
def test_written_is_what_was_read(case, tmp_path):
  folder = cases.write(tmp_path / "old", case)
  config, params = loading.load_config(folder), load(folder)
  export.save_params(tmp_path / "new", config, params)
  assert loading.load_config(tmp_path / "new") == config
  assert_same(load(tmp_path / "new"), params)
  theirs = load_file(tmp_path / "new" / "model.safetensors")
  assert_same(theirs, cases.tensors(case))


def test_bfloat16_is_kept(tmp_path):
  config, params = helpers.model(0)
  params = helpers.in_dtype(params, "bfloat16")
  export.save_params(tmp_path, config, params)
  assert_same(load(tmp_path, "bfloat16"), params)


def test_nothing_is_overwritten(tmp_path):
  config, params = helpers.model(0)
  export.save_params(tmp_path, config, params)
  with pytest.raises(InputError, match="holds a model already"):
    export.save_params(tmp_path, config, params)


def test_a_tree_of_another_config_is_not_written(tmp_path):
  config, _ = helpers.model(0)
  _, params = helpers.model(0, num_layers=3, tie_embeddings=True)
  with pytest.raises(InputError, match="head/kernel"):
    export.save_params(tmp_path / "new", config, params)
  assert not (tmp_path / "new").exists()
