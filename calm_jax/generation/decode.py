"""Generation for one model or a composition: one engine.

A batch is laid out once (`batching`), read into the caches of all models by
`start`, and continued by `advance`, a jitted loop that stays on the device for
up to CHUNK tokens. An augmenting model with a tokenizer of its own cannot read
along on the device: a `Reader` gives its tokens between two steps, and `feed`
reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import cross_attention, forward
from calm_jax.composition.connections import Composition
from calm_jax.core.batch import Sequence
from calm_jax.generation import batching
from calm_jax.generation.aligned import Follower
from calm_jax.generation.batching import Batch, Reader
from calm_jax.generation.sampling import GREEDY, Sampler
from calm_jax.models import cache as cache_lib
from calm_jax.models import decoder
from calm_jax.parallel import processes

Array = jax.Array
CHUNK = 16  # tokens between two looks of the host


class State(NamedTuple):
  """Texts in the middle of being continued.

  Attributes:
    cache: see `composition.empty_cache`.
    logits_BV: float32, that `token_B` was picked from.
    token_B: the newest token of each row, not read yet.
    position_B: its position.
    done_B: whether a stop token was picked.
    keys_B: the random key of each row.
    seen_BV: tokens so far, for the repetition penalty; None without one.
    slot: int32 [], the anchor's slot that token_B will be written to.
    lengths: by model [B], the longest that each row can become, prompt
      included; rotary scalings that depend on the length take it for the
      text's. Models with other tokenizers are not there.
  """

  cache: dict
  logits_BV: Array
  token_B: Array
  position_B: Array
  done_B: Array
  keys_B: Array
  seen_BV: Array | None
  slot: Array
  lengths: dict[str, Array]


def prepare(params: dict) -> dict:
  """The tree as decoding reads it fastest; nothing large is copied."""
  models = {"anchor": decoder.unstack(params["anchor"])}
  if "augmenting" in params:
    models["augmenting"] = {
      name: decoder.unstack(p) for name, p in params["augmenting"].items()
    }
  return cross_attention.fold(params) | models


def _pick(sampler: Sampler, stop_S, keys_B, logits_BV, seen_BV, done_B):
  draw_B = None
  if sampler.temperature > 0:
    keys_B, draw_B = jax.vmap(jax.random.split, out_axes=1)(keys_B)
  token_B = sampler(draw_B, logits_BV, seen_BV)
  if seen_BV is not None:
    seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
  done_B = done_B | (token_B[:, None] == stop_S).any(-1)
  return token_B, keys_B, seen_BV, done_B


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
) -> State:
  """Reads the prompts and picks the first token of each row.

  Args:
    params: from `prepare`.
    spec: what they are.
    batch: from `lay_out`.
    seeds_B: int32, of the random key of each row.
    stop_S: token ids that end a row.
    lengths: see `State`.
    slots: (model, slots of its cache), for all models.
    sampler: how the next token is picked.
  """
  B, P = batch.anchor.tokens.shape
  keys_B = jax.vmap(jax.random.key)(seeds_B)
  stacked = not isinstance(params["anchor"]["layers"], tuple)
  with jax.named_scope("prefill"):
    x_BLD, cache = forward.states(
      params,
      spec,
      batch.anchor,
      batch.augmenting,
      batch.visible,
      forward.empty_cache(spec, B, dict(slots), stacked),
      jnp.int32(0),
      lengths=lengths,
    )
    logits_BV = forward.logits(params, spec, x_BLD[:, -1:])[:, 0]
  seen_BV = None
  if sampler.repetition_penalty != 1:
    rows_B1 = jnp.arange(B)[:, None]
    seen_BV = jnp.zeros(logits_BV.shape, bool)
    seen_BV = seen_BV.at[rows_B1, batch.anchor.tokens].max(
      batch.anchor.segments > 0
    )
  done_B = ~batch.anchor.segments.any(-1)
  token_B, keys_B, seen_BV, done_B = _pick(
    sampler, stop_S, keys_B, logits_BV, seen_BV, done_B
  )
  position_B = batch.anchor.positions[:, -1] + 1
  return State(
    cache,
    logits_BV,
    token_B,
    position_B,
    done_B,
    keys_B,
    seen_BV,
    jnp.int32(P),
    lengths,
  )


@functools.partial(
  jax.jit,
  static_argnames=("spec", "along", "sampler", "size"),
  donate_argnames="state",
)
def advance(
  params: dict,
  spec: Composition,
  state: State,
  stop_S: Array,
  steps: Array,
  *,
  along: tuple[str, ...],
  sampler: Sampler,
  size: int,
) -> tuple[State, Array]:
  """Reads the newest tokens and picks the next, again and again.

  Args:
    params, spec, stop_S, sampler: as for `start`.
    state: is donated.
    steps: int32 [], at most `size`; fewer if all rows are done.
    along: augmenting models that read the anchor's own tokens.
    size: columns of the result.

  Returns:
    The state, and the tokens picked, int32 [B, size]; -1 from a stop token on.
  """
  B = len(state.token_B)
  everything_B1 = jnp.full((B, 1), jnp.iinfo(jnp.int32).max)
  visible = {name: everything_B1 for name, _ in spec.augmenting}

  def body(carry):
    i, s, out_BT = carry
    token = Sequence(
      s.token_B[:, None], jnp.ones((B, 1), jnp.int32), s.position_B[:, None]
    )
    x_BLD, cache = forward.states(
      params,
      spec,
      token,
      dict.fromkeys(along, token),
      visible,
      s.cache,
      s.slot,
      lengths=s.lengths,
    )
    logits_BV = forward.logits(params, spec, x_BLD)[:, 0]
    token_B, keys_B, seen_BV, done_B = _pick(
      sampler, stop_S, s.keys_B, logits_BV, s.seen_BV, s.done_B
    )
    out_BT = out_BT.at[:, i].set(jnp.where(done_B, -1, token_B))
    s = State(
      cache, logits_BV, token_B, s.position_B + 1, done_B, keys_B, seen_BV,
      s.slot + 1, s.lengths,
    )  # fmt: skip
    return i + 1, s, out_BT

  first = state.slot
  state = state._replace(
    cache=_each(state.cache, along, lambda c: cache_lib.begin(c, size, first))
  )
  with jax.named_scope("decode"):
    _, state, out_BT = jax.lax.while_loop(
      lambda carry: (carry[0] < steps) & ~carry[1].done_B.all(),
      body,
      (jnp.int32(0), state, jnp.full((B, size), -1, jnp.int32)),
    )
  cache = _each(state.cache, along, cache_lib.settle)
  return state._replace(cache=cache), out_BT


def _each(cache: dict, along: tuple[str, ...], change: Callable) -> dict:
  """Changes the caches of the models that read the anchor's tokens."""

  def layers(own):
    found = own["layers"]
    if isinstance(found, tuple):
      return own | {"layers": tuple(map(change, found))}
    return own | {"layers": change(found)}

  def among(kind, change):
    return cache[kind] | {name: change(cache[kind][name]) for name in along}

  return {
    "anchor": layers(cache["anchor"]),
    "augmenting": among("augmenting", layers),
    "cross": among(
      "cross", lambda own: {name: change(c) for name, c in own.items()}
    ),
  }


