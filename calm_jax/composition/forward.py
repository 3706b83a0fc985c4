"""The composition of frozen models (CALM, §3.1), as pure functions.

    params = {"anchor": {...},
              "augmenting": {name: {...}},
              "composition": {name: {connection: {...}}}}

B batch, L anchor length, M augmenting length, D anchor width, V vocabulary,
N heads, S slots of a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition import augmenting, cross_attention, visibility
from calm_jax.composition.connections import Composition
from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError
from calm_jax.models import cache as cache_lib
from calm_jax.models import decoder
from calm_jax.models.attention import SegmentMask

Array = jax.Array


def empty_cache(
  spec: Composition, batch: int, slots: int | dict[str, int], stacked=True
) -> dict:
  """The decoding cache of all models, as a plain tree.

  {"anchor": {"layers": of `decoder.empty_cache`, "segments": [B, S]},
   "augmenting": {name: the same},
   "cross": {name: {connection: {"key", "value"}}}}

  It has `batch` rows and, for all models or by "anchor" and augmenting names,
  `slots`; it is not `stacked` for parameters of `decoder.unstack`.
  """
  if isinstance(slots, int):
    slots = dict.fromkeys(["anchor", *dict(spec.augmenting)], slots)
  heads, dtype = spec.anchor.num_heads, spec.anchor.compute.dtype
  width = spec.anchor.width // heads

  def model(name, config):
    return {
      "layers": decoder.empty_cache(config, batch, slots[name], stacked),
      "segments": jnp.zeros((batch, slots[name]), jnp.int32),
    }

  def cross(name):
    return cache_lib.empty(1, batch, heads, slots[name], width, dtype)

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
  """A connection's term in the anchor's residual stream, without its query."""

  attention: cross_attention.CrossAttention
  keys_values: dict
  mask: Array | SegmentMask


def _read(params, spec, name, batch, cache, index, lengths) -> dict:
  """One model's keys and values; the cached ones if it reads no new token."""
  sequence, old = batch.augmenting.get(name, batch.anchor), None
  if cache is not None:
    old = {kind: cache[kind][name] for kind in ("augmenting", "cross")}
    if not sequence.tokens.shape[1]:
      return old
  return augmenting.keys_values(
    params, spec, name, sequence, old, index, lengths.get(name)
  )


def _mask(spec, name, batch, keys_BM, index, kernels) -> Array | SegmentMask:
  """The mask of one model's cross-attentions, for the kernel that takes it."""
  kind, anchor = dict(spec.augmenting)[name].visibility, batch.anchor
  reads_anchor = name not in batch.augmenting and name not in batch.visible
  if kernels and kind == "causal" and reads_anchor:
    return SegmentMask(anchor.segments, keys_BM, anchor.positions)
  first_slot = 0 if index is None else index
  counts_BL = visibility.visible_counts(kind, batch, name, first_slot)
  return visibility.attention_mask(counts_BL, anchor.segments, keys_BM)


def _run(params, spec, batch, cache, index, lengths, kernels):
  """Hidden states [B, L, D], the updated cache, and the contributions with the
  states that query them, in the order of `spec.connections()`."""
  lengths = lengths or {}
  new: dict[str, dict] = {"augmenting": {}, "cross": {}}
  by_layer: dict[int, list[_Contribution]] = {}
  with jax.named_scope("augmenting"):
    for name, joined in spec.augmenting:
      read = _read(params, spec, name, batch, cache, index, lengths)
      for kind, kept in read.items():
        new[kind][name] = kept
      keys_BM = read["augmenting"]["segments"]
      mask = _mask(spec, name, batch, keys_BM, index, kernels)
      for connection in joined.connections:
        attention = cross_attention.bound(params, spec, name, connection)
        keys_values = read["cross"][connection.name]
        by_layer.setdefault(connection.anchor, []).append(
          _Contribution(attention, keys_values, mask)
        )
  with jax.named_scope("anchor"):
    anchor, x, layers = augmenting.embed(
      params["anchor"],
      spec.anchor,
      batch.anchor,
      None if cache is None else cache["anchor"],
      index,
      lengths.get("anchor"),
    )
    queried, done = [], 0
    for layer in sorted(by_layer):
      x, layers = anchor.layers(x, layers, done, layer)
      done = layer
      queried += [(contribution, x) for contribution in by_layer[layer]]
      # All contributions to a layer come from the same hidden state.
      x = x + sum(
        c.attention.attend(x, c.keys_values, c.mask) for c in by_layer[layer]
      )
    if done < spec.anchor.num_layers:
      x, layers = anchor.layers(x, layers, done, spec.anchor.num_layers)
  new["anchor"] = anchor.cache(layers)
  return x, None if cache is None else new, queried


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
      new. Only models without an entry in `augmenting` and `visible` can be
      attended to by the splash kernel.
    cache: from `empty_cache`, or None to compute the batch at once.
    index: int32 [], the slot of the first token; with a cache only.
    lengths: with a cache, int32 [B] by "anchor" and the augmenting names, the
      final length of each row, prompt and new tokens; see `masks.make_context`.

  Returns:
    Hidden states after the last layer [B, L, D], and the updated cache or None.

  Raises:
    InputError: what `visibility.visible_counts` raises.
  """
  kernels = cache is None and spec.anchor.compute.attention == "splash"
  return _run(params, spec, batch, cache, index, lengths, kernels)[:2]


def attention_weights(
  params: dict, spec: Composition, batch: Batch
) -> list[Array]:
  """Attention weights of each connection for pictures, float32 [B, N, L, M]."""
  _, _, queried = _run(params, spec, batch, None, None, None, kernels=False)
  return [
    c.attention.probabilities(x_BLD, c.keys_values, c.mask)
    for c, x_BLD in queried
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
  """The spec and the tree of "composed", "anchor" or "augmenting/<name>".

  Raises InputError if there is no such part.
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
