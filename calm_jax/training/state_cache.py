"""Training without the augmenting models: they run once over the data (§3.1).

They are frozen, and what they make of an example is the same in each epoch. A
pass before the first step computes the states of the layers that connections
tap and keeps them on disk (`data.states`); every batch then brings its own.

B batch, M augmenting length, E augmenting width, S width of a scale's part.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from calm_jax.composition import forward
from calm_jax.composition.connections import Augmenting, Composition
from calm_jax.core import trees
from calm_jax.core.errors import InputError, StorageError
from calm_jax.parallel import processes
from calm_jax.parallel.sharding import Layout
from calm_jax.training.metrics import Progress
from calm_jax.training.state_store import StateStore, locked, spans
from calm_jax.training.watchdog import Watchdog

Array = jax.Array

KINDS = ("float32", "bfloat16", "int8")
# What shares a scale: an outlier costs the precision of its neighbours only.
_SCALED_WIDTH = 64


def encode(kind: str, h_BME: Array) -> dict[str, Array]:
  """States as they are stored.

  Args:
    kind: one of KINDS.
    h_BME: the states of a layer.

  Returns:
    {"value": [B, M, E]}; for "int8" {"scale": bfloat16 [B, M, E / S]} too, so
    that a value is wrong by at most half its scale, which is 1/127 of the
    largest of its S neighbours.
  """
  if kind != "int8":
    return {"value": h_BME.astype(kind)}
  parts = h_BME.astype(jnp.float32).reshape(
    *h_BME.shape[:-1], -1, _scaled_width(h_BME.shape[-1])
  )
  scale = (jnp.abs(parts).max(-1, keepdims=True) / 127).astype(jnp.bfloat16)
  scale = jnp.where(scale == 0, 1, scale)
  value = jnp.clip(jnp.round(parts / scale.astype(jnp.float32)), -127, 127)
  value = value.astype(jnp.int8).reshape(h_BME.shape)
  return {"value": value, "scale": scale[..., 0]}


def decode(stored: Mapping[str, Array], dtype: str) -> Array:
  """The inverse of `encode`, [B, M, E] in a dtype."""
  value = stored["value"]
  if "scale" not in stored:
    return value.astype(dtype)
  parts = value.reshape(*stored["scale"].shape, -1).astype(jnp.float32)
  parts = parts * stored["scale"][..., None].astype(jnp.float32)
  return parts.reshape(value.shape).astype(dtype)


def _scaled_width(width: int) -> int:
  return math.gcd(width, _SCALED_WIDTH)


def taps(
  spec: Composition, batch: Mapping[str, Array]
) -> dict[str, dict[int, Array]]:
  """The states that a batch brings, by model and layer; see `CachedSource`."""
  found: dict[str, dict[int, Array]] = {}
  for name, joined in spec.augmenting:
    part = f"augmenting/{name}/states/"
    stored: dict[int, dict[str, Array]] = {}
    for key, array in batch.items():
      if key.startswith(part):
        layer, kind = key.removeprefix(part).split("/")
        stored.setdefault(int(layer), {})[kind] = array
    if stored:
      found[name] = {
        layer: decode(s, joined.config.compute.dtype)
        for layer, s in stored.items()
      }
  return found


class CachedSource:
  """A source whose batches bring the states of the augmenting models.

  To a batch are added arrays [B, M, width] of the names
  "augmenting/<name>/states/<layer>/<part>", with the parts of `encode`.
  """

  def __init__(self, source, stores: Mapping[str, StateStore]):
    self._source, self._stores = source, stores

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    batch = self._source[index]
    new = {}
    for name, store in self._stores.items():
      found = store.rows(*_sequence(batch, name).values())
      new |= {f"augmenting/{name}/states/{n}": x for n, x in found.items()}
    return batch | new

  def describe(self, index: int) -> str:
    return self._source.describe(index)

  @property
  def fingerprint(self) -> str:
    return self._source.fingerprint


def check(name: str, stage, source) -> None:
  """Raises InputError if a stage asks for a cache that cannot be."""
  if not stage.cache_states:
    return
  if stage.cache_states not in KINDS:
    raise InputError(
      f"stage {name!r}: cache_states={stage.cache_states!r} is none of {KINDS}"
    )
  if stage.model != "composed":
    raise InputError(
      f"stage {name!r}: cache_states is for a composition, and it trains "
      f"{stage.model!r}"
    )
  if not hasattr(source, "once"):
    raise InputError(
      f"stage {name!r}: cache_states is for data that come again, and these "
      "are made afresh for every batch; leave it empty"
    )


def check_frozen(name: str, stage, params: dict) -> None:
  """Raises InputError if a stage trains what it asks to be cached.

  Of `params`, the whole tree, only names are read.
  """
  trained, _ = trees.partition(params, trees.mask(params, stage.trainable))
  if stage.cache_states and "augmenting" in trained:
    raise InputError(
      f"stage {name!r}: cache_states is for frozen augmenting models, and it "
      f"trains {stage.trainable}"
    )


def cached(
  name: str,
  stage,
  spec: Composition,
  params: dict,
  source,
  directory: Path,
  frozen: Mapping[str, Mapping[str, str]],
  layout: Layout | None,
  watchdog: float = 0,
) -> CachedSource:
  """Computes the states that are not on disk yet, and reads the others.

  On several processes all call this together, and the first writes.

  Args:
    name: of the stage.
    stage: a `trainer.Stage` with `cache_states`.
    spec: the composition.
    params: its tree, placed.
    source: of the stage, with `once`; see `data.rows.TextSource`.
    directory: of the stage.
    frozen: "frozen" of `identity.describe`.
    layout: of all arrays.
    watchdog: seconds after which a batch counts as hung; 0 for never.

  Raises:
    InputError: the stage cannot have a cache, an augmenting model is trained,
      the folder holds the states of another model, is damaged, or too small.
  """
  check(name, stage, source)
  check_frozen(name, stage, params)
  batches = source.once(stage.steps, stage.batch_size // stage.accumulate)
  stores = {}
  for model, joined in spec.augmenting:
    folder = Path(stage.cache_folder or directory / "states") / model
    writes = jax.process_index() == 0
    with locked(folder) if writes else contextlib.nullcontext():
      _together("open")
      stores[model] = StateStore(
        folder,
        fields(stage.cache_states, joined),
        {
          "model": frozen[f"augmenting/{model}"]["sha256"],
          "config": repr(joined.config.with_compute(unroll=1)),
        },
        writes=writes,
      )
      _fill(
        model, joined, params["augmenting"][model], batches, stores[model],
        stage, layout, watchdog,
      )  # fmt: skip
      _together("close")
  return CachedSource(source, stores)


def _together(what: str) -> None:
  """Waits for the other processes."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"calm_jax states: {what}")


