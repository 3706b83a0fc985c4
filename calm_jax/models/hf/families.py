"""Reads and writes each family's config.json, strictly.

A key that the family's table lacks raises, as does what is not computed here.
"""

from collections.abc import Callable, Set
from typing import Any, NamedTuple

from calm_jax.core.errors import InputError, check_choice
from calm_jax.models.config import ModelConfig
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
  """The keys of one family's config.json."""

  # config.json with its defaults -> the fields that take more than copying.
  read: Callable[[Json], Json]
  defaults: Json  # transformers', of keys that a file may lack
  # Fields that are the same in the whole family.
  fixed: Json = {}  # noqa: RUF012
  # {their key: the values that are computed here}.
  only: dict[str, tuple] = {}  # noqa: RUF012
  ignored: Set[str] = frozenset()  # keys that change no arithmetic here
  required: Set[str] = _REQUIRED  # keys that have no default

  def copied(self) -> list[tuple[str, str]]:
    """Returns the fields that are copied in this family, and their keys."""
    keys = self.required | self.defaults.keys()
    return [(f, k) for f, names in COPIED.items() for k in names if k in keys]

  def check_keys(self, hf: Json) -> None:
    """Raises InputError for keys, or values of them, not computed here."""
    only = _NEVER | self.only
    known = self.required | self.defaults.keys() | only.keys() | self.ignored
    if not self.fixed.get("learned_positions"):
      known |= rope_config.KEYS
    if unknown := set(hf) - known - set(_NO_ARITHMETIC.split()):
      raise InputError(f"there are unknown options: {sorted(unknown)}")
    for key, computed in only.items():
      if hf.get(key) not in computed:
        raise InputError(
          f"{key}={hf[key]!r} is not computed here (only {computed})"
        )


# Bookkeeping, dropout, initialisation, generation: no arithmetic of inference.
_NO_ARITHMETIC = """
  model_type architectures _name_or_path name_or_path auto_map
  transformers_version torch_dtype dtype use_cache _num_labels
  cache_implementation initializer_range attention_dropout attn_pdrop
  resid_pdrop embd_pdrop hidden_dropout classifier_dropout residual_dropout
  embedding_dropout attention_probs_dropout_prob hidden_dropout_prob
  bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id
  mask_token_id decoder_start_token_id pretraining_tp chunk_size_feed_forward
  gradient_checkpointing output_attentions output_hidden_states return_dict
  id2label label2id problem_type tokenizer_class prefix is_decoder torchscript
  use_bfloat16 tf_legacy_loss finetuning_task task_specific_params
  tie_encoder_decoder generation_config cross_attention_hidden_size
  _attn_implementation _attn_implementation_autoset max_length min_length
  do_sample early_stopping num_beams num_beam_groups diversity_penalty
  temperature top_k top_p typical_p repetition_penalty length_penalty
  no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
  num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
  forced_eos_token_id remove_invalid_values suppress_tokens
  exponential_decay_length_penalty begin_suppress_tokens transformers.js_config
"""
_NEVER = {
  "quantization_config": (None,),
  "is_encoder_decoder": (None, False),
  "add_cross_attention": (None, False),
  "pruned_heads": (None, {}),
  "per_layer_config": (None, {}),
  "use_bidirectional_attention": (None, False),
}


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
_GEMMA2 = {k: v for k, v in _GEMMA.items() if k != "hidden_act"} | {
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
      "sliding_window_pattern": 6, "rope_local_base_freq": None,
    },
    fixed=_SANDWICH | {"qk_norm": "head"},
    only={"attn_logit_softcapping": (None,)},
    ignored={"hidden_act", "_sliding_window_pattern"},
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
  ),
  "gpt_neox": ConfigTable(
    config_fields.neox, {
      "hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True,
      "max_position_embeddings": 2048, "use_parallel_residual": True,
      "tie_word_embeddings": False,
      **dict.fromkeys(rope_config.NEOX_KEYS),
    },
    fixed={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
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
# transformers' names of activations; `to_hf` writes the first of each.
ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "relu": "relu",
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
  name = hf.get("model_type")
  check_choice("model_type", name, sorted(FAMILIES))
  try:
    return ModelConfig(**_fields(FAMILIES[name], hf))
  except KeyError as error:
    raise InputError(f"config.json of a {name} lacks the key {error}") from None
  except InputError as error:
    raise InputError(f"config.json of a {name}: {error}") from error


def _fields(family: ConfigTable, hf: Json) -> Json:
  family.check_keys(hf)
  hf = family.defaults | hf
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
  hf = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
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
