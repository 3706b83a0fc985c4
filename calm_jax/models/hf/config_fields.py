"""Computes the fields of ModelConfig that are not copied from a config.json.

Each function takes a config.json with its family's defaults.
"""

import math
from collections.abc import Callable
from typing import Any

from calm_jax.core.errors import InputError, check_choice, check_float
from calm_jax.models.hf import rope_config

Json = dict[str, Any]
_KINDS = ("full_attention", "sliding_attention")


def _head_dim(hf: Json, width="hidden_size", heads="num_attention_heads"):
  if hf.get("head_dim"):
    return hf["head_dim"]
  if hf[width] % hf[heads]:
    raise InputError(
      f"{width}={hf[width]} is not a multiple of {heads}={hf[heads]}"
    )
  return hf[width] // hf[heads]


def rotary(hf: Json, theta: float = 10_000.0, fraction: float | None = None):
  """Reads rotary positions and the width of a head."""
  head_dim = _head_dim(hf)
  rope = rope_config.read_rope(hf, head_dim, theta, fraction)
  return {"rope": rope, "head_dim": head_dim}


def _windows(hf: Json, slides: Callable[[int], bool] = lambda i: True) -> Json:
  """The window of the layers to which layer_types, or `slides`, gives it."""
  layers = range(hf["num_hidden_layers"])
  window, types = hf["sliding_window"], hf.get("layer_types")
  if not hf.get("use_sliding_window", True):
    window = None
  if types is None:
    given = window is not None
    types = [_KINDS[bool(given and slides(i))] for i in layers]
  if len(types) != len(layers) or not all(t in _KINDS for t in types):
    raise InputError(
      f"layer_types={types!r} are not num_hidden_layers={len(layers)} of "
      f"{_KINDS}"
    )
  full = tuple(i for i in layers if types[i] == _KINDS[0])
  if len(full) == len(layers):
    return {}
  if window is None:
    raise InputError(
      f"layer_types has {_KINDS[1]}, but no sliding_window is on"
    )
  return {"window": window, "full_layers": full}


def _alternating(hf: Json, every: int) -> Json:
  """A window in all layers but each `every`-th."""
  types = hf["layer_types"] or [
    _KINDS[bool((i + 1) % every)] for i in range(hf["num_hidden_layers"])
  ]
  return _windows(hf | {"layer_types": types})


def windowed(hf: Json) -> Json:
  """Reads rotary positions, and a window of all layers or of none."""
  return rotary(hf) | _windows(hf)


def qwen(hf: Json) -> Json:
  return rotary(hf) | _windows(hf, lambda i: i >= hf["max_window_layers"])


def smollm3(hf: Json) -> Json:
  layers, every = range(hf["num_hidden_layers"]), hf["no_rope_layer_interval"]
  turned = hf["no_rope_layers"]  # 1 where there is rope, whatever its name
  if turned is None:
    turned = [(i + 1) % every != 0 for i in layers]
  if len(turned) < len(layers):
    raise InputError(f"no_rope_layers={turned!r} are fewer than the layers")
  nope = tuple(i for i in layers if not turned[i])
  windows = _windows(hf, lambda i: i in nope)
  return rotary(hf, 2_000_000.0) | windows | {"nope_layers": nope}


def gemma(hf: Json) -> Json:
  activation, newer = hf["hidden_act"], hf["hidden_activation"]
  if activation == "gelu":  # of the first releases; they meant the other one
    activation = "gelu_pytorch_tanh"
  if newer not in (None, activation):
    raise InputError(
      f"hidden_activation={newer!r} contradicts hidden_act={hf['hidden_act']!r}"
    )
  scale = hf["hidden_size"] ** 0.5
  return rotary(hf) | {"embedding_scale": scale, "activation": activation}


def _gemma_scales(hf: Json) -> Json:
  return {
    "embedding_scale": hf["hidden_size"] ** 0.5,
    "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
  }


def gemma2(hf: Json) -> Json:
  return _gemma_scales(hf) | rotary(hf) | _alternating(hf, 2)


def _two_ropes(hf: Json, every: int, *thetas: float) -> Json:
  """Reads `_alternating`, and the windowed layers' other rotary positions.

  The bases `thetas` are the defaults of full layers and of those with windows.
  """
  head_dim, windows = _head_dim(hf), _alternating(hf, every)
  by_kind = dict(zip(_KINDS, thetas, strict=True))
  rope, local_rope = rope_config.read_ropes(hf, head_dim, by_kind).values()
  if windows:
    windows["local_rope"] = local_rope
  return windows | {"head_dim": head_dim, "rope": rope}


