"""Rows that enter and leave a batch while it is decoded, on the device.

All rows of a `DecodeState` write the same slot of a model's cache at each step.
A row that enters is read by `decode_steps.start` first, and its slots are then
put right before that slot; what lies before them is padding. The slot can be
moved, with everything that was written, since attention goes by segments and
order, and positions by the tokens of a row: no row's tokens depend on it.
Models with tokens of their own have slots of their own.

B rows, R rows that enter, S slots, V vocabulary.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import forward
from calm_jax.composition.connections import Composition
from calm_jax.generation.decode_steps import DecodeState
from calm_jax.generation.sampling import GREEDY, RowSampler
from calm_jax.models.layers import at_least_float32

Array = jax.Array


def empty(
  params: dict,
  spec: Composition,
  rows: int,
  slot: int,
  slots: dict[str, int],
  own: Collection[str],
  stops: int,
  allowed_V: np.ndarray | None,
) -> DecodeState:
  """Makes a state of rows that are all free.

  Args:
    params: from `inference.prepare`; of the models in `spec`.
    rows, stops: how many rows there are, and stop tokens a row.
    slot: the anchor's that is written next.
    slots: of the cache of each model, the anchor's by "anchor".
    own: the augmenting models that read tokens of their own.
    allowed_V: of `batching.allowed_ids`.
  """
  stacked = not isinstance(params["anchor"]["layers"], tuple)
  names = ["anchor", *(n for n, _ in spec.augmenting if n not in own)]
  dtype = at_least_float32(spec.anchor.compute.dtype)

  def zeros() -> Array:  # Arrays of their own, since a state is donated.
    return jnp.zeros(rows, jnp.int32)

  return DecodeState(
    cache=forward.empty_cache(spec, rows, slots, stacked),
    position_B=zeros(),
    slot=jnp.int32(slot),
    lengths={name: zeros() for name in names},
    stop_S=jnp.full((rows, stops), -1, jnp.int32),
    allowed_V=None if allowed_V is None else jnp.asarray(allowed_V),
    logits_BV=jnp.zeros((rows, spec.anchor.vocab_size), dtype),
    token_B=zeros(),
    keys_B=jax.vmap(jax.random.key)(np.zeros(rows, np.uint32)),
    seen_BV=None,
    done_B=jnp.ones(rows, bool),
    control=None,
    by_row=RowSampler(*map(jnp.asarray, RowSampler.of([GREEDY] * rows))),
  )


@functools.partial(jax.jit, static_argnames=("names", "slots"))
def move(
  cache: dict, by: Array, slot: Array, *, names: tuple[str, ...], slots: int
) -> dict:
  """Moves all rows of the models `names` by so many slots, up or down.

  It takes a copy of the caches.

  Args:
    cache: of `forward.empty_cache`.
    by: int32 [], no more than what lies free before all rows' tokens.
    slot: int32 [], where they end then.
    slots: of their caches from then on.
  """

  def moved(x: Array) -> Array:
    axis = _slot_axis(x)
    spare = [(0, 0)] * x.ndim
    spare[axis] = 0, max(0, slots - x.shape[axis])
    rolled = jnp.roll(jnp.pad(x, spare), by, axis)
    rolled = jax.lax.slice_in_dim(rolled, 0, slots, axis=axis)
    if x.ndim > 2:
      return rolled
    # Segments that came around from the other end are no row's.
    return jnp.where(jnp.arange(slots) < slot, rolled, 0)

  return _by_model(cache, lambda n, x: moved(x) if n in names else x)


def _by_model(cache: dict, change: Callable[..., Array], *others: dict) -> dict:
  """Applies `change(model, leaf, leaves of others)` to the leaves of caches."""

  def changed(name: str, *parts) -> dict:
    return jax.tree.map(functools.partial(change, name), *parts)

  caches = cache, *others
  new = {"anchor": changed("anchor", *(c["anchor"] for c in caches))}
  for kind in ("augmenting", "cross"):
    new[kind] = {
      n: changed(n, *(c[kind][n] for c in caches)) for n in cache[kind]
    }
  return new


def _slot_axis(x: Array) -> int:
  """The axis of slots: of segments [B, S], or keys and values [.., S, H]."""
  return 1 if x.ndim == 2 else 3


@functools.partial(jax.jit, donate_argnames="state")
def enter(
  state: DecodeState, new: DecodeState, rows_R: Array, ends: dict[str, Array]
) -> DecodeState:
  """Gives rows of a state to those of another, which leave nothing behind.

  Args:
    state: is donated.
    new: from `decode_steps.start`, whose caches are full; with as many stop
      tokens a row, a `RowSampler`, and no control or penalty.
    rows_R: int32, the row that each row of `new` takes; B for a spare one.
    ends: by model, the next slot of its cache in `state`, which is no less than
      the slots of `new`.
  """

  def put(old: Array, given: Array) -> Array:
    return old.at[rows_R].set(given, mode="drop")

  def put_cache(name: str, old: Array, given: Array) -> Array:
    axis = _slot_axis(old)
    shape = list(given.shape)
    shape[axis] = old.shape[axis]
    at: list[Any] = [0] * old.ndim
    at[axis] = ends[name] - given.shape[axis]
    block = jax.lax.dynamic_update_slice(jnp.zeros(shape, old.dtype), given, at)
    if axis == 1:
      return put(old, block)
    return old.at[:, rows_R].set(block, mode="drop")

  keys_B = put(*map(jax.random.key_data, (state.keys_B, new.keys_B)))
  fields = (
    *("position_B", "lengths", "stop_S", "logits_BV", "token_B"),
    *("done_B", "by_row"),
  )
  changed = {
    name: jax.tree.map(put, getattr(state, name), getattr(new, name))
    for name in fields
  }
  return state._replace(
    cache=_by_model(state.cache, put_cache, new.cache),
    keys_B=jax.random.wrap_key_data(keys_B),
    **changed,
  )
