"""Generation for one model or a composition: one engine.

A batch is laid out once (`batching`), read by `decode_steps.start` and
continued by `decode_steps.advance` for up to CHUNK tokens at a time. An
augmenting model with a tokenizer of its own cannot read along on the device: a
`Follower` feeds it between two steps.

B rows, S stop tokens, T new tokens.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from calm_jax.composition import visibility
from calm_jax.composition.connections import Composition
from calm_jax.generation import batching, decode_steps
from calm_jax.generation.batching import Ids, Readers
from calm_jax.generation.decode_steps import DecodeState
from calm_jax.generation.follower import Follower
from calm_jax.generation.sampling import GREEDY, Sampler
from calm_jax.parallel import processes
from calm_jax.text.alignment import AlignedReader

CHUNK = 16  # tokens that are generated before the host looks at them


def stream(
  params: dict,
  spec: Composition,
  prompts: Ids,
  *,
  max_new_tokens: int,
  stop_ids: Rows[int] = (),
  sampler: Sampler = GREEDY,
  seeds: Rows[int] | None = None,
  readers: Readers | None = None,
  finished: Callable[[int, list[int]], bool] | None = None,
  batch_size: int = 64,
) -> Iterator[tuple[int, list[int]]]:
  """Continues prompts, a few tokens at a time.

  Args:
    params, spec: of a composition or one model.
    prompts: non-empty lists of token ids, any lengths.
    max_new_tokens: longest continuation.
    stop_ids: token ids that end a continuation (not returned).
    sampler: how the next token is picked.
    seeds: one a prompt, 0 if None; other prompts change no prompt's samples.
    readers: of `batching.readers`.
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
  params = decode_steps.prepare(params)
  stop_S = np.array(list(stop_ids) or [-1], np.int32)
  longest = batching.round_up(max(map(len, prompts)))
  # `advance` writes whole chunks of slots, the last one too.
  slots = batching.round_up(longest + max_new_tokens + CHUNK)
  request = _Request(
    params, spec, stop_S, sampler, max_new_tokens, slots, finished
  )
  seeds = [0] * len(prompts) if seeds is None else seeds
  for chosen, rows in batching.batches(prompts, batch_size):
    ids, row_seeds = [prompts[i] for i in chosen], [seeds[i] for i in chosen]
    row_readers = {n: [make() for _ in ids] for n, make in readers.items()}
    state, followers = _prefill(request, ids, row_seeds, row_readers, rows)
    yield from _continue(request, state, followers, chosen)


class _Request(NamedTuple):
  """The arguments of `stream` that all batches share."""

  params: dict  # from `decode_steps.prepare`
  spec: Composition
  stop_S: np.ndarray
  sampler: Sampler
  max_new_tokens: int
  slots: int  # of the caches of models that read the anchor's tokens
  finished: Callable[[int, list[int]], bool] | None


def _prefill(
  request: _Request,
  prompts: list[Rows[int]],
  seeds: list[int],
  readers: dict[str, list[AlignedReader]],
  rows: int,
) -> tuple[DecodeState, list[Follower]]:
  """Lays out a batch and reads it.

  Returns the state, and a follower for each augmenting model with tokens of its
  own that also reads the new text.
  """
  params, spec, stop_S, sampler = request[:4]
  lengths = [len(ids) for ids in prompts]
  batch = batching.lay_out(spec, prompts, lengths, readers, rows=rows)
  followers = [
    Follower(name, joined, readers[name], batch.augmenting[name])
    for name, joined in spec.augmenting
    if name in readers and visibility.reads_new_text(joined.visibility)
  ]
  names = ["anchor", *(name for name, _ in spec.augmenting)]
  slots = dict.fromkeys(names, request.slots)
  slots |= {n: row.tokens.shape[1] for n, row in batch.augmenting.items()}
  slots |= {follower.name: follower.slots for follower in followers}
  spare = [0] * (rows - len(prompts))
  seeds_B = np.asarray(jnp.array(seeds + spare))
  longest_B = np.array(lengths + spare, np.int32) + request.max_new_tokens
  longest = {name: longest_B for name in names if name not in readers}
  static = {"slots": tuple(slots.items()), "sampler": sampler}
  state = decode_steps.start(
    params, spec, batch, seeds_B, stop_S, longest, **static
  )
  return state, followers


def _continue(
  request: _Request,
  state: DecodeState,
  followers: list[Follower],
  indices: list[int],
) -> Iterator[tuple[int, list[int]]]:
  """Continues the rows of a batch, which are the prompts `indices`."""
  params, spec, stop_S, sampler = request[:4]
  size = 1 if followers else min(CHUNK, request.max_new_tokens)
  fed = {follower.name for follower in followers}
  along = tuple(
    name
    for name, joined in spec.augmenting
    if name not in fed and visibility.reads_new_text(joined.visibility)
  )
  static = {"along": along, "sampler": sampler, "size": size}
  made: list[list[int]] = [[] for _ in indices]
  left = request.max_new_tokens - 1
  token_B, done_B = processes.fetch((state.token_B, state.done_B))
  new_BT = np.where(done_B, -1, token_B)[:, None]
  while True:
    done_B = np.array(done_B)
    for row, i in enumerate(indices):
      tokens = [int(token) for token in new_BT[row] if token >= 0]
      if tokens:
        made[row] += tokens
        yield i, tokens
        if request.finished and request.finished(i, made[row]):
          done_B[row] = True
    if not left or done_B.all():
      return
    cache = state.cache
    for follower in followers:
      newest_B = np.where(done_B, -1, new_BT[:, -1])
      cache = follower.follow(params, spec, cache, newest_B)
    steps = min(left, size)
    state = state._replace(done_B=done_B, cache=cache)
    state, new_BT = decode_steps.advance(
      params, spec, state, stop_S, np.int32(steps), **static
    )
    new_BT, done_B = processes.fetch((new_BT, state.done_B))
    left -= steps


def generate(
  params: dict, spec: Composition, prompts: Ids, **options
) -> list[list[int]]:
  """`stream`, all at once: the continuations in the order of the prompts."""
  out: list[list[int]] = [[] for _ in prompts]
  for i, tokens in stream(params, spec, prompts, **options):
    out[i] += tokens
  return out
