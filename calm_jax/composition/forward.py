"""The composition of frozen models (CALM, §3.1), as pure functions.

    params = {"anchor": {...},
              "augmenting": {name: {...}},
              "composition": {name: {connection: {...}}}}

B batch, L anchor length, M augmenting length, D anchor width, V vocabulary,
N heads, S slots of a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import augmenting, cross_attention, visibility
from calm_jax.composition.connections import Composition
from calm_jax.composition.cross_attention import CrossAttention
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
  heads, compute = spec.anchor.num_heads, spec.anchor.compute
  width = spec.anchor.width // heads

  def model(name, config):
    return {
      "layers": decoder.empty_cache(config, batch, slots[name], stacked),
      "segments": jnp.zeros((batch, slots[name]), jnp.int32),
    }

  cache: dict = {"anchor": model("anchor", spec.anchor)}
  cache |= {"augmenting": {}, "cross": {}}
  for name, joined in spec.augmenting:
    cache["augmenting"][name] = model(name, joined.config)
    shape = batch, heads, slots[name], width
    cache["cross"][name] = {
      c.name: cache_lib.empty(1, *shape, compute.dtype)
      for c in joined.connections
    }
  return cache if compute.place is None else compute.place.cache(cache)


def check(spec: Composition, batch: Batch) -> None:
  """Raises InputError for ids or positions that a model does not have.

  It does so too for packed rows, where the model's `Compute` says that there
  are none. On the device all of these would be read as others, without a word,
  so it is called where batches enter.
  """
  models = {"the anchor": (batch.anchor, spec.anchor)}
  for name, joined in spec.augmenting:
    sequence = batch.augmenting.get(name, batch.anchor)
    models[f"augmenting model {name!r}"] = sequence, joined.config
  for name, (sequence, config) in models.items():
    segments = sequence.segments
    is_packed = segments.max(initial=0) > 1 or (np.diff(segments) > 0).any()
    if is_packed and not config.compute.packed:
      raise InputError(
        f"rows of {name} hold several segments, or padding before one; its "
        "attention was chosen for rows of one segment each (packed=False)"
      )
    ranges = {
      "token ids": (sequence.tokens, config.vocab_size),
      "positions": (sequence.positions, config.max_length),
    }
    for what, (array, limit) in ranges.items():
      least, most = array.min(initial=0), array.max(initial=0)
      if not 0 <= least <= most < limit:
        raise InputError(
          f"{what} run from {least} to {most}; {name} has {limit} of them, 0 "
          f"to {limit - 1}"
        )


class _Term(NamedTuple):
  """A connection with the keys and values that its cross-attention reads."""

  attention: CrossAttention
  keys_values: dict[str, Array]
  mask: Array | SegmentMask
  gate: Array | None  # of a control: what the contribution is multiplied by

  def contribution(self, x_BLD: Array) -> Array:
    y_BLD = self.attention.attend(x_BLD, self.keys_values, self.mask)
    return y_BLD if self.gate is None else y_BLD * self.gate.astype(y_BLD.dtype)


def states(
  params: dict,
  spec: Composition,
  batch: Batch,
  cache: dict | None = None,
  index: Array | None = None,
  lengths: dict[str, Array] | None = None,
  weights: list[Array] | None = None,
) -> tuple[Array, Any]:
  """The composed layers: H'_Bj = H_Bj + f_cross(f_proj(H_Ai), H_Bj).

  Args:
    params, spec: the whole tree, and what is composed.
    batch: what the models read; see `visibility` for what they may see of it,
      and `controls` for its `control`.
      With a cache, an augmenting model whose rows have no slot reads nothing
      new. Only models without an entry in `augmenting` and `visible` can be
      attended to by the splash kernel.
    cache: from `empty_cache`, or None to compute the batch at once.
    index: int32 [], the slot of the first token; with a cache only.
    lengths: with a cache, int32 [B] by "anchor" and the augmenting names, the
      final length of each row, prompt and new tokens; see `masks.make_context`.
    weights: a list that the attention weights of each connection, in the order
      of `spec.connections()`, are added to, without the splash kernel.

  Returns:
    Hidden states after the last layer [B, L, D], and the updated cache or None.
  """
  lengths = lengths or {}
  plain = cache is None and weights is None and batch.control is None
  by_segments = plain and cross_attention.reads_segments(spec.anchor)
  with jax.named_scope("augmenting"):
    by_layer, new = _read_augmenting(
      params, spec, batch, cache, index, lengths, by_segments
    )

  def contribute(layer, x):
    terms = by_layer.get(layer, [])
    if weights is not None:
      weights.extend(
        t.attention.probabilities(x, t.keys_values, t.mask) for t in terms
      )
    if not terms:
      return x
    # All contributions to a layer come from the same hidden state.
    return x + sum(term.contribution(x) for term in terms)

  with jax.named_scope("anchor"):
    x, new["anchor"] = augmenting.run(
      params["anchor"],
      spec.anchor,
      batch.anchor,
      None if cache is None else cache["anchor"],
      index,
      lengths.get("anchor"),
      sorted({*by_layer, spec.anchor.num_layers}),
      contribute,
    )
  return x, None if cache is None else new


def _read_augmenting(
  params: dict,
  spec: Composition,
  batch: Batch,
  cache: dict | None,
  index: Array | None,
  lengths: dict[str, Array],
  by_segments: bool,
) -> tuple[dict[int, list[_Term]], dict[str, dict]]:
  """Runs the augmenting models: each anchor layer's terms, and a new cache."""
  by_layer: dict[int, list[_Term]] = {}
  new: dict[str, dict] = {"augmenting": {}, "cross": {}}
  control = batch.control
  for name, joined in spec.augmenting:
    sequence = batch.augmenting.get(name, batch.anchor)
    read = augmenting.keys_values(
      params, spec, name, sequence, cache, index, lengths.get(name), control
    )
    for kind, kept in read.items():
      new[kind][name] = kept
    segments = read["augmenting"]["segments"]
    if control is not None:
      segments = segments[control.rows_B]
    mask = visibility.attention_mask(
      joined.visibility, batch, name, segments, index, by_segments
    )
    for connection in joined.connections:
      attention = cross_attention.bound(params, spec, name, connection)
      keys_values = read["cross"][connection.name]
      gate = None if control is None else control.gates[name][connection.name]
      term = _Term(attention, keys_values, mask, gate)
      by_layer.setdefault(connection.anchor, []).append(term)
  return by_layer, new


def attention_weights(
  params: dict, spec: Composition, batch: Batch
) -> list[Array]:
  """Attention weights of each connection for pictures, float32 [B, N, L, M]."""
  weights: list[Array] = []
  states(params, spec, batch, weights=weights)
  return weights


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
  """The spec and the tree of "composed", "anchor" or "augmenting/<name>"."""
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
