"""Joined layers and the kernels of a step, against stacked layers.

Kernels are interpreted here: what they compute is tested, not their speed.
"""

from __future__ import annotations

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.composition import inference
from calm_jax.composition.connections import Composition
from calm_jax.models import (
  attention,
  attention_kernel,
  decoder,
  joined,
  linear_kernel,
  lora,
  masks,
  tiles,
)
from calm_jax.models import cache as cache_lib
from calm_jax.models import quantisation as quantisation_lib

L, SLOTS, PROMPT = 9, 32, 6
_GPT = {
  "norm": "layer", "gated_mlp": False, "mlp_bias": True,
  "attention_bias": True, "output_bias": True,
}  # fmt: skip
_GEMMA = {"norm": "rms_plus_one", "post_norm": True, "tie_embeddings": True}
# By name: whether layers have a step of kernels, and what they differ in.
MODELS = {
  "llama": (True, {}),
  "gemma 2": (True, _GEMMA | {
    "attention_cap": 3.0, "window": 5, "full_layers": (1, 3),
    "activation": "gelu",
  }),
  "gemma 3": (True, _GEMMA | {
    "qk_norm": "head", "window": 4, "full_layers": (3,),
    "attention_scale": 0.4,
  }),
  "qwen 2": (True, {"attention_bias": True}),
  "no gate": (True, {
    "gated_mlp": False, "mlp_bias": True, "output_bias": True,
    "residual_scale": 0.3, "scale_by_depth": True, "nope_layers": (1,),
    "activation": "relu",
  }),
  "gpt 2": (False, _GPT | {"learned_positions": True, "rope": None}),
  "gpt neox": (False, _GPT | {"parallel_residual": True}),
  "olmo 2": (False, {"qk_norm": "full", "pre_norm": False, "post_norm": True}),
  "experts": (False, {"num_experts": 4, "experts_per_token": 2}),
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


@pytest.mark.parametrize("name", [*MODELS, *CHANGES])
def test_joined_layers_compute_what_stacked_ones_do(name):
  name, change = CHANGES.get(name, (name, None))
  has_step, options = MODELS[name]
  config, params = helpers.model(1, **options)
  if change is not None:
    params = change(params)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (3, L)))
  want = logits(config, params, tokens)
  _, made = inference.prepare(Composition(config), {"anchor": params}, "joined")
  made = made["anchor"]
  np.testing.assert_allclose(logits(config, made, tokens), want, atol=4e-5)
  quick = config.with_compute(decoding="triton")
  layer, x_BLD = made["layers"][0], jnp.zeros((3, 1, config.width))
  has_lora = "lora_a" in params["layers"]["attention"]["query"]
  assert joined.has_step(quick, layer, x_BLD) == (has_step and not has_lora)
  assert not joined.has_step(config, layer, x_BLD)
  if has_step and not has_lora:
    np.testing.assert_allclose(logits(quick, made, tokens), want, atol=4e-5)


def normed(x, norm: tiles.RmsNorm):
  scale = norm.scale + norm.plus_one
  return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + norm.eps) * scale


@pytest.mark.parametrize("B", [1, 3, 16])
@pytest.mark.parametrize(
  ("D", "F", "kind"),
  [(600, 50, ""), (100, 20, "int8"), (128, 72, "int8"), (96, 48, "int4")],
)
def test_a_product_with_norms_residual_bias_and_gate(B, D, F, kind):
  random = np.random.default_rng(0)

  def array(*shape):
    return jnp.asarray(random.standard_normal(shape), jnp.float32)

  x_BD, delta_BD, bias_F = array(B, D), array(B, D), array(F)
  weight = dense_FD = array(F, D) * D**-0.5
  if kind:
    weight = quantisation_lib.quantise_leaf("embed/embedding", weight, kind)
    dense_FD = quantisation_lib.dense(weight, jnp.float32)
  norm = tiles.RmsNorm(0.1 * array(D), 1e-5, True)
  post_norm = tiles.RmsNorm(1 + 0.1 * array(D), 1e-3, False)
  residual = linear_kernel.Residual(delta_BD, post_norm, 0.5)
  y_BF, sum_BD = linear_kernel.linear(
    x_BD, weight, bias_F, norm, residual, jax.nn.gelu, gated=True
  )
  want_BD = x_BD + 0.5 * normed(delta_BD, post_norm)
  np.testing.assert_allclose(sum_BD, want_BD, atol=1e-5)
  out_BF = normed(want_BD, norm) @ dense_FD.T + bias_F
  gate, up = jnp.split(out_BF, 2, axis=1)
  np.testing.assert_allclose(y_BF, jax.nn.gelu(gate) * up, atol=2e-5)
  plain_BF, same_BD = linear_kernel.linear(x_BD, weight)
  np.testing.assert_allclose(plain_BF, x_BD @ dense_FD.T, atol=2e-5)
  assert same_BD is x_BD


@pytest.mark.parametrize(
  ("B", "N", "K", "H", "S", "slot"),
  [(1, 4, 2, 8, 32, 5), (3, 6, 2, 10, 300, 250), (2, 4, 4, 12, 600, 0)],
)
@pytest.mark.parametrize("extends", [True, False])
def test_attention_to_parts_of_a_cache(B, N, K, H, S, slot, extends):
  random = np.random.default_rng(0)

  def array(*shape):
    return jnp.asarray(random.standard_normal(shape), jnp.float32)

  cache = {"key": array(1, B, K, S, H), "value": array(1, B, K, S, H)}
  sees_BS = random.random((B, S)) < 0.7
  sees_BS &= np.arange(S) <= slot
  sees_BS[:, slot] = True
  mask_B11S = jnp.asarray(sees_BS[:, None, None])
  qkv_BF = array(B, (N + 2 * K) * H)
  q, k, v = jnp.split(qkv_BF, [N * H, (N + K) * H], axis=1)
  new, want = None, cache
  if extends:
    new = attention_kernel.NewToken(None, None, None)
    split = {"key": k, "value": v}
    split = {name: x.reshape(B, K, 1, H) for name, x in split.items()}
    want = cache_lib.extend(cache, split, 0, jnp.int32(slot))
  out_BF, got = attention_kernel.attend(
    qkv_BF if extends else q,
    cache,
    joined.bias(mask_B11S),
    jnp.int32(slot + 1),
    N,
    0.3,
    3.0,
    new,
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)
  blocks = cache_lib.blocks(want, 0, mask_B11S)
  wanted = attention.attend(q.reshape(B, 1, N, H), blocks, 0.3, 3.0)
  np.testing.assert_allclose(out_BF, wanted.reshape(B, -1), atol=1e-5)
