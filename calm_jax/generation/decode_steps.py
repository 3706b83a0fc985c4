"""Generation: the part on the device, which is three jitted programs.

`start` reads a batch into the caches of all models; `advance` continues it in
a loop that stays on the device; `feed` reads further tokens into the cache of
an augmenting model with a tokenizer of its own.

B rows, S stop tokens, T new tokens, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import augmenting, forward, visibility
from calm_jax.composition.connections import Composition
from calm_jax.core.batch import Batch, Control, Sequence
from calm_jax.generation.sampling import RowSampler, Sampler
from calm_jax.models import cache as cache_lib
from calm_jax.models import joined

Array = jax.Array

_AUGMENTING = ("augmenting", "cross")  # kinds of caches, by the models' names


class DecodeState(NamedTuple):
  """KV caches, last token and random key of each row of a batch."""

  cache: dict  # of `forward.empty_cache`
  position_B: Array  # of the newest token
  slot: Array  # int32 [], the anchor's that the newest token is written to
  # By model [B], the longest that each row can become, prompt included; rotary
  # scalings that depend on the length take it for the text's. Models with other
  # tokenizers are not there.
  lengths: dict[str, Array]
  stop_S: Array  # the tokens that end a row, or [B, S] by row
  allowed_V: Array | None  # those that may be picked; None for all
  logits_BV: Array  # float32, that `token_B` was picked from
  token_B: Array  # the newest token of each row, not read yet
  keys_B: Array  # the random key of each row
  seen_BV: Array | None  # tokens so far; None without a repetition penalty
  done_B: Array | np.ndarray  # whether a stop token was picked
  control: Control | None  # the batch's
  by_row: RowSampler | None = None  # in place of one `Sampler` for all rows


class Tops(NamedTuple):
  """Log-probabilities in nats of T tokens a row, and of the likeliest ones."""

  chosen_BT: Array | np.ndarray  # float32, of the token that was picked
  ids_BTN: Array | np.ndarray  # int32, the likeliest first
  values_BTN: Array | np.ndarray  # float32


def _pick(state: DecodeState, sampler: Sampler | RowSampler) -> DecodeState:
  """Picks the next token of each row from the logits."""
  keys_B, seen_BV, draw_B = state.keys_B, state.seen_BV, None
  sampler = state.by_row or sampler
  if sampler.draws:
    keys_B, draw_B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
  logits_BV = state.logits_BV
  if state.allowed_V is not None:
    logits_BV = jnp.where(state.allowed_V, logits_BV, -jnp.inf)
  token_B = sampler(draw_B, logits_BV, seen_BV)
  if seen_BV is not None:
    seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
  is_stop_B = (token_B[:, None] == state.stop_S).any(-1)
  return state._replace(
    token_B=token_B,
    keys_B=keys_B,
    seen_BV=seen_BV,
    done_B=state.done_B | is_stop_B,
  )


@functools.partial(jax.jit, static_argnames=("spec", "slots", "sampler"))
def start(
  params: dict,
  spec: Composition,
  batch: Batch,
  seeds_B: Array,
  stop_S: Array,
  max_new_tokens: Array,
  allowed_V: Array | None = None,
  by_row: RowSampler | None = None,
  *,
  slots: tuple[tuple[str, int], ...],
  sampler: Sampler,
) -> DecodeState:
  """Reads the prompts and picks the first token of each row.

  Args:
    params: from `inference.prepare`; of the models in `spec`.
    batch: from `batching.batches`.
    seeds_B: a seed a row, uint32.
    stop_S, max_new_tokens: int32; the token ids that end a row. Both may be
      given by row, [B, S] and [B].
    allowed_V: of `batching.allowed_ids`.
    by_row: draws in place of `sampler`.
    slots: (model, slots of its cache), for all models.
  """
  B, P = batch.anchor.tokens.shape
  is_real_BL = batch.anchor.segments > 0
  longest_B = batch.anchor.segments.sum(axis=1) + max_new_tokens
  names = ["anchor", *(name for name, _ in spec.augmenting)]
  lengths = {n: longest_B for n in names if n not in batch.augmenting}
  stacked = not isinstance(params["anchor"]["layers"], tuple)
  cache = forward.empty_cache(spec, B, dict(slots), stacked)
  with jax.named_scope("prefill"):
    x_BLD, cache = forward.states(
      params, spec, batch, cache, jnp.int32(0), lengths
    )
    logits_BV = forward.logits(params, spec, x_BLD[:, -1:])[:, 0]
  seen_BV = None
  if sampler.repetition_penalty != 1:
    rows_B1 = jnp.arange(B)[:, None]
    seen_BV = jnp.zeros(logits_BV.shape, bool)
    seen_BV = seen_BV.at[rows_B1, batch.anchor.tokens].max(is_real_BL)
  state = DecodeState(
    cache=cache,
    position_B=batch.anchor.positions[:, -1] + 1,
    slot=jnp.int32(P),
    lengths=lengths,
    stop_S=stop_S,
    allowed_V=allowed_V,
    logits_BV=logits_BV,
    token_B=batch.anchor.tokens[:, -1],
    keys_B=jax.vmap(jax.random.key)(seeds_B),
    seen_BV=seen_BV,
    done_B=~is_real_BL.any(-1),
    control=batch.control,
    by_row=by_row,
  )
  return _pick(state, sampler)


def _same_tokens(spec: Composition, state: DecodeState) -> list[str]:
  """The augmenting models that read the anchor's new tokens."""
  return [
    name
    for name, joined in spec.augmenting
    if name in state.lengths and visibility.reads_new_text(joined.visibility)
  ]


