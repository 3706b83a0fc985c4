"""What augmenting models with other tokens read beside an anchor's ids."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from calm_jax.composition.cross_attention import limit_visible, visible_tokens
from calm_jax.core.batch import Sequence, plain_sequence
from calm_jax.text.alignment import AugmentingStream, ChunkEncoder
from calm_jax.text.tokenizer import Tokenizer


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
  rows, visible = {}, {}
  for name, tokenizer in augmenting.items():
    encoder = ChunkEncoder(tokenizer)
    pairs = [
      TextReader(anchor, encoder).read(ids, prompt_length)
      for ids in tokens_BL.tolist()
    ]
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


def of_model(model, tokens_BL, prompt_length: int):
  """See `LanguageModel.beside`."""
  if not model.tokenizers:
    return None, None
  rows, visible = from_ids(
    model.text(), model.tokenizers, np.asarray(tokens_BL), prompt_length
  )
  sequence = plain_sequence(jnp.asarray(tokens_BL, jnp.int32))
  ends_BL = jnp.full(sequence.tokens.shape, prompt_length)
  for name, joined in model.spec.augmenting:
    if name in model.tokenizers:
      visible[name] = limit_visible(joined.visibility, visible[name], ends_BL)
    else:
      rows[name] = sequence
      visible[name] = visible_tokens(joined.visibility, ends_BL.shape, ends_BL)
  return rows, visible


class TextReader:
  """A `batching.Reader`: an augmenting model beside one text of the anchor."""

  def __init__(self, anchor: Tokenizer, encoder: ChunkEncoder):
    self._anchor, self._stream = anchor, AugmentingStream(encoder)
    self._ids: list[int] = []

  def read(
    self, ids: list[int], prompt_length: int
  ) -> tuple[list[int], list[int]]:
    """The visible tokens of a text, and how many each anchor token may see."""
    counts = []
    for count, part in enumerate(self._anchor.spell(ids), start=1):
      self._stream.push(part)
      if count == prompt_length:
        self._stream.cut()
      counts.append(len(self._stream.ids))
    self._ids += ids
    return list(self._stream.ids), counts

  def push(self, token: int) -> list[int]:
    """The tokens that one more token of the anchor makes visible."""
    [part] = self._anchor.spell([token], previous=self._ids)
    self._ids.append(token)
    return self._stream.push(part)