def stream(
  params: dict,
  spec: Composition,
  prompts: Rows[Rows[int]],
  *,
  max_new_tokens: int,
  stop_ids: Rows[int] = (),
  sampler: Sampler = GREEDY,
  seeds: Rows[int] | None = None,
  readers: dict[str, Callable[[], Reader]] | None = None,
  finished: Callable[[int, list[int]], bool] | None = None,
  batch_size: int = 64,
) -> Iterator[tuple[int, list[int]]]:
  """Continues prompts, a few tokens at a time.

  Args:
    params: tree of the composition, or {"anchor": ...} of one model.
    spec: what they are.
    prompts: non-empty lists of token ids, any lengths.
    max_new_tokens: longest continuation.
    stop_ids: token ids that end a continuation (not returned).
    sampler: how the next token is picked.
    seeds: one a prompt, 0 if None; what is drawn for a prompt depends on its
      own seed and on nothing of its neighbours.
    readers: makers of readers, by name, for the augmenting models with other
      tokenizers than the anchor's.
    finished: called with (index of the prompt, its new tokens so far); ends
      the continuation if True.
    batch_size: rows that decode together.

  Yields:
    (index of a prompt, its next tokens), at least one token.

  Raises:
    InputError: a prompt is empty, or too long for the models.
  """
  readers = readers or {}
  limit = batching.max_length(spec, readers)
  batching.check_prompts(prompts, max_new_tokens, limit)
  if not prompts or not max_new_tokens:
    return
  params = prepare(params)
  stop_S = np.array(list(stop_ids) or [-1], np.int32)
  seeds = [0] * len(prompts) if seeds is None else seeds
  longest = batching.round_up(max(map(len, prompts)))
  # `advance` settles whole chunks, the last one too.
  slots = batching.round_up(longest + max_new_tokens + CHUNK)
  reads_on = [n for n, a in spec.augmenting if a.visibility != "encoder"]
  along = tuple(name for name in reads_on if name not in readers)
  for chosen, rows in batching.batches(prompts, batch_size):
    ids = [prompts[i] for i in chosen]
    own = {name: [make() for _ in ids] for name, make in readers.items()}
    batch = batching.lay_out(spec, ids, list(map(len, ids)), own, rows=rows)
    followers = [
      Follower(n, dict(spec.augmenting)[n], own[n], batch.augmenting[n])
      for n in reads_on
      if n in own
    ]
    sizes = {n: batch.augmenting[n].tokens.shape[1] for n in own}
    sizes |= {"anchor": slots} | {f.name: f.slots for f in followers}
    seeds_B = jnp.array([seeds[i] for i in chosen] + [0] * (rows - len(ids)))
    longest_B = np.full(rows, max_new_tokens, np.int32)
    longest_B[: len(ids)] += [len(p) for p in ids]
    lengths = {
      n: longest_B for n in ("anchor", *dict(spec.augmenting)) if n not in own
    }
    state = start(
      params,
      spec,
      batch,
      np.asarray(seeds_B),
      stop_S,
      lengths,
      slots=tuple(
        (n, sizes.get(n, slots)) for n in ("anchor", *dict(spec.augmenting))
      ),
      sampler=sampler,
    )
    size = 1 if followers else min(CHUNK, max_new_tokens)
    left = max_new_tokens - 1
    made: list[list[int]] = [[] for _ in ids]
    new_BT = processes.fetch(state.token_B)[:, None]
    while True:
      done_B = np.array(processes.fetch(state.done_B))
      if new_BT.shape[1] == 1:
        new_BT = np.where(done_B[:, None], -1, new_BT)
      for row, i in enumerate(chosen):
        tokens = [int(t) for t in new_BT[row] if t >= 0]
        if tokens:
          made[row] += tokens
          yield i, tokens
          if finished and finished(i, made[row]):
            done_B[row] = True
      if not left or done_B.all():
        break
      state = state._replace(done_B=done_B)
      for follower in followers:
        newest_B = np.where(done_B, -1, new_BT[:, -1])
        cache = follower.follow(params, spec, state.cache, newest_B)
        state = state._replace(cache=cache)
      steps = min(left, size)
      state, new_BT = advance(
        params,
        spec,
        state,
        stop_S,
        np.int32(steps),
        along=along,
        sampler=sampler,
        size=size,
      )
      new_BT, left = processes.fetch(new_BT), left - steps


def generate(params, spec, prompts, **options) -> list[list[int]]:
  """`stream`, all at once: the continuations in the order of the prompts."""
  out: list[list[int]] = [[] for _ in prompts]
  for i, tokens in stream(params, spec, prompts, **options):
    out[i] += tokens
  return out
