"""Options of every family that change its arithmetic, on tiny odd shapes.

Each case is a config.json, the family's base and what the case changes; each
option is on in one case at least and off in another. The weights come from
numpy's legacy generator, whose stream is frozen.
"""

from __future__ import annotations

import copy
import json
import pathlib

import numpy as np
from golden import experts
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
LENGTHS = (21, 9)  # of the two sequences that parity is measured on
WINDOW = {"sliding_window": 5}
LONG_WINDOW = {"sliding_window": 64}
FULL, SLIDING = "full_attention", "sliding_attention"

_BASE = experts.BASE
_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}
_BIAS = {"attention_bias": True}
_NO_BIAS = {"attention_bias": False}
_WIDE = {"head_dim": 14}
_SHARED = {"num_key_value_heads": 1}
_OWN = {"num_key_value_heads": 6}


def _scaled(kind: str, **options) -> dict:
  return {"rope_scaling": {"rope_type": kind, **options}}


_SHORT = {"max_position_embeddings": 16}  # shorter than one of the sequences
_LINEAR = _scaled("linear", factor=3.0)
_LLAMA3 = _scaled(
  "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=16,
)  # fmt: skip
_YARN = _scaled("yarn", factor=4.0, original_max_position_embeddings=16)
_LONG = {
  "original_max_position_embeddings": 12,
  **_scaled("longrope", short_factor=[1.0, 1.5, 2.0, 1.2],
            long_factor=[1.5, 2.5, 4.0, 8.0]),
}  # fmt: skip
_QWEN = {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}
_GEMMA = _BASE | {"head_dim": 10}
_GPT2 = {
  "vocab_size": 61, "n_embd": 48, "n_layer": 4, "n_head": 6,
  "n_positions": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_NEOX = {
  k: v for k, v in _BASE.items()
  if k not in ("num_key_value_heads", "rms_norm_eps")
} | {"layer_norm_eps": 1e-3}  # fmt: skip

# {family: (base, {case: changes})}.
FAMILIES = {
  "llama": (_BASE, {
    "tied": _TIED, "attention_bias": _BIAS, "mlp_bias": {"mlp_bias": True},
    "head_dim": _WIDE, "one key head": _SHARED, "own key heads": _OWN,
    "gelu": {"hidden_act": "gelu"}, "relu": {"hidden_act": "relu"},
    "rope_theta": {"rope_theta": 300.0}, "linear": _LINEAR,
    "dynamic": _scaled("dynamic", factor=2.0) | _SHORT,
    "llama3": _LLAMA3, "yarn": _YARN,
  }),
  "mistral": (_BASE | WINDOW, {
    "no window": {"sliding_window": None}, "long window": LONG_WINDOW,
    "head_dim": _WIDE, "tied": _TIED, "yarn": _YARN,
  }),
  "ministral": (_GEMMA | WINDOW | _YARN | {
    "layer_types": [SLIDING, FULL, FULL, SLIDING],
  }, {"all windows": {"layer_types": None}}),
  "ministral3": (_BASE | {"head_dim": 10, "rope_parameters": {
    "rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.3,
  }}, {"window": WINDOW}),
  "qwen2": (_BASE, {
    "windows": _QWEN, "all windows": _QWEN | {"max_window_layers": 0},
    "layer_types": _QWEN | {"layer_types": [SLIDING, FULL, SLIDING, FULL]},
    "window not used": WINDOW, "tied": _TIED, "yarn": _YARN,
  }),
  "qwen3": (_BASE | {"head_dim": 10}, {
    "attention_bias": _BIAS, "windows": _QWEN, "tied": _TIED,
    "head_dim": {"head_dim": 8}, "yarn": _YARN,
  }),
  "gemma": (_GEMMA, {
    "exact gelu means tanh": {"hidden_act": "gelu"},
    "silu": {"hidden_act": "silu"}, "attention_bias": _BIAS,
    "untied": _UNTIED, "one key head": _SHARED,
  }),
  "gemma2": (_GEMMA | WINDOW | {
    "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
  }, {
    "no attention cap": {"attn_logit_softcapping": None},
    "no logit cap": {"final_logit_softcapping": None},
    "no window": {"layer_types": [FULL] * 4},
    "layer_types": {"layer_types": [FULL, FULL, SLIDING, SLIDING]},
    "long window": LONG_WINDOW, "attention_bias": _BIAS, "untied": _UNTIED,
    "silu": {"hidden_activation": "silu"},
  }),
  "gemma3_text": (_GEMMA | WINDOW | {
    "query_pre_attn_scalar": 24, "sliding_window_pattern": 2,
    "rope_theta": 400.0, "rope_local_base_freq": 30.0,
  }, {
    "linear": _LINEAR, "logit cap": {"final_logit_softcapping": 4.0},
    "pattern": {"sliding_window_pattern": 3},
    "no window": {"layer_types": [FULL] * 4},
    "all windows": {"layer_types": [SLIDING] * 4},
    "long window": LONG_WINDOW, "attention_bias": _BIAS, "untied": _UNTIED,
    "silu": {"hidden_activation": "silu"},
  }),
  "gpt2": (_GPT2, {
    "n_inner": {"n_inner": 40}, "untied": _UNTIED,
    "unscaled": {"scale_attn_weights": False},
    "scaled by depth": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
  }),
  "gpt_neox": (_NEOX, {
    "sequential": {"use_parallel_residual": False},
    "rotary_pct": {"rotary_pct": 0.5}, "whole": {"rotary_pct": 1.0},
    "rotary_emb_base": {"rotary_emb_base": 300.0, "rotary_pct": 0.5},
    "no attention_bias": _NO_BIAS, "tied": _TIED,
    "tanh gelu": {"hidden_act": "gelu_new"},
    "linear": _LINEAR | {"rotary_pct": 0.5},
  }),
  "phi3": (_BASE, {
    "window": WINDOW, "own key heads": _OWN, "tied": _TIED,
    "partial": {"partial_rotary_factor": 0.5}, "longrope": _LONG,
  }),
  "olmo2": (_BASE, {
    "attention_bias": _BIAS, "own key heads": _OWN, "tied": _TIED,
    "linear": _LINEAR,
  }),
  "olmo3": (_BASE | WINDOW | _YARN | {"rope_theta": 400.0}, {
    "layer_types": {"layer_types": [FULL, FULL, SLIDING, SLIDING]},
    "no window": {"layer_types": [FULL] * 4},
  }),
  "smollm3": (_BASE, {
    "no_rope_layers": {"no_rope_layers": [0, 1, 1, 0]},
    "interval": {"no_rope_layer_interval": 2},
    "rope everywhere": {"no_rope_layers": [1, 1, 1, 1]},
    "windows": {"use_sliding_window": True, "no_rope_layer_interval": 2}
    | WINDOW,
    "attention_bias": _BIAS, "mlp_bias": {"mlp_bias": True},
    "untied": _UNTIED, "yarn": _YARN,
  }),
  "starcoder2": ({
    k: v for k, v in _BASE.items() if k != "rms_norm_eps"
  } | {"norm_epsilon": 1e-3}, {
    "no bias": {"use_bias": False}, "window": WINDOW,
    "long window": LONG_WINDOW, "untied": _UNTIED,
    "gelu": {"hidden_act": "gelu"},
  }),
  "granite": (_BASE | {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
    "attention_multiplier": 0.2, "logits_scaling": 1.7,
  }, {
    "multipliers of one": {
      "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
      "attention_multiplier": 1.0, "logits_scaling": 1.0,
    },
    "attention_bias": _BIAS, "mlp_bias": {"mlp_bias": True}, "tied": _TIED,
    "llama3": _LLAMA3,
  }),
  "exaone4": (_BASE | WINDOW | _LLAMA3, {
    "no window": {"sliding_window": None, "layer_types": [FULL] * 4},
    "layer_types": {"layer_types": [SLIDING, FULL] * 2},
  }),
  "seed_oss": (_GEMMA, {
    "output bias": {"attention_out_bias": True}, "no bias": _NO_BIAS,
  }),
  "glm": (_BASE | {"head_dim": 12}, {
    "no attention_bias": _NO_BIAS, "partial": {"partial_rotary_factor": 0.7},
  }),
  "glm4": (_BASE | _YARN | {"head_dim": 12}, {"no attention_bias": _NO_BIAS}),
  "helium": (_BASE | {"head_dim": 8}, {"mlp_bias": {"mlp_bias": True}}),
  "ernie4_5": (_GEMMA, {"bias": {"use_bias": True}}),
  "arcee": (_BASE | _YARN, {"mlp_bias": {"mlp_bias": True}}),
} | experts.FAMILIES  # fmt: skip
# What changes no arithmetic on these sequences, and must not.
INERT = {
  ("qwen2", "window not used"), ("starcoder2", "long window"),
  ("gemma", "exact gelu means tanh"), ("gpt2", "upcast"),
} | experts.INERT  # fmt: skip
CASES = [
  (family, case)
  for family, (_, cases) in FAMILIES.items()
  for case in ("base", *cases)
]


def config_json(family: str, case: str = "base") -> dict:
  """What a config.json of the case says, in the older form."""
  base, cases = FAMILIES[family]
  changes = {} if case == "base" else cases[case]
  # Nobody shares a list or a mapping: transformers writes into them.
  return copy.deepcopy({"model_type": family, **base, **changes})


def tensors(config: dict, shapes: dict) -> dict[str, np.ndarray]:
  """Random float32 weights of a file's tensors.

  Large enough that attention is far from uniform and that biases show.
  """
  one = 0 if config["model_type"].startswith("gemma") else 1
  random = np.random.RandomState(0)
  made = {}
  for name in sorted(shapes):
    noise = random.standard_normal(shapes[name])
    if noise.ndim == 1:
      norm = name.endswith("weight")
      value = one + 0.2 * noise if norm else 0.3 * noise
    else:
      value = noise * 1.5 / shapes[name][-1] ** 0.5
    made[name] = value.astype(np.float32)
  return made


def tokens(length: int, vocab_size: int = 61) -> np.ndarray:
  """A sequence of token ids, int64."""
  return np.random.RandomState(length).randint(0, vocab_size, length)


def write(folder: pathlib.Path, config: dict, shapes: dict) -> pathlib.Path:
  """Writes a checkpoint of random weights."""
  folder.mkdir(parents=True, exist_ok=True)
  made = tensors(config, shapes)
  save_file(made, folder / "model.safetensors", {"format": "pt"})
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def golden(family: str) -> tuple[dict, dict, np.ndarray]:
  """The reference's config.json, {tensor: shape}, and logits of tokens(9).

  Of the family's base, with `tensors` for weights.
  """
  stored = json.loads((HERE / "families.json").read_text())[family]
  shapes = {k: tuple(v) for k, v in stored["tensors"].items()}
  with np.load(HERE / "families.npz") as logits:
    return stored["config"], shapes, logits[family]
