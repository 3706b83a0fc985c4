"""The composition of frozen models (CALM, §3.1), as pure functions.

    params = {"anchor": {...},
              "augmenting": {name: {...}},
              "composition": {name: {connection: {...}}}}

B batch, L anchor length, M augmenting length, D anchor width, E augmenting
width, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition.connections import Augmenting, Composition
from calm_jax.composition.controls import controlled
from calm_jax.composition.cross_attention import (
  CrossAttention,
  cross_mask,
  visible_tokens,
)
from calm_jax.core.batch import Sequence
from calm_jax.core.errors import InputError
from calm_jax.models import cache as cache_lib
from calm_jax.models import decoder, masks
from calm_jax.models.attention import SegmentMask
from calm_jax.models.config import ModelConfig

Array = jax.Array


def _cross(
  spec: Composition, augmenting: Augmenting, folded: bool = False
) -> CrossAttention:
  return CrossAttention(
    spec.anchor,
    augmenting.norm,
    augmenting.output_init,
    augmenting.positions,
    folded,
  )


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


def param_shapes(spec: Composition) -> dict:
  """The tree of `init` as `jax.ShapeDtypeStruct`s, without computing it."""
  return jax.eval_shape(lambda: init(jax.random.key(0), spec))


def empty_cache(
  spec: Composition,
  batch: int,
  slots: int | dict[str, int],
  stacked: bool = True,
) -> dict:
  """The decoding cache of all models, as a plain tree.

  {"anchor": {"layers": of `decoder.empty_cache`, "segments": [B, S]},
   "augmenting": {name: the same},
   "cross": {name: {connection: {"key", "value"}}}}

  Args:
    spec: what is composed.
    batch: rows.
    slots: of every model, or by "anchor" and the names of the augmenting ones.
    stacked: False for parameters of `decoder.unstack`.
  """
  if isinstance(slots, int):
    slots = {"anchor": slots} | {name: slots for name, _ in spec.augmenting}
  heads = spec.anchor.num_heads

  def one(name, config):
    return {
      "layers": decoder.empty_cache(config, batch, slots[name], stacked),
      "segments": jnp.zeros((batch, slots[name]), jnp.int32),
    }

  def cross(name):
    width = spec.anchor.width // heads
    return cache_lib.empty(
      1, batch, heads, slots[name], width, spec.anchor.compute.dtype
    )

  cache = {
    "anchor": one("anchor", spec.anchor),
    "augmenting": {n: one(n, a.config) for n, a in spec.augmenting},
    "cross": {
      n: {c.name: cross(n) for c in a.connections} for n, a in spec.augmenting
    },
  }
  place = spec.anchor.compute.place
  return cache if place is None else place.cache(cache)


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


def _start(params, config, sequence: Sequence, cache, index, lengths_B):
  """Embeds a sequence; with a cache, its keys go to slots index .. ."""
  segments = sequence.segments
  if cache is not None:
    segments = jax.lax.dynamic_update_slice(
      cache["segments"], segments, (0, index)
    )
    cache = cache["layers"]
  if cache is None and config.compute.attention == "splash":
    mask = SegmentMask(segments, segments, sequence.positions)
  else:
    mask = masks.self_attention_mask(
      sequence.segments, segments, 0 if index is None else index
    )
  context = masks.make_context(
    config, sequence.positions, mask, index, lengths_B
  )
  x = decoder.embed(params, config, sequence.tokens, sequence.positions)
  return _Run(params, config, context, segments), x, cache


def _stored(cache, run: _Run):
  return cache and {"layers": cache, "segments": run.segments}


def tap(
  params,
  augmenting: Augmenting,
  sequence: Sequence,
  cache=None,
  index=None,
  lengths_B=None,
):
  """Runs an augmenting model up to its last tapped layer, without its head.

  Returns:
    ({layer: hidden states [B, M, E]}, segments of the keys [B, S], cache).
  """
  run, x, kv = _start(
    params, augmenting.config, sequence, cache, index, lengths_B
  )
  taps, at = {}, 0
  for layer in sorted({c.augmenting for c in augmenting.connections}):
    x, kv = run.layers(x, kv, at, layer)
    taps[layer], at = x, layer
  return taps, run.segments, _stored(kv, run)


def read_on(
  params: dict,
  spec: Composition,
  name: str,
  sequence: Sequence,
  cache: dict | None = None,
  index: Array | None = None,
  lengths_B: Array | None = None,
) -> dict:
  """An augmenting model reads tokens, and its connections make of them what
  the anchor attends to.

  Args:
    params: the whole tree.
    spec: what is composed.
    name: of the augmenting model.
    sequence: its tokens.
    cache: {"augmenting", "cross"} of this model, or None.
    index: int32 [], the slot of the first token; with a cache only.
    lengths_B: how long its rows will have become; see `states`.

  Returns:
    {"augmenting": its cache, whose "segments" [B, S] are there without a cache
    too, "cross": {connection: {"key", "value"}}}.
  """
  joined = dict(spec.augmenting)[name]
  taps, segments, kept = tap(
    params["augmenting"][name],
    joined,
    sequence,
    cache and cache["augmenting"],
    index,
    lengths_B,
  )
  cross = {}
  for connection in joined.connections:
    layer = connection.augmenting
    kv = _bound(params, spec, name, connection).keys_values(
      controlled(joined, taps[layer], sequence.positions, layer),
      sequence.positions,
    )
    if cache is not None:
      kv = cache_lib.extend(cache["cross"][connection.name], kv, 0, index)
    cross[connection.name] = kv
  return {"augmenting": kept or {"segments": segments}, "cross": cross}


def _bound(params, spec, name, connection) -> CrossAttention:
  weights = params["composition"][name][connection.name]
  joined = dict(spec.augmenting)[name]
  cross = _cross(spec, joined, folded="projection" not in weights)
  return cross.bind({"params": weights})


def states(
  params: dict,
  spec: Composition,
  anchor: Sequence,
  augmenting: dict[str, Sequence] | None = None,
  visible: dict[str, Array] | None = None,
  cache: dict | None = None,
  index: Array | None = None,
  look: dict | None = None,
  lengths: dict[str, Array] | None = None,
) -> tuple[Array, dict | None]:
  """The composed layers: H'_Bj = H_Bj + f_cross(f_proj(H_Ai), H_Bj).

  Args:
    params: the whole tree.
    spec: what is composed.
    anchor: the anchor's tokens.
    augmenting: the tokens of each augmenting model; the anchor's if None. With
      a cache, a model that is not there reads nothing new.
    visible: per augmenting model int32 [B, L], from `visible_tokens`; by the
      model's own `visibility` on the same tokens where there is none.
    cache: from `empty_cache`, or None to compute the sequence at once.
    index: int32 [], the slot of the first token; with a cache only.
    look: a dict to be filled with {(name, connection): probabilities
      [B, N, L, M]}, or None.
    lengths: with a cache, int32 [B] by "anchor" and the augmenting names, how
      long each row will have become, for rotary scalings that depend on it;
      see `masks.make_context`.

  Returns:
    Hidden states after the last layer [B, L, D], and the updated cache (None
    without one).
  """
  new: dict = {"augmenting": {}, "cross": {}}
  arriving: dict[int, list] = {}
  with jax.named_scope("augmenting"):
    for name, joined in spec.augmenting:
      old = cache and {k: cache[k][name] for k in new}
      length_B = lengths and lengths.get(name)
      if augmenting is None:
        heard = read_on(params, spec, name, anchor, old, index, length_B)
      elif name in augmenting or cache is None:
        heard = read_on(
          params, spec, name, augmenting[name], old, index, length_B
        )
      else:
        heard = old
      for kind, value in heard.items():
        new[kind][name] = value
      keys_BM = heard["augmenting"]["segments"]
      if visible is not None and name in visible:
        mask = cross_mask(visible[name], anchor.segments, keys_BM)
      elif (
        spec.anchor.compute.attention == "splash"
        and joined.visibility == "causal"
        and (augmenting is None or augmenting[name] is anchor)
        and cache is look is None
      ):
        mask = SegmentMask(anchor.segments, keys_BM, anchor.positions)
      else:
        visible_BL = visible_tokens(
          joined.visibility,
          anchor.tokens.shape,
          first_slot=0 if index is None else index,
        )
        mask = cross_mask(visible_BL, anchor.segments, keys_BM)
      for connection in joined.connections:
        cross = _bound(params, spec, name, connection)
        kv = heard["cross"][connection.name]
        arriving.setdefault(connection.anchor, []).append(
          ((name, connection), cross, kv, mask)
        )

  with jax.named_scope("anchor"):
    run, x, kv_B = _start(
      params["anchor"],
      spec.anchor,
      anchor,
      cache and cache["anchor"],
      index,
      lengths and lengths.get("anchor"),
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
