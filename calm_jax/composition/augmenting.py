"""An augmenting model's pass: from tokens to each connection's keys and values.

B batch, L length, M augmenting length, S slots of a cache.
"""

from collections.abc import Callable, Iterable

import jax

from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Composition
from calm_jax.composition.controls import controlled, replaced
from calm_jax.core.batch import Control, Sequence
from calm_jax.models import cache as cache_lib
from calm_jax.models import decoder, masks
from calm_jax.models.attention import SegmentMask
from calm_jax.models.config import ModelConfig

Array = jax.Array


def run(
  params: dict,
  config: ModelConfig,
  sequence: Sequence,
  cache: dict | None,
  index: Array | None,
  lengths_B: Array | None,
  layers: Iterable[int],
  tap: Callable[[int, Array], Array],
) -> tuple[Array, dict]:
  """Runs a decoder, whose keys go to slots index .. of a cache.

  After each of `layers`, which ascend from 1, `tap(layer, states [B, L, D])`
  gives the states to go on with; the last of them ends the run.

  Returns:
    The last states, and {"segments": [B, S] of the keys, and with a cache
    "layers"}.
  """
  segments, layer_cache = sequence.segments, None
  if cache is not None:
    assert index is not None
    layer_cache, old = cache["layers"], cache["segments"]
    segments = jax.lax.dynamic_update_slice(old, segments, (0, index))
  if cache is None and config.compute.reads_segments:
    mask = SegmentMask(segments, segments, sequence.positions)
  else:
    first_slot = 0 if index is None else index
    mask = masks.self_attention_mask(sequence.segments, segments, first_slot)
  positions = sequence.positions
  context = masks.make_context(config, positions, mask, index, lengths_B)
  x = decoder.embed(params, config, sequence.tokens, positions)
  done = 0
  for layer in layers:
    x, layer_cache = decoder.run_layers(
      params, config, x, context, done, layer, layer_cache
    )
    x, done = tap(layer, x), layer
  kept = {"segments": segments}
  return x, kept if cache is None else kept | {"layers": layer_cache}


def keys_values(
  params: dict,
  spec: Composition,
  name: str,
  sequence: Sequence,
  cache: dict | None = None,
  index: Array | None = None,
  lengths_B: Array | None = None,
  control: Control | None = None,
) -> dict:
  """Runs an augmenting model up to its last tapped layer, and computes each
  connection's keys and values.

  Args:
    params, spec, cache, index, lengths_B: as for `forward.states`.
    name: of the augmenting model, which reads `sequence` [B, M]; with M = 0
      its part of the cache is returned.
    control: changes the states that keys and values are made of.

  Returns:
    {"augmenting": its part of the cache as of `run`, "cross": {connection:
    {"key", "value"}}}.
  """
  joined, old = dict(spec.augmenting)[name], None
  if cache is not None:
    old = {kind: cache[kind][name] for kind in ("augmenting", "cross")}
    if not sequence.tokens.shape[1]:
      return old
  tapped = {}

  def keep(layer, h_BME):
    tapped[layer] = h_BME
    return h_BME

  _, kept = run(
    params["augmenting"][name],
    joined.config,
    sequence,
    None if old is None else old["augmenting"],
    index,
    lengths_B,
    sorted({c.augmenting for c in joined.connections}),
    keep,
  )
  cross = {}
  for connection in joined.connections:
    layer = connection.augmenting
    attention = cross_attention.bound(params, spec, name, connection)
    positions = sequence.positions
    h_BME = controlled(joined, tapped[layer], positions, layer)
    if control is not None:
      h_BME, positions = replaced(control, h_BME, positions, layer)
    made = attention.keys_values(h_BME, positions)
    if old is not None and index is not None:
      made = cache_lib.extend(old["cross"][connection.name], made, 0, index)
    cross[connection.name] = made
  return {"augmenting": kept, "cross": cross}
