"""The composition of frozen models (CALM, §3.1), as pure functions.

    params = {"anchor": {...},
              "augmenting": {name: {...}},
              "composition": {name: {connection: {...}}}}

B batch, L anchor length, M augmenting length, D anchor width, E augmenting
width, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from calm_jax.connections import (
  Augmenting,
  Composition,
)
from calm_jax.errors import InputError
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig
from calm_jax.models.layers import (
  Linear,
  RMSNorm,
  at_least_float32,
  dot_product_attention,
)

Array = jax.Array


class Sequence(NamedTuple):
  """A batch of token sequences, each int32 [B, L].

  `segments` numbers the examples packed into a row from 1, 0 is padding;
  `positions` counts from 0 within each segment.
  """

  tokens: Array
  segments: Array
  positions: Array


def plain_sequence(tokens_BL: Array) -> Sequence:
  """Full rows of one segment each."""
  positions_BL = jnp.broadcast_to(
    jnp.arange(tokens_BL.shape[1]), tokens_BL.shape
  )
  return Sequence(tokens_BL, jnp.ones_like(tokens_BL), positions_BL)


class CrossAttention(nn.Module):
  """f_cross(f_proj(H_A), H_B) of §3.1, in two halves.

  `keys_values` needs the augmenting model only, so that decoding caches its
  result; `attend` gives what is added to the anchor's residual stream.
  """

  anchor: ModelConfig
  norm: bool
  output_init: str

  def setup(self):
    width, dtype = self.anchor.width, self.anchor.dtype
    inner = self.anchor.num_heads * (width // self.anchor.num_heads)
    output_init = {
      "zeros": nn.initializers.zeros, "normal": nn.initializers.normal(0.02)
    }[self.output_init]  # fmt: skip
    self.projection = Linear(width, dtype=dtype)
    self.query = Linear(inner, dtype=dtype)
    self.key = Linear(inner, dtype=dtype)
    self.value = Linear(inner, dtype=dtype)
    self.output = Linear(width, dtype=dtype, kernel_init=output_init)
    if self.norm:
      self.projection_norm = RMSNorm(self.anchor.norm_eps)
      self.query_norm = RMSNorm(self.anchor.norm_eps)

  def _heads(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.anchor.num_heads, -1)

  def keys_values(self, h_BME: Array) -> dict[str, Array]:
    """Keys and values, each [B, M, N, H]."""
    if self.norm:
      h_BME = self.projection_norm(h_BME)
    projected_BMD = self.projection(h_BME)
    return {
      "key": self._heads(self.key(projected_BMD)),
      "value": self._heads(self.value(projected_BMD)),
    }

  def _query(self, x_BLD: Array) -> Array:
    return self._heads(
      self.query(self.query_norm(x_BLD) if self.norm else x_BLD)
    )

  def attend(self, x_BLD: Array, keys_values: dict, mask_BLM: Array) -> Array:
    """What is added to the residual stream, [B, L, D]."""
    out_BLNH = dot_product_attention(
      self._query(x_BLD),
      keys_values["key"],
      keys_values["value"],
      mask_BLM[:, None],
    )
    # A position that sees nothing gets nothing; the softmax of an empty row
    # would average over what it must not see.
    sees_BL = mask_BLM.any(-1)
    out_BLNH = jnp.where(sees_BL[..., None, None], out_BLNH, 0)
    return self.output(out_BLNH.reshape(*out_BLNH.shape[:2], -1))

  def probabilities(
    self, x_BLD: Array, keys_values: dict, mask_BLM: Array
  ) -> Array:
    """Where each head looks, float32 [B, N, L, M]; for pictures."""
    q_BLNH = self._query(x_BLD)
    scores = jnp.einsum("blnh,bmnh->bnlm", q_BLNH, keys_values["key"])
    scores = scores.astype(at_least_float32(scores.dtype))
    scores = scores / q_BLNH.shape[-1] ** 0.5
    lowest = jnp.finfo(scores.dtype).min
    return jax.nn.softmax(jnp.where(mask_BLM[:, None], scores, lowest))

  def __call__(self, x_BLD: Array, h_BME: Array, mask_BLM: Array) -> Array:
    return self.attend(x_BLD, self.keys_values(h_BME), mask_BLM)


def _cross(spec: Composition, augmenting: Augmenting) -> CrossAttention:
  return CrossAttention(spec.anchor, augmenting.norm, augmenting.output_init)


def init(rng: Array, spec: Composition) -> dict:
  """Fresh parameters of the composition subtree, float32."""
  params: dict = {}
  for name, augmenting in spec.augmenting:
    params[name] = {}
    for connection in augmenting.connections:
      rng, key = jax.random.split(rng)
      variables = _cross(spec, augmenting).init(
        key,
        jnp.zeros((1, 1, spec.anchor.width)),
        jnp.zeros((1, 1, augmenting.config.width)),
        jnp.ones((1, 1, 1), bool),
      )
      params[name][connection.name] = variables["params"]
  return params


def visible_tokens(
  visibility: str,
  shape: tuple[int, int],
  prompt_ends_BL: Array | None = None,
  first_slot: Array | int = 0,
) -> Array:
  """How many slots of the augmenting row each anchor position may see.

  For two models on the same tokens; see `Augmenting.visibility`.

  Args:
    visibility: one of VISIBILITIES.
    shape: (B, L) of the anchor's tokens.
    prompt_ends_BL: the slot after the prompt of each token's segment; needed
      for "encoder" only.
    first_slot: the slot of the first token.

  Returns:
    int32 [B, L]: the position may attend to slots s < visible[b, t].
  """
  through_BL = jnp.broadcast_to(first_slot + jnp.arange(1, shape[1] + 1), shape)
  if visibility == "causal":
    return through_BL
  if visibility == "unmasked":
    return jnp.full(shape, jnp.iinfo(jnp.int32).max)
  if prompt_ends_BL is None:
    raise InputError("visibility='encoder' needs to know where prompts end")
  return jnp.minimum(prompt_ends_BL, through_BL)


def limit_visible(
  visibility: str, visible_BL: Array, prompt_ends_BL: Array
) -> Array:
  """What `visible_tokens` says, for an augmenting model with other tokens.

  Args:
    visibility: one of VISIBILITIES.
    visible_BL: how many slots of the augmenting row each position may see if
      causal; see `alignment`.
    prompt_ends_BL: as there.

  Returns:
    int32 [B, L], as there.
  """
  if visibility == "causal":
    return visible_BL
  if visibility == "unmasked":
    return jnp.full_like(visible_BL, jnp.iinfo(jnp.int32).max)
  last_BL = jnp.maximum(prompt_ends_BL - 1, 0)
  at_prompt_BL = jnp.take_along_axis(visible_BL, last_BL, axis=1)
  return jnp.minimum(at_prompt_BL, visible_BL)


def cross_mask(
  visible_BL: Array, query_segments_BL: Array, key_segments_BM: Array
) -> Array:
  """The one mask of composition (design: visibility), bool [B, L, M]."""
  slots_M = jnp.arange(key_segments_BM.shape[1])
  same_BLM = query_segments_BL[:, :, None] == key_segments_BM[:, None, :]
  return (slots_M < visible_BL[:, :, None]) & same_BLM


def empty_cache(spec: Composition, batch: int, slots: int) -> dict:
  """The decoding cache of all models, as a plain tree.

  {"anchor": {"key", "value", "segments"}, "augmenting": {name: the same},
   "cross": {name: {connection: {"key", "value"}}}}
  """

  def one(config):
    segments = jnp.zeros((batch, slots), jnp.int32)
    return decoder.empty_cache(config, batch, slots) | {"segments": segments}

  heads = spec.anchor.num_heads
  shape = (batch, slots, heads, spec.anchor.width // heads)
  zeros = jnp.zeros(shape, spec.anchor.dtype)
  return {
    "anchor": one(spec.anchor),
    "augmenting": {n: one(a.config) for n, a in spec.augmenting},
    "cross": {
      n: {c.name: {"key": zeros, "value": zeros} for c in a.connections}
      for n, a in spec.augmenting
    },
  }


class _Run(NamedTuple):
  """One model's pass: its hidden state, layer by layer."""

  params: dict
  config: ModelConfig
  context: object
  segments: Array  # of the keys, [B, S]

  def layers(self, x, cache, start, stop):
    return decoder.run_layers(
      self.params, self.config, x, self.context, start, stop, cache
    )


