"""Generation for one model or a composition: the part on the host.

A batch is laid out once (`batching`), read by `decode_steps.start` and
continued by `decode_steps.advance` for up to CHUNK tokens at a time. An
augmenting model with a tokenizer of its own cannot read along on the device: a
`Follower` feeds it between two steps.

B rows, S stop tokens, T new tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import inference, visibility
from calm_jax.composition.connections import Augmenting
from calm_jax.composition.model import Model
from calm_jax.core.batch import Batch, Control, Sequence
from calm_jax.generation import batching, decode_steps
from calm_jax.generation.batching import Ids
from calm_jax.generation.decode_steps import DecodeState
from calm_jax.generation.replacements import Replacement
from calm_jax.generation.sampling import GREEDY, Sampler
from calm_jax.parallel import processes
from calm_jax.text.alignment import AlignedReader

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
    followers = [
      Follower(name, joined, readers[name], batch.augmenting[name])
      for name, joined in model.spec.augmenting
      if name in readers and visibility.reads_new_text(joined.visibility)
    ]
    read = model, batch, followers, [seeds[i] for i in indices], stop_ids
    state = _prefill(*read, sampler, max_new_tokens, slots)
    yield from _continue(
      model, state, followers, indices, sampler, max_new_tokens, finished
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
  followers: list["Follower"],
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
  all_slots |= {follower.name: follower.slots for follower in followers}
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
  followers: list["Follower"],
  indices: list[int],
  sampler: Sampler,
  max_new_tokens: int,
  finished: Callable[[int, list[int]], bool] | None,
) -> Iterator[tuple[int, list[int]]]:
  """Continues the rows of a batch, which are the prompts `indices`."""
  size = 1 if followers else min(CHUNK, max_new_tokens)
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
  goes_ahead = not followers and finished is None
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
      for follower in followers:
        newest_B = np.where(done_B, -1, new_BT[:, -1])
        cache = follower.follow(model, cache, newest_B, state.control)
      ahead = advance(state._replace(done_B=done_B, cache=cache))
    state, new_BT = ahead


def follower_slots(length: int) -> int:
  """Slots of a follower's cache at first, for prompts of so many tokens."""
  return batching.round_up(2 * length)


class Follower:
  """Feeds one augmenting model the tokens that growing texts complete.

  Its cache has `slots`, and grows if they do not suffice.
  """

  def __init__(
    self,
    name: str,
    joined: Augmenting,
    readers: list[AlignedReader],
    prompt: Sequence,
  ):
    self.name, self._joined, self._readers = name, joined, readers
    self._lengths_B = prompt.segments.sum(axis=1)  # tokens read so far
    self._slot = prompt.tokens.shape[1]  # the next free one
    self.slots = follower_slots(self._slot)

  def follow(
    self, model: Model, cache: dict, new_B: np.ndarray, control: Control | None
  ) -> dict:
    """Reads what the newest token of each row (-1 for none) completes.

    The cache of all models is donated; returns the new one. Raises InputError
    if the model would read beyond its length limit.
    """
    ids = [
      reader.push(int(token)) if token >= 0 else []
      for reader, token in zip(self._readers, new_B, strict=False)
    ]
    longest = max(map(len, ids))
    if not longest:
      return cache
    size = 1 << (longest - 1).bit_length()
    if self._slot + size > self.slots:
      self.slots = batching.round_up(2 * self.slots)
      cache = decode_steps.grow(cache, self.name, self.slots)
    sequence = batching.pad(ids, len(new_B), size, first=self._lengths_B)
    self._lengths_B = self._lengths_B + (sequence.segments > 0).sum(axis=1)
    batching.check_length(self.name, self._joined, self._lengths_B.max())
    slot = np.int32(self._slot)
    self._slot += size
    return decode_steps.feed(
      model.params, model.spec, cache, sequence, slot, control, name=self.name
    )
