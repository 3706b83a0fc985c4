"""GGUF files, the format of llama.cpp, as checkpoints of Hugging Face.

The weights are dequantised to float32 by the package gguf.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calm_jax.core import files, hub
from calm_jax.core.errors import InputError, check_choice
from calm_jax.core.extras import import_extra
from calm_jax.models.hf import export, weight_files

Json = dict[str, Any]

_FAMILIES = {
  "llama": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "gemma3": "gemma3_text",
}
_KEYS = {
  "context_length": "max_position_embeddings",
  "embedding_length": "hidden_size",
  "block_count": "num_hidden_layers",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "attention.key_length": "head_dim",
  "rope.freq_base": "rope_theta",
}
_WINDOW = "attention.sliding_window"
_NEEDED = ("block_count", "embedding_length", "attention.head_count")
# What follows from other keys, and is checked.
_SAME = ("attention.value_length", "rope.dimension_count")
_SCALING = {
  "type": "rope_type",
  "factor": "factor",
  "original_context_length": "original_max_position_embeddings",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTH = "original_max_position_embeddings"
_FREQUENCIES = "rope_freqs.weight"
_MODULES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_GEMMA_MODULES = {
  "post_attention_norm": "post_attention_layernorm",
  "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}


class GgufFile:
  """An open GGUF file: its `metadata` and its tensors.

  Raises InputError if it is none, or gguf is not installed.
  """

  def __init__(self, path: Path):
    self._gguf, self.path = import_extra(str(path), "gguf", "gguf"), path
    try:
      reader = self._gguf.GGUFReader(path)
      self.metadata = {k: x.contents() for k, x in reader.fields.items()}
      self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OSError) as error:
      raise InputError(f"{path} is no GGUF file: {error}") from error
    name = self.metadata.get("general.architecture")
    check_choice(f"{path}: general.architecture", name, list(_FAMILIES))
    self.name = str(name)

  def write_model(self, folder: Path) -> None:
    """Writes config.json and model.safetensors, in float32.

    Raises InputError for an option, a tensor or a quantisation that is not
    known here.
    """
    config = self.config()
    modules = _MODULES
    if self.name.startswith("gemma"):
      modules = _MODULES | _GEMMA_MODULES
    theirs = {}
    for name in self._tensors.keys() - {_FREQUENCIES}:
      match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
      if match is None or match[2] not in modules:
        raise InputError(f"{self.path}: the tensor {name} is not known")
      layer = "" if match[1] is None else f"model.layers.{match[1]}."
      theirs[f"{layer}{modules[match[2]]}.{match[3]}"] = name
    shapes = {
      name: tuple(map(int, reversed(self._tensors[theirs[name]].shape)))
      for name in sorted(theirs)
    }
    weight_files.write_tensors(
      folder,
      shapes,
      "float32",
      lambda name: self._value(theirs[name], config),
      export.MAX_SHARD_SIZE,
    )
    files.write_json(folder / hub.CONFIG, config)

  def config(self) -> Json:
    """Returns config.json.

    Raises InputError for an option that is not known, or one that is missing.
    """
    prefix = f"{self.name}."
    given = {
      key.removeprefix(prefix): value
      for key, value in self.metadata.items()
      if key.startswith(prefix)
    }
    needed = _NEEDED if self.name != "gemma3" else (*_NEEDED, _WINDOW)
    if missing := [prefix + key for key in needed if key not in given]:
      raise InputError(f"{self.path} lacks the options {missing}")
    rows = int(self._tensors["token_embd.weight"].shape[1])
    found: Json = {"model_type": _FAMILIES[self.name], "vocab_size": rows}
    found["tie_word_embeddings"] = "output.weight" not in self._tensors
    found |= {_KEYS[key]: x for key, x in given.items() if key in _KEYS}
    heads = found["num_attention_heads"]
    found.setdefault("num_key_value_heads", heads)
    found.setdefault("head_dim", found["hidden_size"] // heads)
    for key in _SAME:
      if given.get(key, found["head_dim"]) != found["head_dim"]:
        raise InputError(
          f"{self.path}: {prefix}{key}={given[key]} differs from the width of "
          f"a head, {found['head_dim']}, which is not supported"
        )
    scaling = {
      theirs: given[f"rope.scaling.{key}"]
      for key, theirs in _SCALING.items()
      if f"rope.scaling.{key}" in given
    }
    if scaling.get("rope_type", "none") != "none":
      found["rope_scaling"] = scaling
    if _FREQUENCIES in self._tensors:
      found["rope_scaling"] = self._llama3_scaling(found)
    known = {*_KEYS, *_SAME, "vocab_size"}
    known |= {f"rope.scaling.{key}" for key in _SCALING}
    if self.name == "gemma3":
      known |= {_WINDOW}
      found |= _gemma3(found, given)
    if unknown := sorted(given.keys() - known):
      raise InputError(
        f"{self.path}: the options {[prefix + key for key in unknown]} are not "
        "known"
      )
    return found

  def _llama3_scaling(self, config: Json) -> Json:
    """Finds the options of Llama 3's frequencies in what they divide by."""
    factors = self._dequantise(_FREQUENCIES)
    theta, width = config["rope_theta"], config["head_dim"]
    lengths = theta ** (np.arange(0, width, 2) / width) * 2 * np.pi
    options: Json = {"rope_type": "llama3", "factor": float(factors.max())}
    low, high = _LLAMA3.values()
    for length in (2**power for power in range(4, 18)):
      smooth = np.clip((length / lengths - low) / (high - low), 0, 1)
      want = 1 / ((1 - smooth) / options["factor"] + smooth)
      if np.allclose(factors, want, rtol=1e-3):
        return options | _LLAMA3 | {_LLAMA3_LENGTH: length}
    raise InputError(
      f"{self.path}: {_FREQUENCIES} is no scaling of Llama 3, and others are "
      "not supported"
    )

  def _dequantise(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    try:
      values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise InputError(f"{self.path}: {tensor.name}: {error}") from error
    return np.asarray(values, np.float32)

  def _value(self, name: str, config: Json) -> np.ndarray:
    """Returns a tensor as transformers has it."""
    values = self._dequantise(name)
    if self.name.startswith("gemma") and "norm" in name:
      return values - 1  # transformers adds it when it computes.
    heads = {
      "attn_q": config["num_attention_heads"],
      "attn_k": config["num_key_value_heads"],
    }
    module = name.rsplit(".", 2)[-2]
    if self.name == "llama" and module in heads:
      # llama.cpp turns neighbours, transformers the two halves of a head.
      pairs = values.reshape(heads[module], -1, 2, *values.shape[1:])
      return pairs.swapaxes(1, 2).reshape(values.shape)
    return values


def _gemma3(config: Json, given: Mapping[str, Any]) -> Json:
  """Returns what GGUF leaves out of Gemma 3's config.json."""
  layers = config["num_hidden_layers"]
  # Only the largest model divides by another width.
  scalar = config["head_dim"]
  if layers == 62:
    scalar = config["hidden_size"] // config["num_attention_heads"]
  return {
    "sliding_window": given[_WINDOW],
    "rope_local_base_freq": 10_000.0,
    "query_pre_attn_scalar": scalar,
    "layer_types": [
      "sliding_attention" if (layer + 1) % 6 else "full_attention"
      for layer in range(layers)
    ],
  }
