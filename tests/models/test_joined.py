"""Joined layers against stacked layers."""

from __future__ import annotations

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.composition import inference
from calm_jax.composition.connections import Composition
from calm_jax.models import decoder, joined, lora, masks
from calm_jax.models import quantisation as quantisation_lib

L, SLOTS, PROMPT = 9, 32, 6
_GPT = {
  "norm": "layer", "gated_mlp": False, "mlp_bias": True,
  "attention_bias": True, "output_bias": True,
}  # fmt: skip
_GEMMA = {"norm": "rms_plus_one", "post_norm": True, "tie_embeddings": True}
# By name, what layers differ in.
MODELS = {
  "llama": {},
  "gemma 2": _GEMMA | {
    "attention_cap": 3.0, "window": 5, "full_layers": (1, 3),
    "activation": "gelu",
  },
  "gemma 3": _GEMMA | {
    "qk_norm": "head", "window": 4, "full_layers": (3,),
    "attention_scale": 0.4,
  },
  "qwen 2": {"attention_bias": True},
  "no gate": {
    "gated_mlp": False, "mlp_bias": True, "output_bias": True,
    "residual_scale": 0.3, "scale_by_depth": True, "nope_layers": (1,),
    "activation": "relu",
  },
  "gpt 2": _GPT | {"learned_positions": True, "rope": None},
  "gpt neox": _GPT | {"parallel_residual": True},
  "olmo 2": {"qk_norm": "full", "pre_norm": False, "post_norm": True},
  "experts": {"num_experts": 4, "experts_per_token": 2},
}  # fmt: skip
CHANGES = {
  "gemma 3, int4": ("gemma 3", lambda p: quantisation_lib.quantise(p, "int4")),
  "llama, int8": ("llama", lambda p: quantisation_lib.quantise(p, "int8")),
  "qwen 2, int4": ("qwen 2", lambda p: quantisation_lib.quantise(p, "int4")),
  "llama, LoRA": ("llama", lambda p: lora.add(p, 2, jax.random.key(0))),
}


@functools.partial(jax.jit, static_argnums=0)
def step(config, params, cache, segments, tokens, index):
  B, n = tokens.shape
  new = jnp.ones((B, n), jnp.int32)
  segments = jax.lax.dynamic_update_slice(segments, new, (0, index))
  mask = masks.self_attention_mask(new, segments, index)
  positions = jnp.broadcast_to(index + jnp.arange(n), (B, n))
  context = masks.make_context(config, positions, mask, index)
  x = decoder.embed(params, config, tokens, positions)
  for part in ((0, 2), (2, None)):
    x, cache = decoder.run_layers(params, config, x, context, *part, cache)
  return decoder.logits(params, config, x), cache, segments


def logits(config, params, tokens) -> np.ndarray:
  """Of a prompt at once, and then of one token after the other."""
  stacked = not isinstance(params["layers"], tuple)
  cache = decoder.empty_cache(config, len(tokens), SLOTS, stacked)
  segments, out, at = jnp.zeros((len(tokens), SLOTS), jnp.int32), [], 0
  for count in (PROMPT, *[1] * (L - PROMPT)):
    given = tokens[:, at : at + count]
    made, cache, segments = step(
      config, params, cache, segments, given, jnp.int32(at)
    )
    out.append(made)
    at += count
  return np.concatenate(out, axis=1)


@pytest.mark.parametrize("case", [*MODELS, *CHANGES])
def test_joined_layers_compute_what_stacked_ones_do(case):
  name, change = CHANGES.get(case, (case, None))
  config, params = helpers.model(1, **MODELS[name])
  if change is not None:
    params = change(params)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (3, L)))
  want = logits(config, params, tokens)
  _, made = inference.prepare(Composition(config), {"anchor": params}, "joined")
  made = made["anchor"]
  np.testing.assert_allclose(logits(config, made, tokens), want, atol=4e-5)
  # Matrices with LoRA stay as they are.
  assert joined.is_joined(made) == (case != "llama, LoRA")
  assert not joined.is_joined(params)
