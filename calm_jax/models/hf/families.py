"""Reads and writes each family's config.json.

See `config_keys` for the keys that are computed, refused or passed over.
"""

from typing import Any

from calm_jax.core.errors import InputError, check_choice
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import config_fields, rope_config
from calm_jax.models.hf.config_keys import REQUIRED, ConfigTable

Json = dict[str, Any]
# fmt: off
_DEFAULTS = {
  "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
  "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
}
_NO_BIAS = {"attention_bias": False}
_LLAMA = _DEFAULTS | _NO_BIAS | {"mlp_bias": False}
_MISTRAL = _DEFAULTS | {
  "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32,
  "sliding_window": 4096,
}
_OLMO2 = _DEFAULTS | _NO_BIAS | {"rms_norm_eps": 1e-5}
_WINDOW = {
  "sliding_window": 4096, "use_sliding_window": False,
  "max_position_embeddings": 32768,
}
_QWEN = _DEFAULTS | _WINDOW | {
  "num_key_value_heads": 32, "layer_types": None, "max_window_layers": 28,
}
_GEMMA = _DEFAULTS | _NO_BIAS | {
  "num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True,
  "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": None,
}
_GEMMA2 = {k: v for k, v in _GEMMA.items() if k != "hidden_act"} | {
  "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0,
  "sliding_window": 4096, "layer_types": None,
}
_SANDWICH = {"norm": "rms_plus_one", "post_norm": True}
_POST_NORMS = {"pre_norm": False, "post_norm": True}
_GEMMA_ONLY = {"use_bidirectional_attention": (False,)}
_GLM = _DEFAULTS | {
  "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True,
  "max_position_embeddings": 131_072, "rms_norm_eps": 1.5625e-7,
}
_INTERLEAVED = {"interleaved_rope": True}
_EXPERTS = {"num_experts": "num_local_experts"}

