"""GGUF files: the same model and tokens as the folder that they come from."""

from __future__ import annotations

import json
import os
import shutil
import sys

import numpy as np
import pytest
import tokenizers
from golden import options

import calm_jax
from calm_jax.composition import gguf_files
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.models.hf import families, loading, tensor_tables
from calm_jax.models.hf.gguf_checkpoint import GgufFile
from calm_jax.text import gguf_tokenizer
from calm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

LONG = {"max_position_embeddings": 96, "rms_norm_eps": 2**-10}
CONFIGS = {
  "llama": {
    "rope_theta": 300.0, "tie_word_embeddings": False,
    "rope_scaling": {
      "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
  },
  "qwen2": {
    "tie_word_embeddings": True,
    "rope_scaling": {
      "rope_type": "yarn", "factor": 4.0,
      "original_max_position_embeddings": 16,
    },
  },
  "qwen3": {"head_dim": 10, "tie_word_embeddings": False},
  "gemma3_text": {
    "head_dim": 10, "num_hidden_layers": 6, "query_pre_attn_scalar": 10,
    "rope_theta": 400.0, "rope_local_base_freq": 10_000.0,
    "sliding_window": 5, "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
  },
}  # fmt: skip
TEXTS = ["show: a b c", "  two\n\nlines ", "héllo 日本 123", "", "<x>say</x>"]


@pytest.fixture(scope="module")
def gguf():
  return pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setattr(gguf_files.constants, "HF_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
  """(folder, texts) of a small SentencePiece model with a control token."""
  folder = tmp_path_factory.mktemp("spm")
  texts = ["show the value of a word", "lines of text say little"] * 4
  train_sentencepiece(
    texts, folder / "tokenizer", vocab_size=320, byte_fallback=True,
    user_defined_symbols=["<x>"], control_symbols=["</x>"],
  )  # fmt: skip
  return folder


def model_of(family):
  """The config.json of random weights, and those."""
  config = options.config_json(family) | LONG | CONFIGS[family]
  entries = tensor_tables.entries(
    tensor_tables.tensor_table(config), families.from_hf(config)
  )
  shapes = {name: entry[0].shape for name, entry in entries.items()}
  return config, shapes


def llama_cpp(name, values, config):
  """A tensor as llama.cpp's converter writes it, row by row."""
  if config["model_type"] == "gemma3_text" and "norm" in name:
    return values + 1
  heads = {
    "q_proj": config["num_attention_heads"],
    "k_proj": config["num_key_value_heads"],
  }.get(name.split(".")[-2])
  if config["model_type"] == "llama" and heads:
    width = len(values) // heads
    order = [
      head * width + half * (width // 2) + pair
      for head in range(heads)
      for pair in range(width // 2)
      for half in range(2)
    ]
    return values[order]
  return values


def write_gguf(gguf, path, config, tensors, tokenizer=None, quantise=None):
  """Writes a file by the names and keys of gguf's own tables."""
  name = config["model_type"].removesuffix("_text")
  writer = gguf.GGUFWriter(path, name)
  heads = config["num_attention_heads"]
  width = config.get("head_dim", config["hidden_size"] // heads)
  writer.add_context_length(config["max_position_embeddings"])
  writer.add_embedding_length(config["hidden_size"])
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_head_count(heads)
  writer.add_head_count_kv(config["num_key_value_heads"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  writer.add_rope_freq_base(config.get("rope_theta", 10_000.0))
  if "head_dim" in config:
    writer.add_key_length(width)
    writer.add_value_length(width)
  else:
    writer.add_rope_dimension_count(width)
  if "sliding_window" in config and "gemma" in name:
    writer.add_sliding_window(config["sliding_window"])
  scaling = config.get("rope_scaling") or {}
  kind = scaling.get("rope_type")
  if kind == "llama3":
    writer.add_tensor("rope_freqs.weight", rope_factors(config, width))
  elif kind:
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
      writer.add_rope_scaling_orig_ctx_len(
        scaling["original_max_position_embeddings"]
      )
  [arch] = [a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == name]
  names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
  for theirs, values in tensors.items():
    ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
    values = llama_cpp(theirs, values, config)
    if quantise and values.ndim == 2 and values.shape[-1] % 32 == 0:
      values = gguf.quantize(values, quantise)
      writer.add_tensor(ours, values, raw_dtype=quantise)
    else:
      writer.add_tensor(ours, values)
  if tokenizer:
    tokenizer(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def rope_factors(config, width):
  """What llama.cpp divides the frequencies by, one after the other."""
  scaling, factors = config["rope_scaling"], []
  length = scaling["original_max_position_embeddings"]
  low = length / scaling["low_freq_factor"]
  high = length / scaling["high_freq_factor"]
  for i in range(0, width, 2):
    wave = 2 * np.pi * config["rope_theta"] ** (i / width)
    if wave < high:
      factors.append(1)
    elif wave > low:
      factors.append(scaling["factor"])
    else:
      smooth = length / wave - scaling["low_freq_factor"]
      smooth /= scaling["high_freq_factor"] - scaling["low_freq_factor"]
      factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
  return np.array(factors, np.float32)


def spm_keys(folder):
  """Writes a SentencePiece model's tokens as llama.cpp's converter does."""
  import sentencepiece

  model = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / "tokenizer.model")
  )

  def kind(i):
    if model.is_unknown(i):
      return 2
    if model.is_control(i):
      return 3
    if model.is_byte(i):
      return 6
    return 4 if model.id_to_piece(i) == "<x>" else 1

  def add(writer):
    ids = range(model.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    writer.add_token_types([kind(i) for i in ids])
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ messages }}")

  return add


@pytest.mark.parametrize("family", CONFIGS)
def test_the_model_is_that_of_the_folder(
  family, gguf, tmp_path, sentencepiece_model
):
  config, shapes = model_of(family)
  folder = options.write(tmp_path / "hf", config, shapes)
  tensors = options.tensors(config, shapes)
  keys = spm_keys(sentencepiece_model)
  path = write_gguf(gguf, tmp_path / "m.gguf", config, tensors, keys)
  found = gguf_files.locate(path).folder
  want, got = loading.load_config(folder), loading.load_config(found)
  assert got == want
  params = trees.flatten(loading.load_params(found, got))
  for name, leaf in trees.flatten(loading.load_params(folder, want)).items():
    np.testing.assert_allclose(params[name], leaf, rtol=0, atol=3e-7)
  # It is converted once, and again if it changes.
  assert gguf_files.locate(str(path)).folder == found
  os.utime(path, (0, 0))
  assert gguf_files.locate(path).folder != found


def test_quantised_matrices_and_a_tokenizer_beside_them(
  gguf, tmp_path, sentencepiece_model
):
  config, shapes = model_of("qwen2")
  config["hidden_size"] = 96
  entries = tensor_tables.entries(
    tensor_tables.tensor_table(config), families.from_hf(config)
  )
  shapes = {name: entry[0].shape for name, entry in entries.items()}
  tensors = options.tensors(config, shapes)
  kind = gguf.GGMLQuantizationType.Q8_0
  path = write_gguf(gguf, tmp_path / "m.gguf", config, tensors, None, kind)
  with pytest.raises(InputError, match="put the tokenizer files"):
    gguf_files.locate(path)
  assert not list((tmp_path / "cache").glob("*/*"))
  shutil.copy(sentencepiece_model / "tokenizer.model", tmp_path)
  model = calm_jax.load_model(path)
  assert model.tokenizer.encode("show") == (
    load_tokenizer(sentencepiece_model).encode("show")
  )
  name = "model.embed_tokens.weight"
  want = gguf.dequantize(gguf.quantize(tensors[name], kind), kind)
  got = model.params["anchor"]["embed"]["embedding"]
  np.testing.assert_array_equal(got, want)
  assert 1e-4 < np.abs(want - tensors[name]).max() < 0.05


def made_tokenizer(architecture, keys, folder, gguf):
  """The tokenizer of a file's metadata."""
  writer = gguf.GGUFWriter(folder / "t.gguf", architecture)
  keys(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  gguf_tokenizer.write(GgufFile(folder / "t.gguf").metadata, folder)
  return load_tokenizer(folder)


def test_a_sentencepiece_tokenizer(gguf, tmp_path, sentencepiece_model):
  want = load_tokenizer(sentencepiece_model)
  keys = spm_keys(sentencepiece_model)
  got = made_tokenizer("llama", keys, tmp_path, gguf)
  assert got.pieces == want.pieces
  assert (got.bos_id, got.stop_ids) == (want.bos_id, (want.eos_id,))
  for text in [*TEXTS[:-1], "<x>say"]:
    assert got.encode(text) == want.encode(text), text
    assert got.decode(got.encode(text)) == text
    assert b"".join(got.spell(got.encode(text))) == text.encode()
  # A chat template writes control tokens as text, and they are read as such.
  assert got.encode("</x>") == [got.pieces.index("</x>")]
  assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("split", ["qwen2", "llama-bpe"])
def test_a_byte_level_tokenizer(split, gguf, tmp_path):
  made = tokenizers.ByteLevelBPETokenizer()
  made.train_from_iterator(TEXTS * 3, vocab_size=280, show_progress=False)
  model = json.loads(made.to_str())["model"]
  tokens = [*model["vocab"], "<x>", "</x>"]
  merges = [" ".join(pair) for pair in model["merges"]]

  def keys(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [4, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)

  got = made_tokenizer("qwen2", keys, tmp_path, gguf)
  assert got.bos_id == {"qwen2": None, "llama-bpe": got.eos_id}[split]
  for text in TEXTS:
    assert b"".join(got.spell(got.encode(text))) == (
      text.replace("</x>", "").encode()
    )
  first, *_, last = got.encode("<x>12</x>")
  assert [first, last] == [len(tokens) - 2, len(tokens) - 1]
  for text in TEXTS[:1]:
    assert got.encode(text) == made.encode(text).ids


def test_what_cannot_be_read_is_named(gguf, tmp_path, sentencepiece_model):
  path, keys = tmp_path / "m.gguf", spm_keys(sentencepiece_model)
  config, shapes = model_of("qwen3")
  tensors = options.tensors(config, shapes)

  def with_experts(writer):
    keys(writer)
    writer.add_expert_count(4)

  write_gguf(gguf, path, config, tensors, with_experts)
  with pytest.raises(InputError, match=r"qwen3\.expert_count"):
    gguf_files.locate(path)
  write_gguf(gguf, path, config | {"model_type": "qwen2moe"}, {})
  with pytest.raises(InputError, match=r"'qwen2moe' is none of .*gemma3"):
    gguf_files.locate(path)
  bare = {k: v for k, v in config.items() if k != "sliding_window"}
  write_gguf(gguf, path, bare | {"model_type": "gemma3_text"}, {}, keys)
  with pytest.raises(InputError, match=r"lacks .*gemma3\.attention\.sliding_w"):
    gguf_files.locate(path)
  path.write_bytes(b"GGUF")
  with pytest.raises(InputError, match="no GGUF file"):
    gguf_files.locate(path)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "gguf", None)
  (tmp_path / "m.gguf").touch()
  with pytest.raises(InputError, match=r"pip install 'calm_jax\[gguf\]'"):
    calm_jax.load_model(tmp_path / "m.gguf")