def fields(kind: str, joined: Augmenting) -> dict[str, tuple[str, int]]:
  """What is stored of a token: by "layer/part", dtype and width."""
  h_BME = jax.ShapeDtypeStruct((1, 1, joined.config.width), jnp.float32)
  parts = jax.eval_shape(lambda h: encode(kind, h), h_BME)
  return {
    f"{layer}/{part}": (x.dtype.name, x.shape[-1])
    for layer in sorted({c.augmenting for c in joined.connections})
    for part, x in parts.items()
  }


def _sequence(batch: Mapping[str, np.ndarray], name: str) -> dict:
  """What an augmenting model reads of a batch, [B, M] each."""
  part = f"augmenting/{name}/"
  if f"{part}tokens" not in batch:
    part = ""
  return {field: batch[part + field] for field in forward.Sequence._fields}


def _fill(
  model, joined, params, batches, store, stage, layout, watchdog
) -> None:
  """Adds the states of all examples that the store lacks."""
  missing: list[int] = []
  new: dict[bytes, int] = {}
  for index in range(len(batches)):
    found = spans(*_sequence(_read(batches, index), model).values())
    lacks = {s.key: s.length for s in found if s.key not in store}
    if lacks.keys() - new.keys():
      missing.append(index)
      new |= lacks
  tokens, size = sum(new.values()), store.record.itemsize
  often = stage.steps * stage.batch_size / (len(batches) * batches.batch_size)
  free = store.check_space(tokens)
  print(
    f"states of {model} as {stage.cache_states}, {size:,} bytes a token: "
    f"{tokens:,} tokens of {len(new):,} examples to compute, "
    f"{tokens * size:,} bytes in {store.folder} with {free:,} free; "
    f"a row is read {often:.1f} times",
    flush=True,
  )

  @jax.jit
  def run(params, sequence):
    found, _, _ = forward.tap(params, joined, forward.Sequence(**sequence))
    return {
      f"{layer}/{part}": x
      for layer, h_BME in found.items()
      for part, x in encode(stage.cache_states, h_BME).items()
    }

  with (
    Progress(
      len(missing), 0, f"states of {model}", active=jax.process_index() == 0
    ) as progress,
    Watchdog(watchdog) as watch,
  ):
    for count, index in enumerate(missing, start=1):
      watch.expect(f"states of {model}, batch {count}", compiles=count == 1)
      sequence = _sequence(_read(batches, index), model)
      values = processes.fetch(run(params, _placed(sequence, layout)))
      store.add(spans(*sequence.values()), values)
      progress.update(count)
  store.flush()


def _read(batches, index: int) -> dict[str, np.ndarray]:
  try:
    return batches[index]
  except OSError as error:
    raise StorageError(
      f"{batches.describe(index)} cannot be read: {error}; bring the file back "
      "and start again by the same command"
    ) from error


def _placed(sequence: dict, layout: Layout | None) -> dict:
  if layout is None:
    return sequence
  return layout.batch(sequence, len(sequence["tokens"]))
