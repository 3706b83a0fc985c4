"""The two jitted programs of generation: reading prompts, and continuing them.

`start` reads a batch into the caches of all models; `advance` continues it in
a loop that stays on the device.

B rows, S stop tokens, T new tokens, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition import cross_attention, forward
from calm_jax.composition.connections import Composition
from calm_jax.core.batch import Batch, Sequence
from calm_jax.generation.sampling import Sampler
from calm_jax.models import cache as cache_lib
from calm_jax.models import decoder

Array = jax.Array


class DecodeState(NamedTuple):
  """KV caches, last token and random key of each row of a batch."""

  cache: dict  # of `forward.empty_cache`
  position_B: Array  # of the newest token
  slot: Array  # int32 [], the anchor's that the newest token is written to
  # By model [B], the longest that each row can become, prompt included; rotary
  # scalings that depend on the length take it for the text's. Models with other
  # tokenizers are not there.
  lengths: dict[str, Array]
  logits_BV: Array  # float32, that `token_B` was picked from
  token_B: Array  # the newest token of each row, not read yet
  keys_B: Array  # the random key of each row
  seen_BV: Array | None  # tokens so far; None without a repetition penalty
  done_B: Array  # whether a stop token was picked


def prepare(params: dict) -> dict:
  """The tree as decoding reads it fastest; nothing large is copied."""
  return change_models(cross_attention.fold(params), decoder.unstack)


def change_models(params: dict, change: Callable[[dict], dict]) -> dict:
  """The tree with the parameters of each frozen model changed."""
  models = {"anchor": change(params["anchor"])}
  if "augmenting" in params:
    models["augmenting"] = {
      name: change(model) for name, model in params["augmenting"].items()
    }
  return params | models


def _pick(
  sampler: Sampler,
  stop_S: Array,
  logits_BV: Array,
  keys_B: Array,
  seen_BV: Array | None,
  done_B: Array,
) -> dict[str, Any]:
  """The next token of each row, as the fields of `DecodeState` that change."""
  draw_B = None
  if sampler.temperature > 0:
    keys_B, draw_B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
  token_B = sampler(draw_B, logits_BV, seen_BV)
  if seen_BV is not None:
    seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
  return {
    "logits_BV": logits_BV,
    "token_B": token_B,
    "keys_B": keys_B,
    "seen_BV": seen_BV,
    "done_B": done_B | (token_B[:, None] == stop_S).any(-1),
  }


@functools.partial(jax.jit, static_argnames=("spec", "slots", "sampler"))
def start(
  params: dict,
  spec: Composition,
  batch: Batch,
  seeds_B: Array,
  stop_S: Array,
  lengths: dict[str, Array],
  *,
  slots: tuple[tuple[str, int], ...],
  sampler: Sampler,
) -> DecodeState:
  """Reads the prompts and picks the first token of each row.

  Args:
    params: from `prepare`; of the models in `spec`.
    batch: from `batching.lay_out`.
    seeds_B: int32, of the random key of each row.
    stop_S: token ids that end a row.
    lengths: see `DecodeState`.
    slots: (model, slots of its cache), for all models.
    sampler: how the next token is picked.
  """
  B, P = batch.anchor.tokens.shape
  keys_B = jax.vmap(jax.random.key)(seeds_B)
  stacked = not isinstance(params["anchor"]["layers"], tuple)
  cache = forward.empty_cache(spec, B, dict(slots), stacked)
  with jax.named_scope("prefill"):
    x_BLD, cache = forward.states(
      params, spec, batch, cache, jnp.int32(0), lengths
    )
    logits_BV = forward.logits(params, spec, x_BLD[:, -1:])[:, 0]
  is_real_BL = batch.anchor.segments > 0
  seen_BV = None
  if sampler.repetition_penalty != 1:
    rows_B1 = jnp.arange(B)[:, None]
    seen_BV = jnp.zeros(logits_BV.shape, bool)
    seen_BV = seen_BV.at[rows_B1, batch.anchor.tokens].max(is_real_BL)
  done_B = ~is_real_BL.any(-1)
  return DecodeState(
    cache=cache,
    position_B=batch.anchor.positions[:, -1] + 1,
    slot=jnp.int32(P),
    lengths=lengths,
    **_pick(sampler, stop_S, logits_BV, keys_B, seen_BV, done_B),
  )


def _step(
  params: dict,
  spec: Composition,
  state: DecodeState,
  stop_S: Array,
  along: tuple[str, ...],
  sampler: Sampler,
) -> DecodeState:
  """Reads the newest token of each row and picks the next."""
  B = len(state.token_B)
  segments_B1 = jnp.ones((B, 1), jnp.int32)
  token = Sequence(
    state.token_B[:, None], segments_B1, state.position_B[:, None]
  )
  nothing = Sequence(*(jnp.zeros((B, 0), jnp.int32) for _ in token))
  others = [name for name, _ in spec.augmenting if name not in along]
  batch = Batch(token, dict.fromkeys(others, nothing), {})
  x_BLD, cache = forward.states(
    params, spec, batch, state.cache, state.slot, state.lengths
  )
  logits_BV = forward.logits(params, spec, x_BLD)[:, 0]
  picked = _pick(
    sampler, stop_S, logits_BV, state.keys_B, state.seen_BV, state.done_B
  )
  return state._replace(
    cache=cache, position_B=state.position_B + 1, slot=state.slot + 1, **picked
  )


@functools.partial(
  jax.jit,
  static_argnames=("spec", "along", "sampler", "size"),
  donate_argnames="state",
)
def advance(
  params: dict,
  spec: Composition,
  state: DecodeState,
  stop_S: Array,
  steps: Array,
  *,
  along: tuple[str, ...],
  sampler: Sampler,
  size: int,
) -> tuple[DecodeState, Array]:
  """Reads the newest tokens and picks the next, again and again.

  Args:
    params, spec, stop_S, sampler: as for `start`.
    state: is donated.
    steps: int32 [], at most `size`; fewer are made if all rows are done.
    along: augmenting models that read the anchor's tokens on the device.
    size: columns of the result.

  Returns:
    The state, and the tokens picked, int32 [B, size]; -1 from a stop token on.
  """

  def go_on(carry):
    i, state, _ = carry
    return (i < steps) & ~state.done_B.all()

  def body(carry):
    i, state, out_BT = carry
    state = _step(params, spec, state, stop_S, along, sampler)
    column_B = jnp.where(state.done_B, -1, state.token_B)
    return i + 1, state, out_BT.at[:, i].set(column_B)

  first = state.slot
  cache = _change_caches(
    state.cache, along, lambda c: cache_lib.begin(c, size, first)
  )
  out_BT = jnp.full((len(state.token_B), size), -1, jnp.int32)
  with jax.named_scope("decode"):
    _, state, out_BT = jax.lax.while_loop(
      go_on, body, (jnp.int32(0), state._replace(cache=cache), out_BT)
    )
  cache = _change_caches(state.cache, along, cache_lib.settle)
  return state._replace(cache=cache), out_BT


def _change_caches(
  cache: dict, along: tuple[str, ...], change: Callable[[dict], dict]
) -> dict:
  """Changes the caches of the models that read the anchor's tokens."""

  def model(kept):
    layers = kept["layers"]
    if isinstance(layers, tuple):
      return kept | {"layers": tuple(map(change, layers))}
    return kept | {"layers": change(layers)}

  new = {"anchor": model(cache["anchor"])}
  new |= {kind: dict(cache[kind]) for kind in ("augmenting", "cross")}
  for name in along:
    new["augmenting"][name] = model(cache["augmenting"][name])
    new["cross"][name] = {c: change(x) for c, x in cache["cross"][name].items()}
  return new
