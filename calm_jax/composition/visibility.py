"""Visibility: the tokens of an augmenting model that a position may attend to.

All cases come down to one number: an anchor position may attend to the slots
of the augmenting model's row that lie before its visible count.

    the same tokens, causal    the slot of the position itself, plus one
    other tokens, causal       counted by the text; see `text.alignment`
    encoder (§4.4)             the same, up to what the prompt's last token sees
    unmasked                   all, which leaks the targets in training; under
                               a `Control` what it sees in generation: the
                               prompt, and what the position itself has read

B batch, L anchor length, M augmenting length.
"""

import jax
import jax.numpy as jnp

from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError
from calm_jax.models.attention import SegmentMask

Array = jax.Array

VISIBILITIES = ("causal", "encoder", "unmasked")
_EVERYTHING = jnp.iinfo(jnp.int32).max


def reads_new_text(visibility: str) -> bool:
  """Returns whether an augmenting model reads on while text is generated."""
  return visibility != "encoder"


def visible_counts(
  visibility: str, batch: Batch, name: str, first_slot: Array | int = 0
) -> Array:
  """Visible slots of an augmenting model's row by position, int32 [B, L].

  Args:
    visibility: the model's; one of VISIBILITIES.
    batch: the rows that are read. With a cache they hold only the newest
      tokens; if there are none for this model, all slots that it has cached
      are visible (of an encoder, those of the prompt).
    name: the augmenting model's.
    first_slot: the slot of the first token; not 0 with a cache only.

  Raises:
    InputError: an encoder, and the batch does not say where prompts end.
  """
  shape = batch.anchor.tokens.shape
  same_tokens = name not in batch.augmenting
  reads = same_tokens or batch.augmenting[name].tokens.shape[1]
  as_generated = batch.control is not None and batch.prompt_ends is not None
  if not reads or (visibility == "unmasked" and not as_generated):
    return jnp.full(shape, _EVERYTHING, jnp.int32)
  if name in batch.visible:
    causal_BL = batch.visible[name]
    if batch.control is not None:
      # A position sees what the position beside it sees of the other row, at
      # last all of it.
      given_BL = causal_BL[batch.control.rows_B]
      causal_BL = jax.lax.cummax(jnp.asarray(given_BL), axis=1)
  else:
    slots_L = first_slot + jnp.arange(1, shape[1] + 1, dtype=jnp.int32)
    causal_BL = jnp.broadcast_to(slots_L, shape)
  if visibility == "causal":
    return causal_BL
  if batch.prompt_ends is None:
    raise InputError(
      "visibility='encoder' needs to know where prompts end: give the batch "
      "`prompt_ends`"
    )
  at_prompt_BL = batch.prompt_ends
  if not same_tokens:
    last_BL = jnp.maximum(batch.prompt_ends - 1, 0)
    at_prompt_BL = jnp.take_along_axis(causal_BL, last_BL, axis=1)
  limit = jnp.maximum if visibility == "unmasked" else jnp.minimum
  return limit(at_prompt_BL, causal_BL)


def attention_mask(
  visibility: str,
  batch: Batch,
  name: str,
  key_segments_BM: Array,
  index: Array | None = None,
  by_segments: bool = False,
) -> Array | SegmentMask:
  """Cross-attention's mask, bool [B, L, M]: visible slots of one's segment.

  The other arguments are as for `visible_counts`. If `by_segments`, it is a
  `SegmentMask` where that says the same.
  """
  segments_BL = batch.anchor.segments
  reads_anchor = name not in batch.augmenting and name not in batch.visible
  if by_segments and visibility == "causal" and reads_anchor:
    return SegmentMask(segments_BL, key_segments_BM, batch.anchor.positions)
  first_slot = 0 if index is None else index
  visible_BL = visible_counts(visibility, batch, name, first_slot)
  slots_M = jnp.arange(key_segments_BM.shape[1])
  same_BLM = segments_BL[:, :, None] == key_segments_BM[:, None, :]
  return (slots_M < visible_BL[:, :, None]) & same_BLM
