"""Tiny random checkpoints of odd shapes, the same on every machine.

Weights come from numpy's legacy generator, whose stream is frozen, so that
only the reference's logits need to be stored.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
LENGTHS = (17, 11)  # of the two sequences whose logits are stored

_BASE = {
  "model_type": "llama",
  "vocab_size": 131,
  "hidden_size": 48,
  "intermediate_size": 88,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
}
# Each case changes what the one before does not have.
CASES = {
  "gqa_untied": _BASE,
  "tied": _BASE | {"tie_word_embeddings": True, "rms_norm_eps": 1e-2},
  "biases": _BASE | {"attention_bias": True, "mlp_bias": True},
  "attention_bias": _BASE | {"attention_bias": True, "num_key_value_heads": 1},
  "mlp_bias": _BASE | {"mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
  "head_dim": _BASE | {"head_dim": 14, "num_key_value_heads": 3},
  "rope_theta": _BASE | {"rope_theta": 211.0, "num_key_value_heads": 6},
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
  """The tensors of a Llama in transformers, written out by hand."""
  D, F = config["hidden_size"], config["intermediate_size"]
  V, N = config["vocab_size"], config["num_attention_heads"]
  H = config.get("head_dim", D // N)
  K = config["num_key_value_heads"]
  named = {"model.embed_tokens.weight": (V, D)}
  for i in range(config["num_hidden_layers"]):
    layer = f"model.layers.{i}"
    for name, shape, bias in (
      ("self_attn.q_proj", (N * H, D), "attention_bias"),
      ("self_attn.k_proj", (K * H, D), "attention_bias"),
      ("self_attn.v_proj", (K * H, D), "attention_bias"),
      ("self_attn.o_proj", (D, N * H), "attention_bias"),
      ("mlp.gate_proj", (F, D), "mlp_bias"),
      ("mlp.up_proj", (F, D), "mlp_bias"),
      ("mlp.down_proj", (D, F), "mlp_bias"),
    ):
      named[f"{layer}.{name}.weight"] = shape
      if config.get(bias):
        named[f"{layer}.{name}.bias"] = shape[:1]
    named[f"{layer}.input_layernorm.weight"] = (D,)
    named[f"{layer}.post_attention_layernorm.weight"] = (D,)
  named["model.norm.weight"] = (D,)
  if not config.get("tie_word_embeddings"):
    named["lm_head.weight"] = (V, D)
  return named


def tensors(case: str) -> dict[str, np.ndarray]:
  """Random float32 weights of a case."""
  random = np.random.RandomState(list(CASES).index(case))
  made = {}
  for name, shape in shapes(CASES[case]).items():
    noise = random.standard_normal(shape)
    # Large enough that attention is far from uniform and biases show.
    if "norm" in name:
      value = 1 + 0.2 * noise
    elif len(shape) == 1:
      value = 0.3 * noise
    else:
      value = noise * 1.5 / shape[1] ** 0.5
    made[name] = value.astype(np.float32)
  return made


def tokens(case: str) -> list[np.ndarray]:
  """Two sequences of token ids, int64 of LENGTHS."""
  random = np.random.RandomState(1000 + list(CASES).index(case))
  return [random.randint(0, CASES[case]["vocab_size"], n) for n in LENGTHS]


def write(folder: pathlib.Path, case: str, **changes) -> pathlib.Path:
  """Writes a checkpoint; changes replace tensors, None leaves one out."""
  folder.mkdir(parents=True, exist_ok=True)
  named = {k.replace("/", "."): v for k, v in changes.items()}
  kept = {k: v for k, v in (tensors(case) | named).items() if v is not None}
  save_file(kept, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(CASES[case]))
  return folder


def logits(case: str) -> list[np.ndarray]:
  """The reference's logits of `tokens(case)`, float32 [length, V] each."""
  with np.load(HERE / "llama.npz") as stored:
    return [stored[f"{case}/{i}"] for i in range(len(LENGTHS))]


def config_json(case: str) -> dict:
  """The config.json that transformers itself writes for a case."""
  return json.loads((HERE / "llama.json").read_text())[case]
