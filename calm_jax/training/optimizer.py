"""The optimizer: AdamW over the trainable leaves of a tree, nothing else."""

from __future__ import annotations

import re

import jax
import optax

from calm_jax.core import trees
from calm_jax.core.errors import InputError


def schedule(
  kind: str, peak: float, steps: int, warmup: int, final: float
) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then "cosine" or "constant".

  Args:
    kind: "cosine" (down to final * peak at the last step) or "constant".
    peak: the highest learning rate.
    steps: length of the whole run.
    warmup: steps from 0 to the peak.
    final: the last learning rate as a fraction of the peak.
  """
  if kind not in ("cosine", "constant"):
    raise InputError(f"schedule={kind!r} is neither 'cosine' nor 'constant'")
  if not 0 <= warmup < steps:
    raise InputError(f"warmup={warmup} does not lie within steps={steps}")
  rise = optax.linear_schedule(0.0, peak, warmup)
  rest = (
    optax.cosine_decay_schedule(peak, steps - warmup, alpha=final)
    if kind == "cosine"
    else optax.constant_schedule(peak)
  )
  return optax.join_schedules([rise, rest], [warmup])


def optimizer(
  trainable_mask: dict,
  learning_rate: optax.Schedule,
  *,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  decay: str,
  clip: float,
) -> optax.GradientTransformation:
  """AdamW with a global-norm clip, masked to the trainable leaves.

  `optax.masked` lets the updates of the other leaves pass: feed it zeros
  there, as `update` does.

  Args:
    trainable_mask: bool at every leaf of the tree.
    learning_rate: from `schedule`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay of the leaves whose last name matches.
    decay: regex over the last part of a leaf's name.
    clip: largest global norm of the trainable gradients.
  """

  def decays(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: re.fullmatch(decay, path[-1].key) is not None, tree
    )

  return optax.masked(
    optax.chain(
      optax.clip_by_global_norm(clip),
      optax.adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=decays,
      ),
    ),
    trainable_mask,
  )


def update(
  tx: optax.GradientTransformation,
  grads: dict,
  opt_state: optax.OptState,
  trainable: dict,
  frozen: dict,
) -> tuple[dict, optax.OptState]:
  """One step of a masked optimizer on the trainable partition.

  Args:
    tx: from `optimizer`, masked over the merged tree.
    grads: gradients of the trainable leaves only.
    opt_state: its state.
    trainable: the trainable leaves.
    frozen: the other leaves; never read, their shapes complete the tree.

  Returns:
    (new trainable leaves, new state).
  """
  zeros = jax.tree.map(lambda _: 0.0, frozen)
  updates, opt_state = tx.update(
    trees.merge(grads, zeros), opt_state, trees.merge(trainable, frozen)
  )
  updates = trees.flatten(updates)
  chosen = {name: updates[name] for name in trees.flatten(trainable)}
  return optax.apply_updates(trainable, trees.unflatten(chosen)), opt_state
