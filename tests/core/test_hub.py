"""What a folder is that holds no checkpoint, said in words."""

from __future__ import annotations

import pytest

import calm_jax
from calm_jax import InputError
from calm_jax.core import files, hub

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def make(folder, *names):
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
  return folder


CHECKPOINT = ("config.json", "model.safetensors")


@pytest.mark.parametrize(
  ("names", "said"),
  [
    ([], "it is empty"),
    (["README.md", "b.txt"], "it has only README.md, b.txt"),
    (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
    (["adapter_model.bin"], "an adapter"),
    (["model-Q4_0.gguf", "README.md"], "model-Q4_0.gguf: GGUF"),
    (["pytorch_model.bin"], "pickles"), (["model.ckpt"], "pickles"),
    (["pytorch_model-00001-of-00002.bin"], "pickles"),
    (["optimizer.pt", "rng_state.pth", "scheduler.pt"], "pickles"),
    (["global_step10/mp_rank_00_model_states.pt", "latest"], "DeepSpeed"),
    (["__0_0.distcp", ".metadata"], "sharded training state"),
    (["_CHECKPOINT_METADATA", "default/_METADATA"], "Orbax"),
    (["checkpoints/100/_CHECKPOINT_METADATA", "metrics.jsonl"], "Orbax"),
    (["consolidated.00.pth", "params.json"], "under their authors' own names"),
    (["tf_model.h5"], "another framework"), (["m.onnx"], "another framework"),
    (["model_index.json"], "another framework"),
    (["model.tar.gz"], "an archive"), (["model.zip"], "an archive"),
    (["calm_config.json"], "a composition. Load it by load_composed"),
    (["composition/calm_config.json", "results.json"], "/x/composition"),
    ([f"checkpoint-5/{n}" for n in CHECKPOINT], "give .*/x/checkpoint-5"),
    ([f"a/b/{n}" for n in CHECKPOINT], "give .*/x/a/b"),
    (
      ["refs/main", *(f"snapshots/0af/{n}" for n in CHECKPOINT)],
      "give .*/x/snapshots/0af",
    ),
    ([f"models--o--n/snapshots/1/{n}" for n in CHECKPOINT], "snapshots/1"),
  ],
)  # fmt: skip
def test_what_a_folder_is(tmp_path, names, said):
  folder = make(tmp_path / "x", *names)
  with pytest.raises(InputError, match=said) as caught:
    calm_jax.load_model(folder)
  assert len(str(caught.value)) < 1000


def test_weights_that_are_missing_or_an_adapters(tmp_path):
  """config.json is there, as after some tools."""
  for name, said in (
    ("m.gguf", "GGUF"), ("adapter_config.json", "an adapter"),
    ("pytorch_model.bin", "pickles"), ("w.safetensors", "only .*w.safetens"),
  ):  # fmt: skip
    folder = make(tmp_path / name, "config.json", name)
    (folder / "config.json").write_text(
      '{"model_type": "llama", "vocab_size": 9, "hidden_size": 8,'
      '"num_hidden_layers": 1, "num_attention_heads": 1,'
      '"intermediate_size": 8}'
    )
    with pytest.raises(InputError, match=said):
      calm_jax.load_model(folder)
  make(folder, "model.safetensors", "adapter_config.json")
  with pytest.raises(InputError, match=r"an adapter.*merged already"):
    calm_jax.load_model(folder)


def test_a_file_in_place_of_a_folder(tmp_path):
  folder = make(tmp_path / "x", "m.gguf", "model.safetensors", "m.zip")
  for name, said in (
    ("m.gguf", "gguf"), ("m.zip", "an archive"),
    ("model.safetensors", "a file; give the folder"),
  ):  # fmt: skip
    with pytest.raises(InputError, match=said):
      calm_jax.load_model(folder / name)


def test_one_kind_of_model_in_place_of_the_other(tmp_path):
  with pytest.raises(InputError, match="single model, which load_model loads"):
    calm_jax.load_composed(make(tmp_path / "single", *CHECKPOINT))
  run = make(tmp_path / "run", "composition/calm_config.json")
  with pytest.raises(InputError, match=r"give .*run/composition"):
    calm_jax.load_composed(run)


@pytest.mark.parametrize("name", ["", None, b"a/b", 3, ["a"], "a\ud800"])
def test_what_is_no_place(name):
  for load in (calm_jax.load_model, calm_jax.load_composed):
    with pytest.raises(InputError, match="path_or_hub_id"):
      load(name)


def test_a_pointer_in_place_of_a_file(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(POINTER)
  for read in (
    lambda: hub.read_config(tmp_path),
    lambda: list(files.read_lines(path)),
  ):
    with pytest.raises(InputError, match=r"config.json is only git-lfs's poin"):
      read()
  make(tmp_path, "tokenizer.model").joinpath("tokenizer.model").write_text(
    POINTER
  )
  from calm_jax.text import tokenizer

  with pytest.raises(InputError, match=r"tokenizer.model is only git-lfs's"):
    tokenizer.load_tokenizer(tmp_path)