def _step(
  params: dict, spec: Composition, state: DecodeState, sampler: Sampler
) -> DecodeState:
  """Reads the newest token of each row and picks the next."""
  B = len(state.token_B)
  segments_B1 = jnp.ones((B, 1), jnp.int32)
  token = Sequence(
    state.token_B[:, None], segments_B1, state.position_B[:, None]
  )
  nothing = Sequence(*(jnp.zeros((B, 0), jnp.int32) for _ in token))
  reading = _same_tokens(spec, state)
  others = [name for name, _ in spec.augmenting if name not in reading]
  given = dict.fromkeys(others, nothing)
  batch = Batch(token, given, {}, control=state.control)
  x_BLD, cache = forward.states(
    params, spec, batch, state.cache, state.slot, state.lengths
  )
  state = state._replace(
    cache=cache,
    position_B=state.position_B + 1,
    slot=state.slot + 1,
    logits_BV=forward.logits(params, spec, x_BLD)[:, 0],
  )
  return _pick(state, sampler)


def _advance(
  params: dict,
  spec: Composition,
  state: DecodeState,
  steps: Array,
  *,
  sampler: Sampler,
  size: int,
  tops: int = 0,
) -> tuple[DecodeState, Array] | tuple[DecodeState, Array, Tops]:
  """Reads the newest tokens and picks the next, again and again.

  Args:
    params, spec, sampler: as for `start`.
    state: is donated.
    steps: int32 [], at most `size`; fewer are made if all rows are done. A GPU
      makes `size`, and only the first `steps` count: a state is good for
      another call if they were all.
    size: columns of the result.
    tops: how many of the likeliest tokens the third result names; without it
      there are two.

  Returns:
    The state, and the tokens picked, int32 [B, size]; -1 from a stop token on.
  """

  def go_on(carry):
    i, state, *_ = carry
    return (i < steps) & ~state.done_B.all()

  def body(carry):
    i, state, out_BT, *told = carry
    state = _step(params, spec, state, sampler)
    is_new_B = (i < steps) & ~state.done_B
    column_B = jnp.where(is_new_B, state.token_B, -1)
    if told:
      new = log_probabilities(state.logits_BV, state.token_B, tops)
      told = jax.tree.map(lambda x, y: x.at[:, i].set(y[:, 0]), told, [new])
    return i + 1, state, out_BT.at[:, i].set(column_B), *told

  names, first, cache = _same_tokens(spec, state), state.slot, state.cache
  on_gpu = joined.is_joined(params["anchor"])
  if not on_gpu:  # which writes into its caches in place
    cache = _change_caches(
      cache, names, lambda c: cache_lib.begin(c, size, first)
    )
  shape = len(state.token_B), size
  out_BT = jnp.full(shape, -1, jnp.int32)
  told = [_no_tops(*shape, tops, state.logits_BV.dtype)] if tops else []
  with jax.named_scope("decode"):
    carry = jnp.int32(0), state._replace(cache=cache), out_BT, *told
    if on_gpu:  # which would wait for the host at each condition
      carry = jax.lax.fori_loop(0, size, lambda _, c: body(c), carry)
    else:
      carry = jax.lax.while_loop(go_on, body, carry)
    _, state, out_BT, *told = carry
  if not on_gpu:
    cache = _change_caches(state.cache, names, cache_lib.settle)
    state = state._replace(cache=cache)
  return state, out_BT, *told