def gemma3(hf: Json) -> Json:
  return _gemma_scales(hf) | _two_ropes(
    hf, hf["sliding_window_pattern"], 1e6, 1e4
  )


def ministral3(hf: Json) -> Json:
  """Reads yarn, and with it the growth of queries."""
  rope = rope_config.read_options(hf, "rope_scaling")
  rope = rope or rope_config.read_options(hf, "rope_parameters")
  name = "llama_4_scaling_beta"
  growth = check_float(name, rope.pop(name), 0, math.inf)
  rope.pop("max_position_embeddings", None)
  fields = windowed(hf | {"rope_parameters": rope, "rope_scaling": None})
  check_choice("rope_type", fields["rope"].kind, ("yarn",))
  return fields | {"query_growth": (growth, fields["rope"].original_length)}


def olmo3(hf: Json) -> Json:
  return _two_ropes(hf, 4, 5e5, 5e5)


def gpt2(hf: Json) -> Json:
  return {
    "num_kv_heads": hf["n_head"],
    "head_dim": _head_dim(hf, "n_embd", "n_head"),
    "mlp_width": hf["n_inner"] or 4 * hf["n_embd"],
    "attention_scale": None if hf["scale_attn_weights"] else 1.0,
  }


def phi3(hf: Json) -> Json:
  fields = rotary(hf, fraction=1.0) | _windows(hf)
  check_choice("rope_type", fields["rope"].kind, ("default", "longrope"))
  return fields


def exaone4(hf: Json) -> Json:
  """Reads windows; where there are any, full layers have no positions."""
  windows = _alternating(hf, 4)
  full = windows.get("full_layers", range(hf["num_hidden_layers"]))
  nope = () if hf["sliding_window"] is None else tuple(full)
  return rotary(hf) | windows | {"nope_layers": nope}


def glm(hf: Json) -> Json:
  return rotary(hf, fraction=0.5) | {"output_bias": False}


def helium(hf: Json) -> Json:
  return rotary(hf, 1e5) | {"output_bias": False}


def ernie(hf: Json) -> Json:
  return rotary(hf, 5e5)


def mixtral(hf: Json) -> Json:
  fields = experts(hf) | {"normalise_experts": True}
  return fields | rotary(hf, 1e6) | _windows(hf)


def qwen3_moe(hf: Json) -> Json:
  """Reads a mixture of experts, which every layer must have."""
  step, never = hf["decoder_sparse_step"], hf["mlp_only_layers"]
  layers = range(hf["num_hidden_layers"])
  dense = [i for i in layers if (i + 1) % step or i in (never or ())]
  if dense:
    raise InputError(
      f"decoder_sparse_step={step} and mlp_only_layers={never} give ordinary "
      f"MLPs to the layers {dense}, from 0; only experts are computed here"
    )
  fields = experts(hf) | {
    "mlp_width": hf["moe_intermediate_size"],
    "normalise_experts": hf["norm_topk_prob"],
  }
  return fields | windowed(hf)


def experts(hf: Json) -> Json:
  """Reads the numbers of experts, of all and of those of a token."""
  count, per_token = hf["num_local_experts"], hf["num_experts_per_tok"]
  if count < max(1, per_token):
    raise InputError(
      f"num_local_experts={count} with num_experts_per_tok={per_token}"
    )
  return {"experts_per_token": per_token, "num_experts": count}


def granite(hf: Json) -> Json:
  return rotary(hf) | {"logit_scale": 1 / hf["logits_scaling"]}


def neox(hf: Json) -> Json:
  # Some versions of transformers write both spellings; all read their own.
  nested = {}
  for key in ("rope_parameters", "rope_scaling"):
    nested |= rope_config.read_options(hf, key)
  defaults = (10_000.0, 0.25)
  pairs = (rope_config.THETA, rope_config.FRACTION)
  for (general, neox_key), default in zip(pairs, defaults, strict=True):
    alone = hf.get(neox_key) is None and nested.get(general) is None
    if alone and hf.get(general) not in (None, default):
      raise InputError(
        f"{general} is given without {neox_key}, the one that is read: rename "
        "it, or leave it out, by ignore="
      )
  heads = {"num_kv_heads": hf["num_attention_heads"]}
  return rotary(hf, fraction=0.25) | heads