FAMILIES = {
  "llama": ConfigTable(config_fields.rotary, _LLAMA),
  "mistral": ConfigTable(config_fields.windowed, _MISTRAL),
  "ministral": ConfigTable(
    config_fields.windowed, _MISTRAL | {"layer_types": None}
  ),
  "ministral3": ConfigTable(
    config_fields.ministral3, _MISTRAL | {
      "head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None,
      "max_position_embeddings": 262_144, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
        "llama_4_scaling_beta": 0.1,
      },
    },
  ),
  "qwen2": ConfigTable(
    config_fields.qwen, _QWEN, fixed={"attention_bias": True}
  ),
  "qwen3": ConfigTable(
    config_fields.qwen, _QWEN | _NO_BIAS | {"head_dim": 128},
    fixed={"qk_norm": "head"},
  ),
  "gemma": ConfigTable(
    config_fields.gemma, _GEMMA, fixed={"norm": "rms_plus_one"},
    only=_GEMMA_ONLY,
  ),
  "gemma2": ConfigTable(
    config_fields.gemma2, _GEMMA2 | {"attn_logit_softcapping": 50.0},
    fixed=_SANDWICH, only=_GEMMA_ONLY,
  ),
  "gemma3_text": ConfigTable(
    config_fields.gemma3, _GEMMA2 | {
      "max_position_embeddings": 131_072, "final_logit_softcapping": None,
      "sliding_window_pattern": 6, "rope_local_base_freq": None,
    },
    fixed=_SANDWICH | {"qk_norm": "head"},
    only=_GEMMA_ONLY | {"attn_logit_softcapping": ()},
  ),
  "gpt2": ConfigTable(
    config_fields.gpt2, {
      "n_positions": 1024, "n_inner": None, "activation_function": "gelu_new",
      "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
      "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
    },
    fixed={
      "norm": "layer", "learned_positions": True, "gated_mlp": False,
      "attention_bias": True, "output_bias": True, "mlp_bias": True,
    },
    only={"add_cross_attention": (False,)},
    aliases={
      "hidden_size": "n_embd", "max_position_embeddings": "n_positions",
      "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
    },
    required={"vocab_size", "n_embd", "n_layer", "n_head"},
  ),
  "gpt_neox": ConfigTable(
    config_fields.neox, {
      "hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True,
      "max_position_embeddings": 2048, "use_parallel_residual": True,
      "tie_word_embeddings": False, "head_dim": None,
      **dict.fromkeys(rope_config.NEOX_KEYS),
    },
    fixed={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
  ),
  "phi3": ConfigTable(
    config_fields.phi3, _DEFAULTS | {
      "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
      "original_max_position_embeddings": 4096, "sliding_window": None,
    },
  ),
  "olmo2": ConfigTable(
    config_fields.rotary, _OLMO2, fixed=_POST_NORMS | {"qk_norm": "full"}
  ),
  "olmo3": ConfigTable(
    config_fields.olmo3, _OLMO2 | {"sliding_window": 4096, "layer_types": None},
    fixed=_POST_NORMS | {"qk_norm": "full"},
  ),
  "smollm3": ConfigTable(
    config_fields.smollm3, _LLAMA | _WINDOW | {
      "num_key_value_heads": 4, "sliding_window": None, "layer_types": None,
      "no_rope_layers": None, "no_rope_layer_interval": 4,
      "tie_word_embeddings": True,
    },
  ),
  "starcoder2": ConfigTable(
    config_fields.windowed, {
      "num_key_value_heads": 2, "head_dim": None, "norm_epsilon": 1e-5,
      "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096,
      "sliding_window": None, "use_bias": True, "tie_word_embeddings": True,
    },
    fixed={"norm": "layer", "gated_mlp": False},
  ),
  "granite": ConfigTable(
    config_fields.granite, _LLAMA | {
      "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
      "attention_multiplier": 1.0, "logits_scaling": 1.0,
    },
  ),
  "exaone4": ConfigTable(
    config_fields.exaone4, _DEFAULTS | {
      "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096,
      "layer_types": None,
    },
    fixed=_POST_NORMS | {"qk_norm": "head"},
    only={"sliding_window_pattern": (0, 4, "LLLG")},
  ),
  "seed_oss": ConfigTable(
    config_fields.rotary, _LLAMA | {
      "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
      "attention_out_bias": False, "max_position_embeddings": 524_288,
    },
  ),
  "glm": ConfigTable(config_fields.glm, _GLM, fixed=_INTERLEAVED),
  "glm4": ConfigTable(
    config_fields.glm, _GLM, fixed=_INTERLEAVED | {"post_norm": True}
  ),
  "helium": ConfigTable(
    config_fields.helium, _LLAMA | {
      "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8,
      "max_position_embeddings": 4096,
    },
    fixed=_INTERLEAVED,
  ),
  "ernie4_5": ConfigTable(
    config_fields.ernie, _DEFAULTS | {
      "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5,
      "max_position_embeddings": 131_072, "use_bias": False,
      "tie_word_embeddings": True,
    },
    fixed=_INTERLEAVED,
  ),
  "arcee": ConfigTable(
    config_fields.rotary, _LLAMA | {
      "rms_norm_eps": 1e-5, "hidden_act": "relu2",
      "max_position_embeddings": 4096,
    },
    fixed={"gated_mlp": False},
  ),
  "mixtral": ConfigTable(
    config_fields.mixtral, _MISTRAL | {
      "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8,
      "num_experts_per_tok": 2,
    },
    aliases=_EXPERTS,
  ),
  "qwen3_moe": ConfigTable(
    config_fields.qwen3_moe, _DEFAULTS | _WINDOW | _NO_BIAS | {
      "num_key_value_heads": 4, "num_local_experts": 128,
      "num_experts_per_tok": 8, "moe_intermediate_size": 768,
      "decoder_sparse_step": 1, "mlp_only_layers": None,
      "norm_topk_prob": False, "intermediate_size": None,
    },
    fixed={"qk_norm": "head"},
    aliases=_EXPERTS,
    required=REQUIRED - {"intermediate_size"},
  ),
}
# fmt: on
# Families that people ask for and that are not computed, and why.
MISSING = {
  "apertus": "the activation of its MLP (xIELU) has parameters",
  "cohere": "one norm, without a bias, is before both attention and MLP",
  "cohere2": "one norm, without a bias, is before both attention and MLP",
  "gemma3n_text": "it mixes several residual streams, and has embeddings for "
  "each layer, layers that share keys and values, and sparse activations",
  "gemma4_text": "heads of full layers are wider than those with windows; some "
  "models also have embeddings for each layer, layers that share keys and "
  "values, values that are keys, or experts beside an MLP",
  "granitemoehybrid": "most of its models have state-space layers (Mamba 2), "
  "or experts beside an MLP",
  "hunyuan_v1_dense": "queries and keys are normed after their rotation",
  "qwen3_5_text": "most layers have linear attention (a gated delta net with a "
  "convolution and a recurrent state) in place of keys and values; the others "
  "have gated attention",
  "qwen3_next": "it has the layers of Qwen 3.5, and experts",
}
# transformers' names of activations; `to_hf` writes the first of each.
ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "relu": "relu",
  "relu2": "relu2",
  "gelu_pytorch_tanh": "gelu",
  "gelu_new": "gelu",
  "gelu_fast": "gelu",
  "gelu": "gelu_exact",
}


