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

from calm_jax.composition import augmenting, cross_attention, visibility
from calm_jax.composition.connections import Composition
from calm_jax.composition.cross_attention import CrossAttention
from calm_jax.core.batch import Batch, Sequence
from calm_jax.core.errors import InputError
from calm_jax.models import cache as cache_lib
from calm_jax.models import decoder
from calm_jax.models.attention import SegmentMask

Array = jax.Array


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

  def model(name, config):
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
    "anchor": model("anchor", spec.anchor),
    "augmenting": {n: model(n, a.config) for n, a in spec.augmenting},
    "cross": {
      n: {c.name: cross(n) for c in a.connections} for n, a in spec.augmenting
    },
  }
  place = spec.anchor.compute.place
  return cache if place is None else place.cache(cache)


class _Contribution(NamedTuple):
  """One connection's term in the anchor's residual stream."""

  attention: CrossAttention
  keys_values: dict
  mask: Array | SegmentMask

  def __call__(self, x_BLD: Array) -> Array:
    return self.attention.attend(x_BLD, self.keys_values, self.mask)

  def probabilities(self, x_BLD: Array) -> Array:
    return self.attention.probabilities(x_BLD, self.keys_values, self.mask)


def _read_augmenting(
  params: dict,
  spec: Composition,
  batch: Batch,
  cache: dict | None,
  index: Array | None,
  lengths: dict[str, Array],
) -> dict[str, dict]:
  """`augmenting.keys_values` of each augmenting model, by name."""
  read = {}
  for name, _ in spec.augmenting:
    sequence = batch.augmenting.get(name, batch.anchor)
    old = None
    if cache is not None:
      old = {kind: cache[kind][name] for kind in ("augmenting", "cross")}
    if old is not None and not sequence.tokens.shape[1]:
      read[name] = old
    else:
      read[name] = augmenting.keys_values(
        params, spec, name, sequence, old, index, lengths.get(name)
      )
  return read


def _contributions(
  params: dict,
  spec: Composition,
  batch: Batch,
  read: dict[str, dict],
  index: Array | None,
  kernels: bool,
) -> dict[int, list[_Contribution]]:
  """The contributions of all connections, by the anchor's layer.

  Args:
    params, spec, batch, index: as for `states`.
    read: of `_read_augmenting`.
    kernels: whether the mask may be a `SegmentMask`, for the splash kernel.
  """
  by_layer: dict[int, list[_Contribution]] = {}
  kernels = kernels and spec.anchor.compute.attention == "splash"
  for name, joined in spec.augmenting:
    keys_BM = read[name]["augmenting"]["segments"]
    own_rows = name in batch.augmenting or name in batch.visible
    if kernels and joined.visibility == "causal" and not own_rows:
      mask = SegmentMask(batch.anchor.segments, keys_BM, batch.anchor.positions)
    else:
      visible_BL = visibility.visible_counts(
        joined.visibility, batch, name, 0 if index is None else index
      )
      mask = visibility.attention_mask(
        visible_BL, batch.anchor.segments, keys_BM
      )
    for connection in joined.connections:
      contribution = _Contribution(
        cross_attention.bound(params, spec, name, connection),
        read[name]["cross"][connection.name],
        mask,
      )
      by_layer.setdefault(connection.anchor, []).append(contribution)
  return by_layer


def _anchor_layers(
  params: dict,
  spec: Composition,
  sequence: Sequence,
  contributions: dict[int, list[_Contribution]],
  cache: dict | None,
  index: Array | None,
  lengths_B: Array | None,
) -> tuple[Array, dict | None, dict[int, Array]]:
  """Runs the anchor, with the contributions added after their layers.

  Returns:
    (hidden states after the last layer [B, L, D], the anchor's cache, the
    hidden states [B, L, D] that query the connections, by layer).
  """
  anchor, x, layers = augmenting.embed(
    params["anchor"], spec.anchor, sequence, cache, index, lengths_B
  )
  queries, done = {}, 0
  for layer in sorted(contributions):
    x, layers = anchor.layers(x, layers, done, layer)
    queries[layer], done = x, layer
    # All contributions to a layer come from the same hidden state.
    x = x + sum(contribution(x) for contribution in contributions[layer])
  if done < spec.anchor.num_layers:
    x, layers = anchor.layers(x, layers, done, spec.anchor.num_layers)
  return x, anchor.cache(layers), queries


