"""Reads and writes a Hugging Face config.json, strictly.

A key that the family's table lacks raises, as does what is not computed here.
"""

import dataclasses

from calm_jax.core.errors import InputError, check_choice
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf.config_tables import FAMILIES, ConfigTable, Json

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
# Bookkeeping, dropout, initialisation, generation: no arithmetic of inference.
# fmt: off
_NO_ARITHMETIC = {
  "model_type", "architectures", "_name_or_path", "name_or_path", "auto_map",
  "transformers_version", "torch_dtype", "dtype", "use_cache", "_num_labels",
  "cache_implementation", "initializer_range", "attention_dropout",
  "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout",
  "classifier_dropout", "residual_dropout", "embedding_dropout",
  "attention_probs_dropout_prob", "hidden_dropout_prob", "bos_token_id",
  "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
  "cls_token_id", "mask_token_id", "decoder_start_token_id", "pretraining_tp",
  "chunk_size_feed_forward", "gradient_checkpointing", "output_attentions",
  "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type",
  "tokenizer_class", "prefix", "is_decoder", "torchscript", "use_bfloat16",
  "tf_legacy_loss", "finetuning_task", "task_specific_params",
  "tie_encoder_decoder", "generation_config", "cross_attention_hidden_size",
  "_attn_implementation", "_attn_implementation_autoset", "max_length",
  "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
  "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
  "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
  "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
  "output_scores", "return_dict_in_generate", "forced_bos_token_id",
  "forced_eos_token_id", "remove_invalid_values", "suppress_tokens",
  "exponential_decay_length_penalty", "begin_suppress_tokens",
  "transformers.js_config",
}
# fmt: on
_NEVER = {
  "quantization_config": (None,),
  "is_encoder_decoder": (None, False),
  "add_cross_attention": (None, False),
  "pruned_heads": (None, {}),
  "per_layer_config": (None, {}),
  "use_bidirectional_attention": (None, False),
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
  only = _NEVER | family.only
  known = family.required | family.defaults.keys() | only.keys()
  known |= family.rope_keys | family.ignored
  unknown = set(hf) - known - _NO_ARITHMETIC
  if unknown:
    raise InputError(f"there are unknown options: {sorted(unknown)}")
  for key, computed in only.items():
    if hf.get(key) not in computed:
      raise InputError(
        f"{key}={hf[key]!r} is not computed here (only {computed})"
      )
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
  # transformers' defaults are ids of Llama's own vocabulary.
  ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  hf |= {"torch_dtype": dtype, **ids}
  back = from_hf(hf)
  differ = [
    f"{field.name}={getattr(config, field.name)!r}"
    for field in dataclasses.fields(back)
    if field.name != "compute"
    and getattr(config, field.name) != getattr(back, field.name)
  ]
  if differ:
    raise InputError(
      f"a model with {', '.join(differ)} is not a llama; only llamas have a "
      "config.json of our making, so keep the one that it was read from"
    )
  return hf