def from_hf(hf: Json) -> ModelConfig:
  """Returns the config that computes the same function as a config.json.

  Raises:
    InputError: an unknown family, a missing key, an option that is not computed
      here. Never an approximation.
  """
  name, text = hf.get("model_type"), hf.get("text_config")
  kinds = [name, text.get("model_type")] if isinstance(text, dict) else [name]
  for kind in MISSING:
    if kind in kinds:
      raise InputError(f"model_type={kind!r} is not computed: {MISSING[kind]}")
  if name not in sorted(FAMILIES) and isinstance(text, dict):
    raise InputError(
      f"model_type={name!r} is not of text alone; only its text model, "
      f"{text.get('model_type')!r}, could be read, and only if it is one of "
      f"{sorted(FAMILIES)}: docs/families.md says how to write it by itself"
    )
  check_choice("model_type", name, sorted(FAMILIES))
  try:
    return ModelConfig(**_fields(FAMILIES[str(name)], hf))
  except KeyError as error:
    raise InputError(f"config.json of a {name} lacks the key {error}") from None
  except InputError as error:
    raise InputError(f"config.json of a {name}: {error}") from error


def _fields(family: ConfigTable, hf: Json) -> Json:
  hf = family.check_keys(hf)
  fields = family.fixed | {field: hf[key] for field, key in family.copied()}
  fields |= family.read(hf)
  if fields["num_kv_heads"] is None:
    fields["num_kv_heads"] = fields["num_heads"]
  check_choice("activation", fields["activation"], sorted(ACTIVATIONS))
  return fields | {"activation": ACTIVATIONS[fields["activation"]]}


def to_hf(config: ModelConfig, dtype: str) -> Json:
  """Returns the config.json of a model trained from scratch.

  Raises:
    InputError: the config is none of a llama.
  """
  hf: Json = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
  hf |= {k: getattr(config, field) for field, k in FAMILIES["llama"].copied()}
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  hf["hidden_act"] = names[config.activation]
  hf["rope_theta"] = config.rope.theta if config.rope else None
  hf["torch_dtype"] = dtype
  # transformers' defaults are ids of Llama's own vocabulary.
  hf |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  back = from_hf(hf)
  differ = [
    f"{name}={value!r}"
    for name, value in vars(config).items()
    if name != "compute" and value != getattr(back, name)
  ]
  if differ:
    raise InputError(
      f"a model with {', '.join(differ)} is not a llama; only llamas have a "
      "config.json of our making, so keep the one that it was read from"
    )
  return hf
