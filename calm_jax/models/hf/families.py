"""Reads and writes each family's config.json, strictly.

What transformers reads of a family is computed here or refused by name. A key
that it does not read cannot change what is computed: it is passed over, named.
"""

import math
import re
import warnings
from collections.abc import Callable, Set
from typing import Any, NamedTuple

from calm_jax.core import errors
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
  # {their key: the values that are computed here}, of this family alone.
  only: dict[str, tuple] = {}  # noqa: RUF012
  aliases: dict[str, str] = {}  # noqa: RUF012  # {other spelling: key}
  required: Set[str] = _REQUIRED  # keys that have no default

  def copied(self) -> list[tuple[str, str]]:
    """Returns the fields that are copied in this family, and their keys."""
    keys = self.required | self.defaults.keys()
    return [(f, k) for f, names in COPIED.items() for k in names if k in keys]

  def computed(self) -> Set[str]:
    """Returns the keys that change what is computed here."""
    ropes = () if self.fixed.get("learned_positions") else rope_config.KEYS
    return self.required | self.defaults.keys() | set(ropes)

  def check_keys(self, hf: Json) -> Json:
    """Returns the keys that are computed, with defaults for those that lack.

    Keys that transformers does not read are named in a warning. Null is as if
    the key were not there, but where it has a meaning of its own.

    Raises:
      InputError: for what transformers reads and is not computed here, and for
        two spellings of a key with different values.
    """
    hf = {k: v for k, v in hf.items() if v is not None or k in _NULLABLE}
    for alias, key in self.aliases.items():
      value = hf.pop(alias, None)
      if value is not None and hf.setdefault(key, value) != value:
        raise InputError(
          f"{alias}={value!r} contradicts {key}={hf[key]!r}: they are two "
          f"spellings of one option; {_REMEDY.format(key=alias)}"
        )
    computed, refused = self.computed(), REFUSED | self.only
    for key, values in refused.items():
      if key not in computed and hf.get(key) is not None:
        _check_value(key, hf[key], values)
    passed = hf.keys() - computed - refused.keys()
    if passed := sorted(k for k in passed if not SILENT.fullmatch(k)):
      warnings.warn(
        f"config.json of a {hf.get('model_type')} has keys that transformers "
        f"does not read there, and they are passed over: {', '.join(passed)}",
        stacklevel=2,
      )
    hf = {key: value for key, value in hf.items() if key in computed}
    for key, value in hf.items():
      _check_type(key, value)
    return self.defaults | hf


def _check_type(key: str, value: Any) -> None:
  """Raises InputError for a value that its reader could not compute with."""
  if value is None:
    return
  if _COUNTS.fullmatch(key):
    errors.check_int(key, value, int(key != "max_window_layers"))
  elif key in _FACTORS:
    errors.check_float(key, value, 0, math.inf, excluded=0)
  elif key in _LISTS and not isinstance(value, list | tuple):
    raise InputError(f"{key}={value!r} is no list")


_COUNTS = re.compile(
  "(num|n|max)_.+|.+_(size|step|pattern|interval)|head_dim|sliding_window"
)
_FACTORS = ("query_pre_attn_scalar", "logits_scaling")
_LISTS = ("layer_types", "no_rope_layers", "mlp_only_layers")


def _check_value(key: str, value: Any, values: tuple) -> None:
  """Raises InputError for a value of a key that is not computed here."""
  each = value if isinstance(value, list) else [value]
  if all(part in values for part in each):
    return
  remedy = _REMEDY.format(key=key)
  if key in _QUANTISED:
    method = value.get("quant_method") if isinstance(value, dict) else value
    raise InputError(
      f"{key} says that the weights are quantised ({method}), which is not "
      "read: take the checkpoint that they were made from, or write them as "
      "floats with transformers, AutoModelForCausalLM.from_pretrained(FOLDER)"
      f".dequantize().save_pretrained(NEW). If they are floats, {remedy}"
    )
  known = f" (only {', '.join(map(repr, values))})" if values else ""
  raise InputError(
    f"{key}={value!r} is not computed here{known}; if it changes nothing in "
    f"this model, {remedy}"
  )


_REMEDY = "leave it out: ignore=({key!r},), or --ignore={key} of a command"
# Keys whose null differs from their default in transformers.
_NULLABLE = {
  "num_key_value_heads", "sliding_window", "attn_logit_softcapping",
  "final_logit_softcapping",
}
_QUANTISED = ("quantization_config", "quantization", "compression_config")
# Keys that transformers reads in all families, and the values computed here.
REFUSED = {
  **dict.fromkeys(_QUANTISED, ()), "is_encoder_decoder": (False,),
  "is_causal": (True,), "per_layer_config": ({},),
  "layer_types": ("full_attention",),
  "sliding_window": (), "attention_chunk_size": (), "kv_sharing_modes": (),
  **dict.fromkeys(("text_config", "decoder", "generator", "text_encoder"), ()),
}
# Keys that transformers reads or writes, and that change no logit: bookkeeping,
# dropout, initialisation, other outputs, and ids of special tokens.
SILENT = re.compile(
  "model_type|architectures|_?name_or_path|_commit_hash|transformers_version|"
  "(torch_)?dtype|use_cache|initializer_range|pretraining_tp|"
  "(.+_)?(dropout|pdrop)|(bos|eos|pad|unk|sep|cls|mask)_token_id|"
  "_?(attn|experts)_implementation|_attn_implementation_autoset|"
  "chunk_size_feed_forward|_?output_attentions|output_hidden_states|"
  "output_router_logits|router_(aux_loss_coef|jitter_noise)|return_dict|"
  "id2label|label2id|num_labels|problem_type|is_decoder|summary_.+|"
  "reorder_and_upcast_attn|_sliding_window_pattern"
)


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
_GEMMA_ONLY = {"use_bidirectional_attention": (False,)}
_EXPERTS = {"num_experts": "num_local_experts"}

FAMILIES = {
  "llama": ConfigTable(config_fields.rotary, _LLAMA),
  "mistral": ConfigTable(config_fields.windowed, _MISTRAL),
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
    config_fields.rotary, _DEFAULTS | _NO_BIAS | {"rms_norm_eps": 1e-5},
    fixed={"pre_norm": False, "post_norm": True, "qk_norm": "full"},
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
  name, text = hf.get("model_type"), hf.get("text_config")
  if name not in sorted(FAMILIES) and isinstance(text, dict):
    raise InputError(
      f"model_type={name!r} is not of text alone; only its text model, "
      f"{text.get('model_type')!r}, could be read, and only if it is one of "
      f"{sorted(FAMILIES)}: docs/families.md says how to write it by itself"
    )
  check_choice("model_type", name, sorted(FAMILIES))
  try:
    return ModelConfig(**_fields(FAMILIES[name], hf))
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
