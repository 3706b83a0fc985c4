"""Generation for one model or a composition: the part on the host.

A batch is laid out once (`batching`), read by `decode_steps.start` and
continued by `decode_steps.advance` for up to CHUNK tokens at a time. An
augmenting model with a tokenizer of its own is fed by a `Follower` between two
steps.

B rows, S stop tokens, T new tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import inference
from calm_jax.composition.model import Model
from calm_jax.core.batch import Batch
from calm_jax.generation import batching, decode_steps, followers
from calm_jax.generation.batching import Ids
from calm_jax.generation.decode_steps import DecodeState
from calm_jax.generation.followers import Follower
from calm_jax.generation.replacements import Replacement
from calm_jax.generation.sampling import GREEDY, Sampler
from calm_jax.parallel import processes

Array = jax.Array

CHUNK = 16  # tokens that are generated before the host looks at them


def stream(
  model: Model,
  prompts: Ids,
  *,
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
  seeds: Rows[int] | None = None,
  finished: Callable[[int, list[int]], bool] | None = None,
  batch_size: int = 64,
  replacement: Replacement | None = None,
  stop_ids: Rows[int] | None = None,
) -> Iterator[tuple[int, list[int]]]:
  """Continues prompts, a few tokens at a time.

  A continuation ends early, with a warning, where an augmenting model has read
  as many tokens of its own as it was made for.

  Args:
    model: continues the prompts.
    prompts: non-empty lists of token ids, any lengths.
    seeds: one a prompt, 0 if None; other prompts change no prompt's samples.
    finished: called with (index of the prompt, its new tokens so far); ends
      the continuation if True.
    batch_size: rows that decode together.
    replacement: of the states that the anchor is given of its augmenting
      models.
    stop_ids: tokens that end a continuation, and are not returned; those of
      the model's tokenizer, if it has one, if None.

  Yields:
    (index of a prompt, its next tokens), at least one token.

  Raises:
    InputError: a prompt is empty, or too long for the models.
  """
  prompts = batching.check_rows(model, prompts, "prompt", max_new_tokens)
  if not prompts or not max_new_tokens:
    return
  spec, params = model.prepared
  model = dataclasses.replace(model, spec=spec, params=params)
  lengths = [len(ids) for ids in prompts]
  # `advance` writes whole chunks of slots, the last one too.
  longest = batching.round_up(max(lengths))
  slots = batching.round_up(longest + max_new_tokens + CHUNK)
  seeds = [0] * len(prompts) if seeds is None else seeds
  least = inference.least_rows(params)
  batches = batching.batches(
    model, prompts, lengths, batch_size, least, replacement
  )
  for indices, batch, readers in batches:
    following = followers.of_batch(model, batch, readers)
    read = model, batch, following, [seeds[i] for i in indices], stop_ids
    state = _prefill(*read, sampler, max_new_tokens, slots)
    yield from _continue(
      model, state, following, indices, sampler, max_new_tokens, finished
    )


def generate(model: Model, prompts: Ids, **options) -> list[list[int]]:
  """`stream`, all at once: the continuations in the order of the prompts."""
  out: list[list[int]] = [[] for _ in prompts]
  for i, tokens in stream(model, prompts, **options):
    out[i] += tokens
  return out


def _prefill(
  model: Model,
  batch: Batch,
  following: list[Follower],
  seeds: list[int],
  stop_ids: Rows[int] | None,
  sampler: Sampler,
  max_new_tokens: int,
  slots: int,
) -> DecodeState:
  """Reads a batch; `slots` are of models that read the anchor's tokens."""
  names = ["anchor", *(name for name, _ in model.spec.augmenting)]
  all_slots = dict.fromkeys(names, slots)
  for name, row in batch.augmenting.items():
    all_slots[name] = row.tokens.shape[1]
  all_slots |= {follower.name: follower.slots for follower in following}
  if stop_ids is None:
    stop_ids = model.tokenizer.stop_ids if model.tokenizer else ()
  spare = len(batch.anchor.tokens) - len(seeds)
  seeds_B = np.array(seeds + [0] * spare, np.uint32)
  return decode_steps.start(
    model.params,
    model.spec,
    batch,
    seeds_B,
    np.array(list(stop_ids) or [-1], np.int32),
    np.int32(max_new_tokens),
    batching.allowed_ids(model),
    slots=tuple(all_slots.items()),
    sampler=sampler,
  )


def _continue(
  model: Model,
  state: DecodeState,
  following: list[Follower],
  indices: list[int],
  sampler: Sampler,
  max_new_tokens: int,
  finished: Callable[[int, list[int]], bool] | None,
) -> Iterator[tuple[int, list[int]]]:
  """Continues the rows of a batch, which are the prompts `indices`."""
  size = 1 if following else min(CHUNK, max_new_tokens)
  left = max_new_tokens - 1

  advance_rows = decode_steps.advance_on(jax.default_backend(), model.params)

  def advance(state: DecodeState) -> tuple[DecodeState, Array]:
    nonlocal left
    steps = min(left, size)
    left -= steps
    return advance_rows(
      model.params,
      model.spec,
      state,
      np.int32(steps),
      sampler=sampler,
      size=size,
    )

  # The device need not wait for the host where that changes nothing.
  goes_ahead = not following and finished is None
  made: list[list[int]] = [[] for _ in indices]
  new_BT = jnp.where(state.done_B, -1, state.token_B)[:, None]
  while True:
    # The next tokens are made from the state, whose arrays it takes.
    newest = new_BT, jnp.copy(state.done_B)
    ahead = advance(state) if goes_ahead and left else None
    new_BT, done_B = processes.fetch(newest)
    done_B = np.array(done_B)
    for row, i in enumerate(indices):
      tokens = [int(token) for token in new_BT[row] if token >= 0]
      if tokens:
        made[row] += tokens
        yield i, tokens
        if finished and finished(i, made[row]):
          done_B[row] = True
    is_done = done_B[: len(indices)].all()  # Spare rows are no prompt's.
    if is_done or (ahead is None and not left):
      return
    if ahead is None:
      cache = state.cache
      for follower in following:
        newest_B = np.where(done_B, -1, new_BT[:, -1])
        cache, is_full_B = follower.follow(
          model, cache, newest_B, state.control
        )
        done_B |= is_full_B
      ahead = advance(state._replace(done_B=done_B, cache=cache))
    state, new_BT = ahead