def _no_tops(rows: int, size: int, tops: int, dtype: jnp.dtype) -> Tops:
  shape = rows, size
  ids_BTN = jnp.zeros((*shape, tops), jnp.int32)
  return Tops(jnp.zeros(shape, dtype), ids_BTN, ids_BTN.astype(dtype))


def log_probabilities(logits_BV: Array, token_B: Array, tops: int) -> Tops:
  """Log-probabilities of the newest tokens, before any temperature (T = 1)."""
  all_BV = jax.nn.log_softmax(logits_BV)
  chosen_B1 = jnp.take_along_axis(all_BV, token_B[:, None], axis=-1)
  values_BN, ids_BN = jax.lax.top_k(all_BV, tops)
  return Tops(chosen_B1, ids_BN[:, None], values_BN[:, None])


def advance_on(platform: str, params: dict) -> jax.stages.Wrapped:
  """Returns `_advance`, compiled as suits a platform and these parameters.

  One GPU runs kernels side by side that do not wait for each other, such as
  those of the augmenting models and of the anchor.
  """
  return _compiled(platform == "gpu" and joined.is_joined(params["anchor"]))


@functools.cache
def _compiled(side_by_side: bool) -> jax.stages.Wrapped:
  options = None
  if side_by_side:
    options = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
  return jax.jit(
    _advance,
    static_argnames=("spec", "sampler", "size", "tops"),
    donate_argnames="state",
    compiler_options=options,
  )


def _change_caches(
  cache: dict, names: list[str], change: Callable[[dict], dict]
) -> dict:
  """Changes the caches of the anchor and of the augmenting models `names`."""

  def is_cache(node) -> bool:
    return isinstance(node, dict) and "key" in node

  def changed(tree):
    return jax.tree.map(
      lambda node: change(node) if is_cache(node) else node,
      tree,
      is_leaf=is_cache,
    )

  new = {"anchor": changed(cache["anchor"])}
  for kind in _AUGMENTING:
    by_name = {name: changed(cache[kind][name]) for name in names}
    new[kind] = cache[kind] | by_name
  return new


@functools.partial(
  jax.jit, static_argnames=("spec", "name"), donate_argnames="cache"
)
def feed(
  params: dict,
  spec: Composition,
  cache: dict,
  sequence: Sequence,
  index: Array,
  control: Control | None = None,
  *,
  name: str,
) -> dict:
  """An augmenting model reads tokens [B, M] into slots index .. of the cache.

  The cache of all models, which is returned, is donated.
  """
  new = augmenting.keys_values(
    params, spec, name, sequence, cache, index, control=control
  )
  return cache | {kind: cache[kind] | {name: new[kind]} for kind in _AUGMENTING}


def grow(cache: dict, name: str, slots: int) -> dict:
  """The cache with so many slots for one augmenting model."""

  def grown(x):
    axis = 1 if x.ndim == 2 else 3  # of segments, or of keys and values
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, slots - x.shape[axis])
    return jnp.pad(x, widths)

  return cache | {
    kind: cache[kind] | {name: jax.tree.map(grown, cache[kind][name])}
    for kind in _AUGMENTING
  }