def _start(params, config, sequence: Sequence, cache, index):
  """Embeds a sequence; with a cache, its keys go to slots index .. ."""
  segments = sequence.segments
  if cache is not None:
    segments = jax.lax.dynamic_update_slice(
      cache["segments"], segments, (0, index)
    )
    cache = {"key": cache["key"], "value": cache["value"]}
  mask = decoder.self_attention_mask(
    sequence.segments, segments, 0 if index is None else index
  )
  context = decoder.make_context(config, sequence.positions, mask, index)
  x = decoder.embed(params, config, sequence.tokens, sequence.positions)
  return _Run(params, config, context, segments), x, cache


def _stored(cache, run: _Run):
  return None if cache is None else cache | {"segments": run.segments}


def tap(params, augmenting: Augmenting, sequence: Sequence, cache, index):
  """Runs an augmenting model up to its last tapped layer, without its head.

  Returns:
    ({layer: hidden states [B, M, E]}, segments of the keys [B, S], cache).
  """
  run, x, kv = _start(params, augmenting.config, sequence, cache, index)
  taps, at = {}, 0
  for layer in sorted({c.augmenting for c in augmenting.connections}):
    x, kv = run.layers(x, kv, at, layer)
    taps[layer], at = x, layer
  return taps, run.segments, _stored(kv, run)


