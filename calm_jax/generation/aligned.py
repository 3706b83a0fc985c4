"""Augmenting models with tokenizers of their own, while texts grow."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import forward
from calm_jax.core.batch import Sequence
from calm_jax.generation import batching
from calm_jax.generation.batching import Reader


@functools.partial(
  jax.jit, static_argnames=("spec", "name"), donate_argnames="cache"
)
def feed(params, spec, cache: dict, sequence: Sequence, index, *, name: str):
  """An augmenting model reads tokens [B, M] into slots index .. ; the cache."""
  kinds = ("augmenting", "cross")
  own = {kind: cache[kind][name] for kind in kinds}
  own = forward.read_on(params, spec, name, sequence, own, index)
  return cache | {kind: cache[kind] | {name: own[kind]} for kind in kinds}


class Follower:
  """An augmenting model with its own tokenizer, while texts grow."""

  def __init__(self, name, joined, readers: list[Reader], prompt: Sequence):
    self.name, self._joined, self._readers = name, joined, readers
    self._read_B = prompt.segments.sum(axis=1)
    self._slot = prompt.tokens.shape[1]
    self.slots = batching.round_up(2 * self._slot)

  def follow(self, params, spec, cache: dict, new_B) -> dict:
    """Reads what the newest tokens complete, -1 is none; the cache."""
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
      cache = _grown(cache, self.name, self.slots)
    sequence = batching.pad_left(ids, len(new_B), size, self._read_B)
    self._read_B = self._read_B + (sequence.segments > 0).sum(axis=1)
    batching.check_length(self.name, self._joined, self._read_B.max())
    cache = feed(
      params, spec, cache, sequence, np.int32(self._slot), name=self.name
    )
    self._slot += size
    return cache


def _grown(cache: dict, name: str, slots: int) -> dict:
  """The cache with more slots for one augmenting model."""

  def grow(x, axis=3):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, slots - x.shape[axis])
    return jnp.pad(x, widths)

  own = cache["augmenting"][name]
  own = {
    "layers": jax.tree.map(grow, own["layers"]),
    "segments": grow(own["segments"], 1),
  }
  cross = jax.tree.map(grow, cache["cross"][name])
  return cache | {
    "augmenting": cache["augmenting"] | {name: own},
    "cross": cache["cross"] | {name: cross},
  }
