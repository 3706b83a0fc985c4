"""Generation and scoring for one model or a composition: one engine.

Prompts are padded on the left to a few lengths, so that all rows write the
same cache slot at each step and few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import composition
from calm_jax.composition import Sequence
from calm_jax.connections import Composition
from calm_jax.errors import InputError

Array = jax.Array
BUCKET = 16  # prompts are padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Picks the next token: the likeliest at temperature 0, else at random."""

  temperature: float = 0.0

  def __call__(self, rng: Array, logits_BV: Array) -> Array:
    if self.temperature == 0.0:
      return jnp.argmax(logits_BV, axis=-1)
    return jax.random.categorical(rng, logits_BV / self.temperature)


@functools.partial(
  jax.jit, static_argnames=("spec", "max_new_tokens", "sampler")
)
def _generate(
  params: dict,
  spec: Composition,
  prompt: Sequence,
  stop: int,
  rng: Array,
  *,
  max_new_tokens: int,
  sampler: Sampler,
) -> Array:
  """New tokens int32 [B, max_new_tokens], -1 from the stop token on."""
  B, P = prompt.tokens.shape
  prompt_ends_B1 = jnp.full((B, 1), P)

  def run(sequence, cache, index):
    visible = {
      name: composition.visible_tokens(
        joined.visibility, sequence.tokens.shape, prompt_ends_B1, index
      )
      for name, joined in spec.augmenting
    }
    x_BLD, cache = composition.states(
      params, spec, sequence, visible=visible, cache=cache, index=index
    )
    return composition.logits(params, spec, x_BLD[:, -1:])[:, 0], cache

  def pick(step, logits_BV, done_B):
    token_B = sampler(jax.random.fold_in(rng, step), logits_BV)
    done_B = done_B | (token_B == stop)
    return token_B.astype(jnp.int32), done_B

  def unfinished(carry):
    step, _, _, done_B, _, _ = carry
    return (step < max_new_tokens) & ~done_B.all()

  def body(carry):
    step, token_B, position_B, done_B, out_BT, cache = carry
    out_BT = out_BT.at[:, step].set(jnp.where(done_B, -1, token_B))
    sequence = Sequence(
      token_B[:, None], jnp.ones((B, 1), jnp.int32), position_B[:, None]
    )
    logits_BV, cache = run(sequence, cache, P + step)
    token_B, done_B = pick(step + 1, logits_BV, done_B)
    return step + 1, token_B, position_B + 1, done_B, out_BT, cache

  with jax.named_scope("prefill"):
    cache = composition.empty_cache(spec, B, P + max_new_tokens)
    logits_BV, cache = run(prompt, cache, jnp.int32(0))
    token_B, done_B = pick(0, logits_BV, jnp.zeros((B,), bool))
  out_BT = jnp.full((B, max_new_tokens), -1, jnp.int32)
  position_B = prompt.positions[:, -1] + 1
  with jax.named_scope("decode"):
    carry = jax.lax.while_loop(
      unfinished,
      body,
      (jnp.int32(0), token_B, position_B, done_B, out_BT, cache),
    )
  return carry[4]


def pad_left(prompts: list[list[int]], rows: int, length: int) -> Sequence:
  """Prompts as [rows, length], padded on the left; spare rows are padding."""
  tokens = np.zeros((rows, length), np.int32)
  segments = np.zeros((rows, length), np.int32)
  positions = np.zeros((rows, length), np.int32)
  for row, ids in enumerate(prompts):
    at = length - len(ids)
    tokens[row, at:] = ids
    segments[row, at:] = 1
    positions[row, at:] = np.arange(len(ids))
  return Sequence(tokens, segments, positions)


def max_length(spec: Composition) -> int:
  """The longest sequence that every model of a composition was made for."""
  configs = [spec.anchor, *(a.config for _, a in spec.augmenting)]
  return min(c.max_length for c in configs)


def generate(
  params: dict,
  spec: Composition,
  prompts: list[list[int]],
  *,
  max_new_tokens: int,
  stop: int | None,
  sampler: Sampler = Sampler(),
  seed: int = 0,
  batch_size: int = 64,
) -> list[list[int]]:
  """Continues prompts of token ids.

  Args:
    params: tree of the composition, or {"anchor": ...} of one model.
    spec: what they are.
    prompts: non-empty lists of token ids, any lengths.
    max_new_tokens: longest continuation.
    stop: token id that ends a continuation (not returned); None for none.
    sampler: how the next token is picked.
    seed: of the sampler.
    batch_size: rows that decode together.

  Returns:
    The continuations, in the order of the prompts.

  Raises:
    InputError: a prompt is empty, or too long for the models.
  """
  limit = max_length(spec)
  for i, ids in enumerate(prompts):
    if not ids:
      raise InputError(f"prompt {i} has no tokens: nothing to continue from")
    if len(ids) + max_new_tokens > limit:
      raise InputError(
        f"prompt {i} has {len(ids)} tokens; with max_new_tokens="
        f"{max_new_tokens} that exceeds the models' length limit of {limit}"
      )
  # Rows of like length decode together, so that padding stays small.
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  out: list[list[int]] = [[] for _ in prompts]
  rng = jax.random.key(seed)
  rows = min(batch_size, _round_up(max(len(prompts), 1), 8))
  for start in range(0, len(order), rows):
    chosen = order[start : start + rows]
    longest = max(len(prompts[i]) for i in chosen)
    # The limit itself need not be a multiple of the bucket.
    length = min(_round_up(longest, BUCKET), limit - max_new_tokens)
    tokens = _generate(
      params,
      spec,
      pad_left([prompts[i] for i in chosen], rows, length),
      -1 if stop is None else stop,
      jax.random.fold_in(rng, start),
      max_new_tokens=max_new_tokens,
      sampler=sampler,
    )
    for i, row in zip(chosen, np.asarray(tokens), strict=False):
      out[i] = [int(t) for t in row if t >= 0]
  return out


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
