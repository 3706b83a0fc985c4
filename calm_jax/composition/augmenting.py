"""An augmenting model's pass: from tokens to each connection's keys and values.

B batch, L length, M augmenting length, S slots of a cache.
"""

from typing import NamedTuple

import jax

from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Composition
from calm_jax.composition.controls import controlled
from calm_jax.core.batch import Sequence
from calm_jax.models import cache as cache_lib
from calm_jax.models import decoder, masks
from calm_jax.models.attention import SegmentMask
from calm_jax.models.config import ModelConfig

Array = jax.Array


class ModelPass(NamedTuple):
  """One model while it reads a sequence: what all of its layers need."""

  params: dict
  config: ModelConfig
  context: object  # of `masks.make_context`
  segments: Array  # of the keys, [B, S]

  def layers(self, x, cache, start, stop):
    """Runs the layers start .. stop - 1; hidden states and cache."""
    return decoder.run_layers(
      self.params, self.config, x, self.context, start, stop, cache
    )

  def cache(self, layers: dict | None) -> dict:
    """The model's part of the decoding cache; without one the segments only."""
    kept = {"segments": self.segments}
    return kept if layers is None else kept | {"layers": layers}


def embed(
  params: dict,
  config: ModelConfig,
  sequence: Sequence,
  cache: dict | None,
  index: Array | None,
  lengths_B: Array | None,
) -> tuple[ModelPass, Array, dict | None]:
  """The pass of a sequence, whose keys go to slots index .. of a cache, its
  embedding [B, L, width], and the cache of the layers."""
  segments, layers = sequence.segments, None
  if cache is not None:
    layers, old = cache["layers"], cache["segments"]
    segments = jax.lax.dynamic_update_slice(old, segments, (0, index))
  if cache is None and config.compute.attention == "splash":
    mask = SegmentMask(segments, segments, sequence.positions)
  else:
    first_slot = 0 if index is None else index
    mask = masks.self_attention_mask(sequence.segments, segments, first_slot)
  positions = sequence.positions
  context = masks.make_context(config, positions, mask, index, lengths_B)
  x = decoder.embed(params, config, sequence.tokens, positions)
  return ModelPass(params, config, context, segments), x, layers


def keys_values(
  params: dict,
  spec: Composition,
  name: str,
  sequence: Sequence,
  cache: dict | None = None,
  index: Array | None = None,
  lengths_B: Array | None = None,
) -> dict:
  """Runs an augmenting model up to its last tapped layer, and computes each
  connection's keys and values.

  Args:
    params, spec, index, lengths_B: as for `forward.states`.
    name: of the augmenting model, which reads `sequence` [B, M].
    cache: {"augmenting", "cross"} of this model, or None.

  Returns:
    {"augmenting": {"segments": [B, S] of the keys, and with a cache
    "layers"}, "cross": {connection: {"key", "value"}}}.
  """
  joined = dict(spec.augmenting)[name]
  model_params = params["augmenting"][name]
  old = None if cache is None else cache["augmenting"]
  model, x, layers = embed(
    model_params, joined.config, sequence, old, index, lengths_B
  )
  tapped, done = {}, 0
  for layer in sorted({c.augmenting for c in joined.connections}):
    x, layers = model.layers(x, layers, done, layer)
    tapped[layer], done = x, layer
  cross = {}
  for connection in joined.connections:
    layer = connection.augmenting
    attention = cross_attention.bound(params, spec, name, connection)
    h_BME = controlled(joined, tapped[layer], sequence.positions, layer)
    made = attention.keys_values(h_BME, sequence.positions)
    if cache is not None:
      made = cache_lib.extend(cache["cross"][connection.name], made, 0, index)
    cross[connection.name] = made
  return {"augmenting": model.cache(layers), "cross": cross}
