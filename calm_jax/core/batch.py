"""Batches: rows of tokens as every model of a composition reads them.

A batch is made once, by data or from a prompt, and read by training, scoring
and generation. B rows, L slots of an anchor's row, M of an augmenting model's.
"""

from typing import Any, NamedTuple

import numpy as np

Array = Any  # of NumPy or JAX


class Sequence(NamedTuple):
  """Rows of tokens, each array int32 [B, L]."""

  tokens: Array  # token ids, 0 at padding
  segments: Array  # number of the example in its row, from 1; 0 at padding
  positions: Array  # place of the token within its segment, from 0


class Control(NamedTuple):
  """Changes what an anchor is given of m_A's states, at inference only.

  All of it is data: one compiled program serves every control of an audit.
  """

  rows_B: Array  # int32 [B], the row whose states each row is given
  noise: Array  # bool [], whether it is given noise of their norms instead
  seed: Array  # uint32 [], of the noise
  # By augmenting model and connection float32 [], 0 to take one out, else 1.
  gates: dict[str, dict[str, Array]]


class Batch(NamedTuple):
  """Rows of tokens for all models, and what is to be predicted."""

  anchor: Sequence  # the anchor's rows, [B, L]
  # By name the rows [B, M] of each augmenting model whose tokens are not the
  # anchor's; the others read `anchor`.
  augmenting: dict[str, Sequence]
  # By the same names int32 [B, L]: how many slots of the augmenting row each
  # slot of the anchor's may see by causality alone, 0 at padding.
  visible: dict[str, Array]
  # Int32 [B, L]: the slot one past the last prompt token of the segment (one
  # past the BOS for plain text), 0 at padding; None if there is no prompt.
  prompt_ends: Array | None = None
  # Int32 [B, L]: the next token of the segment, 0 where there is none.
  targets: Array | None = None
  # Float32 [B, L]: 1 where a target counts, else 0.
  weights: Array | None = None
  control: Control | None = None  # None to give the states as they are


def plain_batch(tokens_BL: Array) -> Batch:
  """Full rows of one text each, which all models read."""
  return Batch(plain_sequence(tokens_BL), {}, {})


def plain_sequence(tokens_BL: Array) -> Sequence:
  """Full rows of one segment each, for token ids int32 [B, L]."""
  shape = tokens_BL.shape
  positions_BL = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
  return Sequence(tokens_BL, np.ones(shape, np.int32), positions_BL)
