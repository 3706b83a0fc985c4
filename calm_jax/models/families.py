"""Hugging Face's config.json of every family, as a ModelConfig and back."""

from __future__ import annotations

from typing import Any

from calm_jax.errors import InputError
from calm_jax.models.config import ModelConfig

# Keys of a Llama config.json that we compute, with the only value that we
# compute where there is just one. A key in neither set changes no arithmetic
# of inference (initialisation, bookkeeping of transformers) and is listed too:
# whatever is left is unknown, and raises.
_LLAMA_ONLY = {
  "rope_scaling": (None,),
  "partial_rotary_factor": (None, 1, 1.0),
  "quantization_config": (None,),
  "is_encoder_decoder": (None, False),
  "add_cross_attention": (None, False),
}
_LLAMA_USED = {
  "model_type", "vocab_size", "hidden_size", "num_hidden_layers",
  "num_attention_heads", "num_key_value_heads", "head_dim",
  "intermediate_size", "max_position_embeddings", "hidden_act", "rms_norm_eps",
  "rope_theta", "rope_parameters", "tie_word_embeddings", "attention_bias",
  "mlp_bias",
}  # fmt: skip
_NO_ARITHMETIC = {
  "architectures", "_name_or_path", "transformers_version", "torch_dtype",
  "dtype", "use_cache", "initializer_range", "attention_dropout",
  "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
  "sep_token_id", "cls_token_id", "mask_token_id", "pretraining_tp",
  "chunk_size_feed_forward", "output_attentions", "output_hidden_states",
  "return_dict", "id2label", "label2id", "problem_type", "tokenizer_class",
  "torchscript", "use_bfloat16", "max_length", "generation_config",
  "_attn_implementation_autoset",
}  # fmt: skip


# transformers' names of activations; its "gelu" is the exact one, which differs
# from `jax.nn.gelu` and is not computed here.
ACTIVATIONS = {
  "silu": "silu", "swish": "silu", "relu": "relu", "gelu_pytorch_tanh": "gelu"
}  # fmt: skip


def _llama(hf: dict[str, Any]) -> ModelConfig:
  unknown = set(hf) - _LLAMA_USED - set(_LLAMA_ONLY) - _NO_ARITHMETIC
  if unknown:
    raise InputError(
      f"config.json of a llama has options we do not know: {sorted(unknown)}"
    )
  for key, computed in _LLAMA_ONLY.items():
    if hf.get(key) not in computed:
      raise InputError(
        f"config.json of a llama asks for {key}={hf[key]!r}, "
        f"which is not computed here (only {computed})"
      )
  rope = dict(hf.get("rope_parameters") or {})
  if rope.pop("rope_type", "default") != "default":
    raise InputError(
      "config.json of a llama asks for "
      f"rope_parameters={hf['rope_parameters']!r}; "
      "only rope_type='default' is computed here"
    )
  theta = rope.pop("rope_theta", hf.get("rope_theta", 10_000.0))
  if rope:
    raise InputError(f"rope_parameters has unknown options: {sorted(rope)}")
  activation = hf.get("hidden_act", "silu")
  if activation not in ACTIVATIONS:
    raise InputError(
      f"config.json of a llama asks for hidden_act={activation!r}, which is "
      f"not computed here (only {sorted(ACTIVATIONS)})"
    )
  num_heads = hf["num_attention_heads"]
  return ModelConfig(
    vocab_size=hf["vocab_size"],
    width=hf["hidden_size"],
    num_layers=hf["num_hidden_layers"],
    num_heads=num_heads,
    num_kv_heads=hf.get("num_key_value_heads") or num_heads,
    head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
    mlp_width=hf["intermediate_size"],
    max_length=hf.get("max_position_embeddings", 2048),
    activation=ACTIVATIONS[activation],
    norm_eps=hf.get("rms_norm_eps", 1e-6),
    rope_theta=float(theta),
    tie_embeddings=hf.get("tie_word_embeddings", False),
    attention_bias=hf.get("attention_bias", False),
    mlp_bias=hf.get("mlp_bias", False),
  )


FAMILIES = {"llama": _llama}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
  """Reads a Hugging Face config.json.

  Args:
    hf: the parsed config.json.

  Returns:
    The ModelConfig that computes the same function.

  Raises:
    InputError: the family is unknown, a required key is missing, or an option
      is set that this decoder does not compute. Never an approximation.
  """
  family = hf.get("model_type")
  if family not in FAMILIES:
    raise InputError(
      f"model_type={family!r} is not supported; known: {sorted(FAMILIES)}"
    )
  try:
    return FAMILIES[family](hf)
  except KeyError as e:
    raise InputError(f"config.json of a {family} lacks the key {e}") from e


def to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
  """The config.json of a model trained from scratch, a llama."""
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_length,
    "hidden_act": names[config.activation],
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tie_embeddings,
    "attention_bias": config.attention_bias,
    "mlp_bias": config.mlp_bias,
    "torch_dtype": dtype,
    # transformers' defaults are ids of Llama's own vocabulary.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
  }
