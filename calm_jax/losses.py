"""Losses, as sums and weights, so that any split of a batch adds up."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(logits_BLV: Array, targets_BL: Array, weights_BL: Array):
  """Cross-entropy of the targets, summed over each row.

  Args:
    logits_BLV: float32.
    targets_BL: int32 token ids.
    weights_BL: float32; 0 where a position has no target or is a prompt's.

  Returns:
    (weighted losses in nats [B], weights [B]).
  """
  target_BL1 = jnp.take_along_axis(logits_BLV, targets_BL[..., None], -1)
  loss_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - target_BL1[..., 0]
  return jnp.sum(loss_BL * weights_BL, axis=-1), jnp.sum(weights_BL, axis=-1)
