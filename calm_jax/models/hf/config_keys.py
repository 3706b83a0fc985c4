"""Judges the keys of a config.json: computed, refused, or passed over.

What transformers reads of a family is computed here or refused by name. A key
that it does not read cannot change what is computed: it is passed over, named.
"""

import math
import re
import warnings
from collections.abc import Callable, Set
from typing import Any, NamedTuple

from calm_jax.core import errors
from calm_jax.core.errors import InputError
from calm_jax.models.hf import rope_config

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
  "output_bias": ("attention_bias", "use_bias", "attention_out_bias"),
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
REQUIRED = frozenset({
  "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
  "intermediate_size",
})
_REMEDY = "leave it out: ignore=({key!r},), or --ignore={key} of a command"
# Keys whose null differs from their default in transformers.
_NULLABLE = {
  "num_key_value_heads", "head_dim", "sliding_window",
  "attn_logit_softcapping", "final_logit_softcapping",
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
# Keys by the type that they must have.
_COUNTS = re.compile(
  "(num|n|max)_.+|.+_(size|step|pattern|interval)|head_dim|sliding_window"
)
_FACTORS = ("query_pre_attn_scalar", "logits_scaling")
_LISTS = ("layer_types", "no_rope_layers", "mlp_only_layers")
# fmt: on


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
  required: Set[str] = REQUIRED  # keys that have no default

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
    for key, value in hf.items():
      if key in computed or key in REFUSED:
        _check_type(key, value)
    length = (self.defaults | hf).get("max_position_embeddings", math.inf)
    if (hf.get("sliding_window") or 0) >= length:
      refused.pop("sliding_window")  # It hides nothing.
    for key, values in refused.items():
      if key not in computed and hf.get(key) is not None:
        _check_value(key, hf[key], values)
    passed = hf.keys() - computed - REFUSED.keys() - self.only.keys()
    if passed := sorted(k for k in passed if not SILENT.fullmatch(k)):
      warnings.warn(
        f"config.json of a {hf.get('model_type')} has keys that transformers "
        f"does not read there, and they are passed over: {', '.join(passed)}",
        stacklevel=2,
      )
    return self.defaults | {k: v for k, v in hf.items() if k in computed}


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
