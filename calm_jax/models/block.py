"""One block of a decoder: the same program for every layer of every family.

B batch, L query length, S key length, D width, N query heads, K key-value
heads, H head width, R features rotated, F MLP width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.models.attention import (
  Segments,
  attend,
  dot_product_attention,
  splash,
)
from calm_jax.models.cache import blocks, extend
from calm_jax.models.config import ModelConfig
from calm_jax.models.layers import Linear, norm
from calm_jax.models.moe import MoE
from calm_jax.models.rope import rotate

Array = jax.Array


class Context(NamedTuple):
  """What every layer needs to know of the sequence.

  Attributes:
    rope: (cos, sin), each float32 or more [B, L, 1, R/2]; None without rope.
    mask: bool [B, 1, L, S], True where query l may read key s; None where
      `segments` say it.
    index: int32 [], the cache's slot of the first query; None without a cache.
    local_rope: `rope` of layers with a window, where that differs.
    window_mask: `mask` of layers with a window, if there are any.
    segments: what kernels without a mask read; None elsewhere.
  """

  rope: tuple[Array, Array] | None
  mask: Array | None
  index: Array | None = None
  local_rope: tuple[Array, Array] | None = None
  window_mask: Array | None = None
  segments: Segments | None = None


def window_mask(mask_BLS: Array, window: int) -> Array:
  """What is left of a mask when a query sees its latest `window` keys.

  Keys are counted, not slots, so that slots left empty (padding between a
  prompt and its continuation) take up no part of the window.
  """
  through_BLS = jnp.cumsum(mask_BLS, axis=-1, dtype=jnp.int32)
  return mask_BLS & (through_BLS > through_BLS[..., -1:] - window)


def _among(config: ModelConfig, layers: tuple[int, ...], layer: Array) -> Array:
  return jnp.asarray(np.isin(np.arange(config.num_layers), layers))[layer]


def at_layer(config: ModelConfig, context: Context, layer: Array):
  """The (cos, sin) or None, and the mask, of one layer.

  Layers differ by `where` on a traced index, and not in their program, so that
  one body is compiled whatever the depth.
  """

  def among(layers):
    return _among(config, layers, layer)

  def choose(chosen, a, b):
    return jax.tree.map(lambda x, y: jnp.where(chosen, x, y), a, b)

  rope, mask = context.rope, context.mask
  if config.window is not None:
    local = context.local_rope or rope, context.window_mask
    if config.full_layers:
      local = choose(among(config.full_layers), (rope, mask), local)
    rope, mask = local
  if config.nope_layers and rope is not None:
    still = (jnp.ones_like(rope[0]), jnp.zeros_like(rope[1]))
    rope = choose(among(config.nope_layers), still, rope)
  return rope, mask


def _segmented(c: ModelConfig, q_BLNH, k_BSKH, v_BSKH, segments, layer):
  """Attention of one layer by the kernel that reads segments."""

  def within(window):
    return lambda *qkv: splash(
      *qkv,
      segments,
      window,
      c.attention_scale,
      c.attention_cap,
      c.compute.place,
    )

  qkv = q_BLNH, k_BSKH, v_BSKH
  if c.window is None or c.window >= k_BSKH.shape[1]:
    return within(None)(*qkv)
  if not c.full_layers:
    return within(c.window)(*qkv)
  is_full = _among(c, c.full_layers, layer)
  return jax.lax.cond(is_full, within(None), within(c.window), *qkv)


class Attention(nn.Module):
  """Grouped-query self-attention."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: Array, context: Context, cache=None, layer=0):
    c = self.config
    B, L, D = x_BLD.shape
    rope, mask = at_layer(c, context, layer)

    def project(name, heads, qk_norm=None):
      y = Linear(
        heads * c.head_dim, c.attention_bias, c.compute.dtype, name=name
      )(x_BLD)
      if qk_norm == "full":
        y = norm(c, f"{name}_norm")(y)
      y = y.reshape(B, L, heads, c.head_dim)
      return norm(c, f"{name}_norm")(y) if qk_norm == "head" else y

    q_BLNH = project("query", c.num_heads, c.qk_norm)
    k_BSKH = project("key", c.num_kv_heads, c.qk_norm)
    v_BSKH = project("value", c.num_kv_heads)
    if rope is not None:
      q_BLNH, k_BSKH = rotate(q_BLNH, rope), rotate(k_BSKH, rope)
    if c.scale_by_depth:
      q_BLNH = q_BLNH / jnp.asarray(layer + 1, q_BLNH.dtype)
    how = (c.attention_scale, c.attention_cap)
    if context.segments is not None:
      out_BLNH = _segmented(c, q_BLNH, k_BSKH, v_BSKH, context.segments, layer)
    elif cache is None:
      out_BLNH = dot_product_attention(
        q_BLNH, k_BSKH, v_BSKH, mask, *how, c.compute.attention, c.compute.place
      )
    else:
      # A cache may be of this layer alone; see `decoder.unstack`.
      row = 0 if len(cache["key"]) == 1 else layer
      new = {"key": k_BSKH.swapaxes(1, 2), "value": v_BSKH.swapaxes(1, 2)}
      cache = extend(cache, new, row, context.index)
      out_BLNH = attend(q_BLNH, blocks(cache, row, mask), *how)
    out = Linear(D, c.output_bias, c.compute.dtype, name="output")
    return out(out_BLNH.reshape(B, L, -1)), cache


def activation(name: str) -> Callable[[Array], Array]:
  """One of config.ACTIVATIONS."""
  if name == "gelu_exact":
    return functools.partial(jax.nn.gelu, approximate=False)
  return getattr(jax.nn, name)


class MLP(nn.Module):
  """down(act(gate(x)) * up(x)), or without a gate down(act(up(x)))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: Array) -> Array:
    c = self.config

    act = activation(c.activation)

    def widen(name):
      return Linear(c.mlp_width, c.mlp_bias, c.compute.dtype, name=name)(x_BLD)

    if c.gated_mlp:
      hidden_BLF = act(widen("gate")) * widen("up")
    else:
      hidden_BLF = act(widen("up"))
    return Linear(x_BLD.shape[-1], c.mlp_bias, c.compute.dtype, name="down")(
      hidden_BLF
    )


def _experts(c: ModelConfig) -> MoE:
  return MoE(
    c.num_experts,
    c.experts_per_token,
    c.mlp_width,
    c.normalise_experts,
    activation(c.activation),
    c.compute.dtype,
    name="mlp",
  )


class Block(nn.Module):
  """Attention, then MLP, each added to the residual stream."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: Array, context: Context, cache=None, layer=0):
    c = self.config

    def before(name):
      return norm(c, f"{name}_norm") if c.pre_norm else lambda x: x

    def after(name, delta):
      if c.post_norm:
        delta = norm(c, f"{name}_post_norm")(delta)
      return delta if c.residual_scale == 1 else delta * c.residual_scale

    normed = before("attention")(x_BLD)
    with jax.named_scope("attention"):
      delta, cache = Attention(c, name="attention")(
        normed, context, cache, layer
      )
    attended_BLD = x_BLD + after("attention", delta)
    normed = before("mlp")(x_BLD if c.parallel_residual else attended_BLD)
    with jax.named_scope("mlp"):
      if c.num_experts:
        delta = _experts(c)(normed, layer)
      else:
        delta = MLP(c, name="mlp")(normed)
    return attended_BLD + after("mlp", delta), cache
