"""One block of a decoder: the same program for every layer of every family.

B batch, L query length, S key length, D width, N query heads, K key-value
heads, H head width, R features rotated, F MLP width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.models.attention import SegmentMask, attend
from calm_jax.models.cache import blocks, extend
from calm_jax.models.config import ModelConfig
from calm_jax.models.layers import Linear, activation, norm
from calm_jax.models.masks import Context, at_layer, is_among
from calm_jax.models.moe import MoE
from calm_jax.models.rope import rotate

Array = jax.Array


def _attend(
  c: ModelConfig, q_BLNH: Array, blocks: list, layer: Array | int, kernel: str
) -> Array:
  """Attention of one layer; a `SegmentMask` does not tell its window."""
  everywhere = functools.partial(
    attend,
    scale=c.attention_scale,
    cap=c.attention_cap,
    kernel=kernel,
    place=c.compute.place,
  )
  within_window = functools.partial(everywhere, window=c.window)
  by_segments = isinstance(blocks[0][2], SegmentMask)
  if not by_segments or c.window is None or not c.full_layers:
    return within_window(q_BLNH, blocks)
  if c.window >= q_BLNH.shape[1]:
    return everywhere(q_BLNH, blocks)
  is_full = is_among(c, c.full_layers, layer)
  return jax.lax.cond(is_full, everywhere, within_window, q_BLNH, blocks)


class Attention(nn.Module):
  """Grouped-query self-attention."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: Array, context: Context, cache=None, layer=0):
    c = self.config
    B, L, D = x_BLD.shape
    rope, mask = at_layer(c, context, layer)

    heads = {"query": c.num_heads, "key": c.num_kv_heads}
    heads["value"] = c.num_kv_heads

    def linear(name, heads):
      width = heads * c.head_dim
      return Linear(width, c.attention_bias, c.compute.dtype, name=name)(x_BLD)

    if self.has_variable("params", "query_key_value"):  # of `joined`
      y = linear("query_key_value", sum(heads.values()))
      ends = np.cumsum(list(heads.values()))[:-1] * c.head_dim
      made = dict(zip(heads, jnp.split(y, ends, axis=-1), strict=True))
    else:
      made = {name: linear(name, count) for name, count in heads.items()}

    def project(name, qk_norm=None):
      y = made[name]
      if qk_norm == "full":
        y = norm(c, f"{name}_norm")(y)
      y = y.reshape(B, L, heads[name], c.head_dim)
      return norm(c, f"{name}_norm")(y) if qk_norm == "head" else y

    q_BLNH = project("query", c.qk_norm)
    k_BSKH = project("key", c.qk_norm)
    v_BSKH = project("value")
    if rope is not None:
      q_BLNH = rotate(q_BLNH, rope, c.interleaved_rope)
      k_BSKH = rotate(k_BSKH, rope, c.interleaved_rope)
    if context.query_scale is not None:
      q_BLNH = q_BLNH * context.query_scale.astype(q_BLNH.dtype)
    if c.scale_by_depth:
      q_BLNH = q_BLNH / jnp.asarray(layer + 1, q_BLNH.dtype)
    new = {"key": k_BSKH.swapaxes(1, 2), "value": v_BSKH.swapaxes(1, 2)}
    if cache is None:
      keys_values = [(new["key"], new["value"], mask)]
      kernel = c.compute.attention
    else:
      # A cache may be of this layer alone; see `decoder.unstack`.
      row = 0 if len(cache["key"]) == 1 else layer
      assert context.index is not None
      cache = extend(cache, new, row, context.index)
      keys_values, kernel = blocks(cache, row, mask), "xla"
    out_BLNH = _attend(c, q_BLNH, keys_values, layer, kernel)
    out = Linear(D, c.output_bias, c.compute.dtype, name="output")
    return out(out_BLNH.reshape(B, L, -1)), cache


class MLP(nn.Module):
  """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: Array) -> Array:
    c = self.config
    act = activation(c.activation)

    def linear(name, features):
      return Linear(features, c.mlp_bias, c.compute.dtype, name=name)

    if self.has_variable("params", "gate_up"):
      both = linear("gate_up", 2 * c.mlp_width)(x_BLD)
      gate_BLF, up_BLF = jnp.split(both, 2, axis=-1)
      hidden_BLF = act(gate_BLF) * up_BLF
    elif c.gated_mlp:
      gate_BLF = act(linear("gate", c.mlp_width)(x_BLD))
      hidden_BLF = gate_BLF * linear("up", c.mlp_width)(x_BLD)
    else:
      hidden_BLF = act(linear("up", c.mlp_width)(x_BLD))
    return linear("down", x_BLD.shape[-1])(hidden_BLF)


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
      attention = Attention(c, name="attention")
      delta, cache = attention(normed, context, cache, layer)
    attended_BLD = x_BLD + after("attention", delta)
    normed = before("mlp")(x_BLD if c.parallel_residual else attended_BLD)
    with jax.named_scope("mlp"):
      if c.num_experts:
        delta = MoE(c, name="mlp")(normed, layer)
      else:
        delta = MLP(c, name="mlp")(normed)
    return attended_BLD + after("mlp", delta), cache
