"""The keys of each family's config.json; `families.py` reads these tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from calm_jax.models.hf import config_fields, rope_config

Json = dict[str, Any]


class ConfigTable(NamedTuple):
  """The keys of one family's config.json.

  Attributes:
    copied: {their key: the field, or fields, of ModelConfig with its value}.
    defaults: {their key: transformers' default}, for keys that older files
      lack; other keys that are copied or read are required.
    fixed: fields that are the same in the whole family.
    read: config.json with its defaults -> the fields that take more than
      copying, rope among them.
    only: {their key: the values that are computed here}.
    ignored: keys that change no arithmetic in this family.
    rope_keys: keys that `read` reads besides those of `defaults`.
  """

  copied: dict[str, str | tuple[str, ...]]
  defaults: Json
  fixed: Json
  read: Callable[[Json], Json]
  only: dict[str, tuple] = {}  # noqa: RUF012
  ignored: frozenset[str] | set[str] = frozenset()
  rope_keys: frozenset[str] = rope_config.KEYS


# fmt: off
_COPIED = {
  "vocab_size": "vocab_size", "hidden_size": "width",
  "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
  "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
  "intermediate_size": "mlp_width", "max_position_embeddings": "max_length",
  "hidden_act": "activation", "rms_norm_eps": "norm_eps",
  "tie_word_embeddings": "tie_embeddings",
}
_DEFAULTS = {
  "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
  "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
}


def _without(table: dict, *keys: str) -> dict:
  return {k: v for k, v in table.items() if k not in keys}


_BIAS = {"attention_bias": ("attention_bias", "output_bias")}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}

_LLAMA = ConfigTable(
  copied=_COPIED | _BIAS | {"mlp_bias": "mlp_bias"},
  defaults=_DEFAULTS | _NO_BIAS,
  fixed={},
  read=config_fields.rotary,
  only={"rope_interleaved": (None, False)},
  ignored={"is_llama_config"},
)
_WINDOW = {"sliding_window": 4096, "layer_types": None}
_QWEN = _DEFAULTS | _WINDOW | {
  "num_key_value_heads": 32, "max_position_embeddings": 32768,
  "use_sliding_window": False, "max_window_layers": 28,
}
_GEMMA = _DEFAULTS | {
  "num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True,
  "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": None, "attention_bias": False,
}
_GEMMA2 = _without(_GEMMA, "hidden_act") | _WINDOW | {
  "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0,
}
_COPIED_GEMMA2 = _without(_COPIED, "hidden_act") | {
  "hidden_activation": "activation", "final_logit_softcapping": "logit_cap",
}
_ROUTER_TRAINING = {
  "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"
}

FAMILIES = {
  "llama": _LLAMA,
  "mistral": ConfigTable(
    copied=_COPIED,
    defaults=_DEFAULTS | {
      "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32,
      "sliding_window": 4096,
    },
    fixed={},
    read=config_fields.windowed,
  ),
  "qwen2": ConfigTable(
    copied=_COPIED,
    defaults=_QWEN,
    fixed={"attention_bias": True},
    read=config_fields.qwen,
    only={"use_mrope": (None, False)},
  ),
  "qwen3": ConfigTable(
    copied=_COPIED | _BIAS,
    defaults=_QWEN | {"head_dim": 128, "attention_bias": False},
    fixed={"qk_norm": "head"},
    read=config_fields.qwen,
  ),
  "gemma": ConfigTable(
    copied=_COPIED | _BIAS,
    defaults=_GEMMA,
    fixed={"norm": "rms_plus_one"},
    read=config_fields.gemma,
  ),
  "gemma2": ConfigTable(
    copied=_COPIED_GEMMA2 | _BIAS | {
      "attn_logit_softcapping": "attention_cap"
    },
    defaults=_GEMMA2 | {"attn_logit_softcapping": 50.0},
    fixed={"norm": "rms_plus_one", "post_norm": True},
    read=config_fields.gemma2,
    ignored={"hidden_act", "sliding_window_size"},
  ),
  "gemma3_text": ConfigTable(
    copied=_COPIED_GEMMA2 | _BIAS,
    defaults=_GEMMA2 | {
      "max_position_embeddings": 131_072, "final_logit_softcapping": None,
      "sliding_window_pattern": 6,
    },
    fixed={"norm": "rms_plus_one", "post_norm": True, "qk_norm": "head"},
    read=config_fields.gemma3,
    only={"attn_logit_softcapping": (None,)},
    ignored={"hidden_act", "_sliding_window_pattern"},
    rope_keys=rope_config.GEMMA3_KEYS,
  ),
  "gpt2": ConfigTable(
    copied={
      "vocab_size": "vocab_size", "n_embd": "width", "n_layer": "num_layers",
      "n_head": "num_heads", "n_positions": "max_length",
      "activation_function": "activation", "layer_norm_epsilon": "norm_eps",
      "tie_word_embeddings": "tie_embeddings",
      "scale_attn_by_inverse_layer_idx": "scale_by_depth",
    },
    defaults={
      "n_positions": 1024, "n_inner": None, "activation_function": "gelu_new",
      "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
      "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
    },
    fixed={
      "norm": "layer", "learned_positions": True, "gated_mlp": False,
      "attention_bias": True, "output_bias": True, "mlp_bias": True,
    },
    read=config_fields.gpt2,
    ignored={
      "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
      "summary_proj_to_labels", "summary_first_dropout",
      "reorder_and_upcast_attn",
    },
    rope_keys=frozenset(),
  ),
  "gpt_neox": ConfigTable(
    copied=_without(
      _COPIED, "num_key_value_heads", "rms_norm_eps", "head_dim"
    ) | _BIAS | {
      "layer_norm_eps": "norm_eps",
      "use_parallel_residual": "parallel_residual",
    },
    defaults={
      "hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True,
      "max_position_embeddings": 2048, "use_parallel_residual": True,
      "tie_word_embeddings": False,
    },
    fixed={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
    read=config_fields.neox,
    rope_keys=rope_config.NEOX_KEYS,
  ),
  "phi3": ConfigTable(
    copied=_COPIED,
    defaults=_DEFAULTS | {
      "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
      "original_max_position_embeddings": 4096, "sliding_window": None,
    },
    fixed={},
    read=config_fields.phi3,
    only={
      "attention_bias": (None, False), "mlp_bias": (None, False),
      "lm_head_bias": (None, False), "full_attn_mod": (None, 1),
      "interpolate_factor": (None, 1),
    },
  ),
  "olmo2": ConfigTable(
    copied=_COPIED | _BIAS,
    defaults=_DEFAULTS | {"rms_norm_eps": 1e-5, "attention_bias": False},
    fixed={"pre_norm": False, "post_norm": True, "qk_norm": "full"},
    read=config_fields.rotary,
  ),
  "smollm3": ConfigTable(
    copied=_LLAMA.copied,
    defaults=_LLAMA.defaults | _WINDOW | {
      "num_key_value_heads": 4, "max_position_embeddings": 32768,
      "use_sliding_window": False, "sliding_window": None,
      "no_rope_layers": None, "no_rope_layer_interval": 4,
      "tie_word_embeddings": True,
    },
    fixed={},
    read=config_fields.smollm3,
    ignored={"max_window_layers"},
  ),
  "starcoder2": ConfigTable(
    copied=_without(_COPIED, "rms_norm_eps") | {
      "norm_epsilon": "norm_eps",
      "use_bias": ("attention_bias", "output_bias", "mlp_bias"),
    },
    defaults={
      "num_key_value_heads": 2, "head_dim": None, "norm_epsilon": 1e-5,
      "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096,
      "sliding_window": None, "use_bias": True, "tie_word_embeddings": True,
    },
    fixed={"norm": "layer", "gated_mlp": False},
    read=config_fields.windowed,
    only={"mlp_type": (None, "default"), "norm_type": (None, "layer_norm")},
    ignored={"layer_norm_epsilon"},
  ),
  "granite": ConfigTable(
    copied=_LLAMA.copied | {
      "embedding_multiplier": "embedding_scale",
      "residual_multiplier": "residual_scale",
      "attention_multiplier": "attention_scale",
    },
    defaults=_LLAMA.defaults | {
      "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
      "attention_multiplier": 1.0, "logits_scaling": 1.0,
    },
    fixed={},
    read=config_fields.granite,
  ),
  "mixtral": ConfigTable(
    copied=_COPIED,
    defaults=_DEFAULTS | {
      "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32,
      "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8,
      "num_experts_per_tok": 2,
    },
    fixed={},
    read=config_fields.mixtral,
    ignored=_ROUTER_TRAINING,
  ),
  "qwen3_moe": ConfigTable(
    copied=_without(_COPIED, "intermediate_size") | _BIAS,
    defaults=_DEFAULTS | {
      "num_key_value_heads": 4, "max_position_embeddings": 32768,
      "sliding_window": 4096, "use_sliding_window": False,
      "attention_bias": False, "num_experts": None, "num_local_experts": None,
      "num_experts_per_tok": 8, "moe_intermediate_size": 768,
      "decoder_sparse_step": 1, "mlp_only_layers": None,
      "norm_topk_prob": False,
    },
    fixed={"qk_norm": "head"},
    read=config_fields.qwen3_moe,
    ignored=_ROUTER_TRAINING | {"intermediate_size", "max_window_layers"},
  ),
}
# fmt: on
