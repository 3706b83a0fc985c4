"""Augmenting models with tokenizers of their own, while texts are generated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import augmenting
from calm_jax.composition.connections import Augmenting, Composition
from calm_jax.core.batch import Sequence
from calm_jax.generation import batching
from calm_jax.text.alignment import AlignedReader

Array = jax.Array

_KINDS = ("augmenting", "cross")  # of caches, by the augmenting models' names


@functools.partial(
  jax.jit, static_argnames=("spec", "name"), donate_argnames="cache"
)
def feed(
  params: dict,
  spec: Composition,
  cache: dict,
  sequence: Sequence,
  index: Array,
  *,
  name: str,
) -> dict:
  """An augmenting model reads tokens [B, M] into slots index .. of the cache.

  The cache of all models, which is returned, is donated.
  """
  new = augmenting.keys_values(params, spec, name, sequence, cache, index)
  return cache | {kind: cache[kind] | {name: new[kind]} for kind in _KINDS}


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
    self.slots = batching.round_up(2 * self._slot)

  def follow(
    self, params: dict, spec: Composition, cache: dict, new_B: np.ndarray
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
      cache = _grown(cache, self.name, self.slots)
    sequence = batching.pad(ids, len(new_B), size, first=self._lengths_B)
    self._lengths_B = self._lengths_B + (sequence.segments > 0).sum(axis=1)
    batching.check_length(self.name, self._joined, self._lengths_B.max())
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

  old = cache["augmenting"][name]
  new = {
    "augmenting": {
      "layers": jax.tree.map(grow, old["layers"]),
      "segments": grow(old["segments"], 1),
    },
    "cross": jax.tree.map(grow, cache["cross"][name]),
  }
  return cache | {kind: cache[kind] | {name: new[kind]} for kind in _KINDS}
