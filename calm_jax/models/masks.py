"""Masks and rotary positions of a sequence, computed once for all layers.

B batch, L query length, S key length, R features rotated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.models.attention import SegmentMask
from calm_jax.models.config import ModelConfig
from calm_jax.models.layers import at_least_float32
from calm_jax.models.rope import tables

Array = jax.Array


class Context(NamedTuple):
  """Positions and masks of a sequence, which every layer reads."""

  # (cos, sin), each float32 or more [B, L, 1, R/2]; None without rope.
  rope: tuple[Array, Array] | None
  # bool [B, 1, L, S], True where query l may read key s.
  mask: Array | SegmentMask
  index: Array | None  # the cache's slot of the first query, int32 []
  # Those of layers with a window, of which a `SegmentMask` says nothing.
  local_rope: tuple[Array, Array] | None
  local_mask: Array | SegmentMask
  # Factors of queries by their positions, [B, L, 1, 1]; None for one.
  query_scale: Array | None


def make_context(
  config: ModelConfig,
  positions_BL: Array,
  mask_BLS: Array | SegmentMask,
  index: Array | None = None,
  lengths: Array | None = None,
) -> Context:
  """Computes the positions and masks that every layer reads.

  Args:
    config: the model.
    positions_BL: the position of each token in its sequence, from 0.
    mask_BLS: from `self_attention_mask`; or a `SegmentMask`, if the config's
      kernel reads those.
    index: int32 [], the cache's slot of the first token; None without one.
    lengths: as for `rope.tables`. Without a cache the mask tells; with one,
      a scaling that needs them raises InputError if they are None.
  """
  by_segments = isinstance(mask_BLS, SegmentMask)
  slots = (mask_BLS.keys if by_segments else mask_BLS).shape[-1]
  by_length = [
    rope
    for rope in (config.rope, config.local_rope)
    if rope is not None and rope.kind in ("dynamic", "longrope")
  ]
  if lengths is None and any(slots > r.original_length for r in by_length):
    if index is not None:
      raise InputError(
        "rotary positions that depend on the length of the whole sequence "
        "(dynamic, longrope): give `lengths` to decode with a cache of "
        f"{slots} slots"
      )
    if isinstance(mask_BLS, SegmentMask):
      pairs_BLS = self_attention_mask(mask_BLS.queries, mask_BLS.keys)
    else:
      pairs_BLS = mask_BLS
    # A token sees those up to itself, and is seen by those from itself on.
    lengths = pairs_BLS.sum(axis=2) + pairs_BLS.sum(axis=1) - 1
  mask = mask_BLS if by_segments else mask_BLS[:, None]
  local_mask = mask
  if not by_segments and config.window is not None:
    local_mask = window_mask(mask_BLS, config.window)[:, None]
  dtype = at_least_float32(config.compute.dtype)

  def turn(rope):
    return None if rope is None else tables(rope, positions_BL, dtype, lengths)

  rope = turn(config.rope)
  local_rope = turn(config.local_rope) or rope
  query_scale = None
  if config.query_growth is not None:
    growth, length = config.query_growth
    steps_BL11 = (positions_BL // length)[..., None, None].astype(dtype)
    query_scale = 1 + growth * jnp.log1p(steps_BL11)
  return Context(rope, mask, index, local_rope, local_mask, query_scale)


def self_attention_mask(
  query_segments_BL: Array, key_segments_BS: Array, first_slot: Array | int = 0
) -> Array:
  """Causal mask within segments, bool [B, L, S].

  Query l sits at slot first_slot + l. Segment 0 is padding; it sees only
  itself, so that no row of the softmax is empty.
  """
  L, S = query_segments_BL.shape[1], key_segments_BS.shape[1]
  causal_LS = jnp.arange(S) <= first_slot + jnp.arange(L)[:, None]
  same_BLS = query_segments_BL[:, :, None] == key_segments_BS[:, None, :]
  return causal_LS & same_BLS


def window_mask(mask_BLS: Array, window: int) -> Array:
  """Restricts a mask to the latest `window` keys of each query.

  Keys are counted, not slots, so that slots left empty (padding between a
  prompt and its continuation) take up no part of the window.
  """
  through_BLS = jnp.cumsum(mask_BLS, axis=-1, dtype=jnp.int32)
  return mask_BLS & (through_BLS > through_BLS[..., -1:] - window)


def is_among(
  config: ModelConfig, layers: tuple[int, ...], layer: Array | int
) -> Array | bool:
  """Returns whether a layer, from 0, is one of `layers`: bool [] if traced."""
  if isinstance(layer, int):
    return layer in layers
  return jnp.asarray(np.isin(np.arange(config.num_layers), layers))[layer]


def first_alike(config: ModelConfig, layer: int) -> int:
  """Returns the first layer that computes as `layer` does, weights apart."""
  if config.scale_by_depth:
    return layer

  def kind(i: int) -> tuple[bool, bool]:
    return i in config.full_layers, i in config.nope_layers

  return next(i for i in range(layer + 1) if kind(i) == kind(layer))


def at_layer(config: ModelConfig, context: Context, layer: Array | int):
  """Returns the (cos, sin) or None, and the mask, of one layer.

  Layers differ by `where` on a traced index, so that one body is compiled; an
  int chooses while the program is traced.
  """

  def choose(chosen, a, b):
    if isinstance(layer, int):
      return a if chosen else b
    return jax.tree.map(lambda x, y: jnp.where(chosen, x, y), a, b)

  rope, mask = context.rope, context.mask
  if config.window is not None:
    local = context.local_rope, context.local_mask
    if config.full_layers:
      is_full = is_among(config, config.full_layers, layer)
      local = choose(is_full, (rope, mask), local)
    rope, mask = local
  if config.nope_layers and rope is not None:
    still = (jnp.ones_like(rope[0]), jnp.zeros_like(rope[1]))
    rope = choose(is_among(config, config.nope_layers, layer), still, rope)
  return rope, mask