def states(
  params: dict,
  spec: Composition,
  batch: Batch,
  cache: dict | None = None,
  index: Array | None = None,
  lengths: dict[str, Array] | None = None,
) -> tuple[Array, dict | None]:
  """The composed layers: H'_Bj = H_Bj + f_cross(f_proj(H_Ai), H_Bj).

  Args:
    params: the whole tree.
    spec: what is composed.
    batch: what the models read; see `visibility` for what they may see of it.
      With a cache, an augmenting model whose rows have no slot reads nothing
      new. A model with an entry neither in `augmenting` nor in `visible` may
      be attended to by the splash kernel.
    cache: from `empty_cache`, or None to compute the batch at once.
    index: int32 [], the slot of the first token; with a cache only.
    lengths: with a cache, int32 [B] by "anchor" and the augmenting names, how
      long each row will have become, for rotary scalings that depend on it;
      see `masks.make_context`.

  Returns:
    Hidden states after the last layer [B, L, D], and the updated cache (None
    without one).

  Raises:
    InputError: what `visibility.visible_counts` raises.
  """
  lengths = lengths or {}
  with jax.named_scope("augmenting"):
    read = _read_augmenting(params, spec, batch, cache, index, lengths)
    contributions = _contributions(
      params, spec, batch, read, index, kernels=cache is None
    )
  with jax.named_scope("anchor"):
    x_BLD, anchor_cache, _ = _anchor_layers(
      params,
      spec,
      batch.anchor,
      contributions,
      None if cache is None else cache["anchor"],
      index,
      lengths.get("anchor"),
    )
  if cache is None:
    return x_BLD, None
  new = {
    kind: {name: kept[kind] for name, kept in read.items()}
    for kind in ("augmenting", "cross")
  }
  return x_BLD, new | {"anchor": anchor_cache}


def attention_weights(
  params: dict, spec: Composition, batch: Batch
) -> list[Array]:
  """Attention weights of each connection, for pictures.

  Args:
    params, spec, batch: as for `states`.

  Returns:
    Probabilities float32 [B, N, L, M], in the order of `spec.connections()`.
  """
  read = _read_augmenting(params, spec, batch, None, None, {})
  contributions = _contributions(params, spec, batch, read, None, kernels=False)
  _, _, queries = _anchor_layers(
    params, spec, batch.anchor, contributions, None, None, None
  )
  return [
    contribution.probabilities(queries[layer])
    for layer in queries
    for contribution in contributions[layer]
  ]


def logits(params: dict, spec: Composition, x_BLD: Array) -> Array:
  """The anchor's head on the composed states, float32 [B, L, V]."""
  return decoder.logits(params["anchor"], spec.anchor, x_BLD)


def forward(
  params: dict, spec: Composition, batch: Batch, **options
) -> tuple[Array, dict | None]:
  """`states`, then `logits`: returns (logits [B, L, V], cache)."""
  x_BLD, cache = states(params, spec, batch, **options)
  return logits(params, spec, x_BLD), cache


def submodel(
  spec: Composition, params: dict, part: str
) -> tuple[Composition, dict]:
  """One part of a composition as a model by itself, to be run by `states`.

  Args:
    spec: the composition.
    params: its tree.
    part: "composed", "anchor" or "augmenting/<name>".

  Returns:
    (spec, params) of that part.

  Raises:
    InputError: there is no such part.
  """
  if part == "composed":
    return spec, params
  if part == "anchor":
    return Composition(spec.anchor), {"anchor": params["anchor"]}
  kind, _, name = part.partition("/")
  parts = dict(spec.augmenting)
  if kind != "augmenting" or name not in parts:
    raise InputError(
      f"no model {part!r}; there are 'composed', 'anchor' and "
      f"{[f'augmenting/{n}' for n in parts]}"
    )
  return Composition(parts[name].config), {"anchor": params["augmenting"][name]}
