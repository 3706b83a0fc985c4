"""The keys of each family's config.json; `families.py` reads these tables."""

from collections.abc import Callable
from typing import Any, NamedTuple

from calm_jax.models.hf import config_fields, rope_config

Json = dict[str, Any]
# fmt: off
# Fields of ModelConfig, and the keys that they are copied from.
COPIED = {
  "vocab_size": ("vocab_size",), "width": ("hidden_size", "n_embd"),
  "num_layers": ("num_hidden_layers", "n_layer"),
  "num_heads": ("num_attention_heads", "n_head"),
  "num_kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",),
  "mlp_width": ("intermediate_size",),
  "max_length": ("max_position_embeddings", "n_positions"),
  "activation": ("hidden_act", "hidden_activation", "activation_function"),
  "norm_eps": (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon",
  ),
  "attention_bias": ("attention_bias", "use_bias"),
  "output_bias": ("attention_bias", "use_bias"),
  "mlp_bias": ("mlp_bias", "use_bias"),
  "tie_embeddings": ("tie_word_embeddings",),
  "parallel_residual": ("use_parallel_residual",),
  "scale_by_depth": ("scale_attn_by_inverse_layer_idx",),
  "attention_cap": ("attn_logit_softcapping",),
  "logit_cap": ("final_logit_softcapping",),
  "embedding_scale": ("embedding_multiplier",),
  "residual_scale": ("residual_multiplier",),
  "attention_scale": ("attention_multiplier",),
}
_REQUIRED = frozenset({
  "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
  "intermediate_size",
})


class ConfigTable(NamedTuple):
  """The keys of one family's config.json.

  Attributes:
    read: config.json with its defaults -> the fields that take more than
      copying, rope among them.
    defaults: {their key: transformers' default}, for keys that older files
      lack.
    fixed: fields that are the same in the whole family.
    only: {their key: the values that are computed here}.
    ignored: keys that change no arithmetic in this family.
    required: keys that have no default.
    rope_keys: keys that `read` reads besides those of `defaults`.
  """

  read: Callable[[Json], Json]
  defaults: Json
  fixed: Json = {}  # noqa: RUF012
  only: dict[str, tuple] = {}  # noqa: RUF012
  ignored: frozenset[str] | set[str] = frozenset()
  required: frozenset[str] | set[str] = _REQUIRED
  rope_keys: frozenset[str] = rope_config.KEYS

  def copied(self) -> list[tuple[str, str]]:
    """Returns the fields that are copied in this family, and their keys."""
    keys = self.required | self.defaults.keys()
    return [(f, k) for f, names in COPIED.items() for k in names if k in keys]


def _without(table: Json, key: str) -> Json:
  return {k: v for k, v in table.items() if k != key}


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
_GEMMA2 = _without(_GEMMA, "hidden_act") | {
  "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0,
  "sliding_window": 4096, "layer_types": None,
}
_SANDWICH = {"norm": "rms_plus_one", "post_norm": True}
_ROUTER_TRAINING = {
  "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"
}

FAMILIES = {
  "llama": ConfigTable(
    config_fields.rotary, _LLAMA,
    only={"rope_interleaved": (None, False)}, ignored={"is_llama_config"},
  ),
  "mistral": ConfigTable(config_fields.windowed, _MISTRAL),
  "qwen2": ConfigTable(
    config_fields.qwen, _QWEN, fixed={"attention_bias": True},
    only={"use_mrope": (None, False)},
  ),
  "qwen3": ConfigTable(
    config_fields.qwen, _QWEN | _NO_BIAS | {"head_dim": 128},
    fixed={"qk_norm": "head"},
  ),
  "gemma": ConfigTable(
    config_fields.gemma, _GEMMA, fixed={"norm": "rms_plus_one"}
  ),
  "gemma2": ConfigTable(
    config_fields.gemma2, _GEMMA2 | {"attn_logit_softcapping": 50.0},
    fixed=_SANDWICH, ignored={"hidden_act", "sliding_window_size"},
  ),
  "gemma3_text": ConfigTable(
    config_fields.gemma3, _GEMMA2 | {
      "max_position_embeddings": 131_072, "final_logit_softcapping": None,
      "sliding_window_pattern": 6,
    },
    fixed=_SANDWICH | {"qk_norm": "head"},
    only={"attn_logit_softcapping": (None,)},
    ignored={"hidden_act", "_sliding_window_pattern"},
    rope_keys=rope_config.GEMMA3_KEYS,
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
    ignored={
      "n_ctx", "summary_type", "summary_use_proj", "summary_activation",
      "summary_proj_to_labels", "summary_first_dropout",
      "reorder_and_upcast_attn",
    },
    required={"vocab_size", "n_embd", "n_layer", "n_head"},
    rope_keys=frozenset(),
  ),
  "gpt_neox": ConfigTable(
    config_fields.neox, {
      "hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True,
      "max_position_embeddings": 2048, "use_parallel_residual": True,
      "tie_word_embeddings": False,
    },
    fixed={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
    rope_keys=rope_config.NEOX_KEYS,
  ),
  "phi3": ConfigTable(
    config_fields.phi3, _DEFAULTS | {
      "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
      "original_max_position_embeddings": 4096, "sliding_window": None,
    },
    only={
      "attention_bias": (None, False), "mlp_bias": (None, False),
      "lm_head_bias": (None, False), "full_attn_mod": (None, 1),
      "interpolate_factor": (None, 1),
    },
  ),
  "olmo2": ConfigTable(
    config_fields.rotary, _DEFAULTS | _NO_BIAS | {"rms_norm_eps": 1e-5},
    fixed={"pre_norm": False, "post_norm": True, "qk_norm": "full"},
  ),
  "smollm3": ConfigTable(
    config_fields.smollm3, _LLAMA | _WINDOW | {
      "num_key_value_heads": 4, "sliding_window": None, "layer_types": None,
      "no_rope_layers": None, "no_rope_layer_interval": 4,
      "tie_word_embeddings": True,
    },
    ignored={"max_window_layers"},
  ),
  "starcoder2": ConfigTable(
    config_fields.windowed, {
      "num_key_value_heads": 2, "head_dim": None, "norm_epsilon": 1e-5,
      "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 4096,
      "sliding_window": None, "use_bias": True, "tie_word_embeddings": True,
    },
    fixed={"norm": "layer", "gated_mlp": False},
    only={"mlp_type": (None, "default"), "norm_type": (None, "layer_norm")},
    ignored={"layer_norm_epsilon"},
  ),
  "granite": ConfigTable(
    config_fields.granite, _LLAMA | {
      "embedding_multiplier": 1.0, "residual_multiplier": 1.0,
      "attention_multiplier": 1.0, "logits_scaling": 1.0,
    },
  ),
  "mixtral": ConfigTable(
    config_fields.mixtral, _MISTRAL | {
      "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 8,
      "num_experts_per_tok": 2,
    },
    ignored=_ROUTER_TRAINING,
  ),
  "qwen3_moe": ConfigTable(
    config_fields.qwen3_moe, _DEFAULTS | _WINDOW | _NO_BIAS | {
      "num_key_value_heads": 4, "num_experts": None, "num_local_experts": None,
      "num_experts_per_tok": 8, "moe_intermediate_size": 768,
      "decoder_sparse_step": 1, "mlp_only_layers": None,
      "norm_topk_prob": False,
    },
    fixed={"qk_norm": "head"},
    ignored=_ROUTER_TRAINING | {"intermediate_size", "max_window_layers"},
    required=_REQUIRED - {"intermediate_size"},
  ),
}
# fmt: on
