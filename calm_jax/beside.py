"""What augmenting models with other tokens read beside an anchor's ids."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calm_jax.alignment import AugmentingStream, ChunkEncoder
from calm_jax.composition import Sequence
from calm_jax.tokenizer import Tokenizer


def from_ids(
  anchor: Tokenizer,
  augmenting: Mapping[str, Tokenizer],
  tokens_BL: np.ndarray,
  prompt_length: int = 0,
) -> tuple[dict[str, Sequence], dict[str, np.ndarray]]:
  """Augmenting rows of the texts that the anchor's ids spell.

  Args:
    anchor: the tokenizer that spells the ids.
    augmenting: by name, of the models with other tokens.
    tokens_BL: full rows of one segment each.
    prompt_length: how many ids of each row are its prompt, if known; its end
      closes a chunk (see `alignment`).

  Returns:
    By name the rows [B, M] and int32 [B, L], how many tokens of its row each
    of the anchor's may see.

  Raises:
    InputError: the anchor's tokenizer cannot tell what its ids spell.
  """
  parts = [anchor.spell(ids) for ids in tokens_BL.tolist()]
  rows, visible = {}, {}
  for name, tokenizer in augmenting.items():
    encoder = ChunkEncoder(tokenizer)
    pairs = [_read(encoder, row, prompt_length) for row in parts]
    visible[name] = np.array([counts for _, counts in pairs], np.int32)
    M = max(1, *(len(ids) for ids, _ in pairs))
    lengths_B1 = np.array([[len(ids)] for ids, _ in pairs])
    positions_BM = np.tile(np.arange(M, dtype=np.int32), (len(pairs), 1))
    tokens_BM = np.zeros_like(positions_BM)
    for row, (ids, _) in zip(tokens_BM, pairs, strict=True):
      row[: len(ids)] = ids
    segments_BM = (positions_BM < lengths_B1).astype(np.int32)
    rows[name] = Sequence(tokens_BM, segments_BM, positions_BM)
  return rows, visible


def _read(encoder: ChunkEncoder, parts: list[bytes], prompt_length: int):
  """(augmenting ids, how many of them each of the anchor's may see)."""
  stream, counts = AugmentingStream(encoder), []
  for count, part in enumerate(parts, start=1):
    stream.push(part)
    if count == prompt_length:
      stream.cut()
    counts.append(len(stream.ids))
  return stream.ids, counts
