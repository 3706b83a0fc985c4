"""Augmenting models with tokens of their own, fed while texts grow.

They cannot read along on the device: between two steps, the host tokenizes
anew what the anchor's newest tokens spell.
"""

import logging
from collections.abc import Sequence as Rows

import numpy as np

from calm_jax.composition import visibility
from calm_jax.composition.connections import Augmenting
from calm_jax.composition.model import Model
from calm_jax.core.batch import Batch, Control
from calm_jax.generation import batching, decode_steps
from calm_jax.generation.batching import Readers
from calm_jax.text.alignment import AlignedReader

_log = logging.getLogger(__name__)


def first_slots(length: int) -> int:
  """Slots of a follower's cache at first, for prompts of so many tokens."""
  return batching.round_up(2 * length)


class Follower:
  """Feeds one augmenting model the tokens that growing texts complete.

  Attributes:
    readers: of the rows' texts; None at a row without one.
    lengths_B: tokens that it has read of each row.
    slot, slots: the next free slot of its cache, and how many there are, which
      grow if they do not suffice.
  """

  def __init__(
    self,
    name: str,
    joined: Augmenting,
    readers: Rows[AlignedReader | None],
    lengths_B: np.ndarray,
    slot: int,
    slots: int,
  ):
    self.name, self._joined = name, joined
    self.readers, self.lengths_B = list(readers), lengths_B
    self.slot, self.slots = slot, slots

  def follow(
    self, model: Model, cache: dict, new_B: np.ndarray, control: Control | None
  ) -> tuple[dict, np.ndarray]:
    """Reads what the newest token of each row (-1 for none) completes.

    The cache of all models is donated.

    Returns:
      The new cache, and the rows [B] whose texts end here, since the model
      would read beyond its length limit.
    """
    ids = [
      reader.push(int(token)) if reader is not None and token >= 0 else []
      for reader, token in zip(self.readers, new_B, strict=False)
    ]
    counts_B = np.array([*map(len, ids), *[0] * (len(new_B) - len(ids))])
    limit = self._joined.config.max_length
    is_full_B = (counts_B > 0) & (self.lengths_B + counts_B > limit)
    if is_full_B.any():
      texts = "%d texts end early: augmenting model %r has read its %d tokens"
      _log.warning(texts, is_full_B.sum(), self.name, limit)
      ids = [
        [] if is_full else row
        for row, is_full in zip(ids, is_full_B, strict=False)
      ]
    longest = max(map(len, ids), default=0)
    if not longest:
      return cache, is_full_B
    size = 1 << (longest - 1).bit_length()
    if self.slot + size > self.slots:
      self.slots = batching.round_up(2 * self.slots)
      cache = decode_steps.grow(cache, self.name, self.slots)
    sequence = batching.pad(ids, len(new_B), size, first=self.lengths_B)
    self.lengths_B = self.lengths_B + (sequence.segments > 0).sum(axis=1)
    slot = np.int32(self.slot)
    self.slot += size
    cache = decode_steps.feed(
      model.params, model.spec, cache, sequence, slot, control, name=self.name
    )
    return cache, is_full_B


def names(model: Model) -> list[str]:
  """The augmenting models that are fed while a text grows."""
  return [
    name
    for name, joined in model.spec.augmenting
    if name in model.tokenizers and visibility.reads_new_text(joined.visibility)
  ]


def of_batch(model: Model, batch: Batch, readers: Readers) -> list[Follower]:
  """The followers of a batch that `batching.batches` yields with readers."""
  joined, made = dict(model.spec.augmenting), []
  for name in names(model):
    row = batch.augmenting[name]
    length, read_B = row.tokens.shape[1], row.segments.sum(axis=1)
    slots = length, first_slots(length)
    made.append(Follower(name, joined[name], readers[name], read_B, *slots))
  return made