def states(
  params: dict,
  spec: Composition,
  anchor: Sequence,
  augmenting: dict[str, Sequence] | None = None,
  visible: dict[str, Array] | None = None,
  cache: dict | None = None,
  index: Array | None = None,
  look: dict | None = None,
) -> tuple[Array, dict | None]:
  """The composed layers: H'_Bj = H_Bj + f_cross(f_proj(H_Ai), H_Bj).

  Args:
    params: the whole tree.
    spec: what is composed.
    anchor: the anchor's tokens.
    augmenting: the tokens of each augmenting model; the anchor's if None.
    visible: per augmenting model int32 [B, L], from `visible_tokens`; by the
      model's own `visibility` on the same tokens if None.
    cache: from `empty_cache`, or None to compute the sequence at once.
    index: int32 [], the slot of the first token; with a cache only.
    look: a dict to be filled with {(name, connection): probabilities
      [B, N, L, M]}, or None.

  Returns:
    Hidden states after the last layer [B, L, D], and the updated cache (None
    without one).
  """
  new: dict = {"augmenting": {}, "cross": {}}
  arriving: dict[int, list] = {}
  with jax.named_scope("augmenting"):
    for name, joined in spec.augmenting:
      taps, segments, new["augmenting"][name] = tap(
        params["augmenting"][name],
        joined,
        anchor if augmenting is None else augmenting[name],
        cache and cache["augmenting"][name],
        index,
      )
      if visible is None:
        visible_BL = visible_tokens(
          joined.visibility,
          anchor.tokens.shape,
          first_slot=0 if index is None else index,
        )
      else:
        visible_BL = visible[name]
      mask = cross_mask(visible_BL, anchor.segments, segments)
      new["cross"][name] = {}
      for connection in joined.connections:
        cross = _cross(spec, joined).bind(
          {"params": params["composition"][name][connection.name]}
        )
        kv = cross.keys_values(taps[connection.augmenting])
        if cache is not None:
          kv = _write(cache["cross"][name][connection.name], kv, index)
          new["cross"][name][connection.name] = kv
        arriving.setdefault(connection.anchor, []).append(
          ((name, connection), cross, kv, mask)
        )

  with jax.named_scope("anchor"):
    run, x, kv_B = _start(
      params["anchor"], spec.anchor, anchor, cache and cache["anchor"], index
    )
    at = 0
    for layer in sorted(arriving):
      x, kv_B = run.layers(x, kv_B, at, layer)
      at = layer
      if look is not None:
        for key, cross, kv, mask in arriving[layer]:
          look[key] = cross.probabilities(x, kv, mask)
      # All contributions to a layer come from the same hidden state.
      x = x + sum(c.attend(x, kv, mask) for _, c, kv, mask in arriving[layer])
    if at < spec.anchor.num_layers:
      x, kv_B = run.layers(x, kv_B, at, spec.anchor.num_layers)
  return x, None if cache is None else new | {"anchor": _stored(kv_B, run)}


def _write(old: dict, new: dict, index: Array) -> dict:
  """Cross-attention keys and values of new slots, [B, L, N, H] each."""
  return {
    k: jax.lax.dynamic_update_slice(old[k], new[k], (0, index, 0, 0))
    for k in old
  }


def logits(params: dict, spec: Composition, x_BLD: Array) -> Array:
  """The anchor's head on the composed states, float32 [B, L, V]."""
  return decoder.logits(params["anchor"], spec.anchor, x_BLD)


def forward(params, spec, anchor, *args, **kwargs):
  """`states`, then `logits`: returns (logits [B, L, V], cache)."""
  x_BLD, cache = states(params, spec, anchor, *args, **kwargs)
  return logits(params, spec, x_BLD), cache


def alone(spec: Composition, params: dict, model: str):
  """One part of a composition as a model by itself.

  Args:
    spec: the composition.
    params: its tree.
    model: "composed", "anchor" or "augmenting/<name>".

  Returns:
    (spec, params) of that part, to be run by `forward`.

  Raises:
    InputError: there is no such part.
  """
  if model == "composed":
    return spec, params
  if model == "anchor":
    return Composition(spec.anchor), {"anchor": params["anchor"]}
  kind, _, name = model.partition("/")
  parts = dict(spec.augmenting)
  if kind != "augmenting" or name not in parts:
    raise InputError(
      f"no model {model!r}; there are 'composed', 'anchor' and "
      f"{[f'augmenting/{n}' for n in parts]}"
    )
  return Composition(parts[name].config), {"anchor": params["augmenting"][name]}
