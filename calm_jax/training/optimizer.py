"""The optimizer: AdamW for the trainable leaves of a tree of parameters."""

import dataclasses
import re
from typing import Any

import jax
import optax

from calm_jax.core import trees
from calm_jax.core.errors import InputError, check_choice
from calm_jax.training.stage import Stage

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Updates the leaves of a tree at which the mask is True.

  `optax.masked` builds the transformation over the whole tree. State and
  gradients exist for trainable leaves only: optax's `MaskedNode` stands for
  each frozen one.
  """

  transformation: optax.GradientTransformation
  learning_rate: optax.Schedule
  mask: Tree

  def init(self, trainable: Tree) -> optax.OptState:
    """Returns the state before the first update of the trainable leaves."""
    return self.transformation.init(self._masked_tree(trainable))

  def update(
    self, gradients: Tree, state: optax.OptState, trainable: Tree
  ) -> tuple[Tree, optax.OptState]:
    """Returns the trainable leaves and the state after one update."""
    updates, state = self.transformation.update(
      self._masked_tree(gradients), state, self._masked_tree(trainable)
    )
    updates, _ = trees.partition(updates, self.mask)
    return optax.apply_updates(trainable, updates), state

  def _masked_tree(self, trainable: Tree) -> Tree:
    frozen = dict.fromkeys(trees.flatten(self.mask), optax.MaskedNode())
    return trees.unflatten(frozen | trees.flatten(trainable))


def make_optimizer(stage: Stage, mask: Tree) -> Optimizer:
  """AdamW with a clip of the global norm, for the leaves of a `trees.mask`."""
  learning_rate = schedule(stage)

  def decayed(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: re.fullmatch(stage.decay, path[-1].key) is not None, tree
    )

  adamw = optax.adamw(
    learning_rate,
    b1=stage.b1,
    b2=stage.b2,
    eps=stage.eps,
    weight_decay=stage.weight_decay,
    mask=decayed,
  )
  clipped = optax.chain(optax.clip_by_global_norm(stage.clip), adamw)
  return Optimizer(optax.masked(clipped, mask), learning_rate, mask)


def schedule(stage: Stage) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then "cosine" or "constant".

  Raises InputError if it is neither, or the warm-up takes all steps.
  """
  kind, peak, warmup = stage.schedule, stage.learning_rate, stage.warmup
  check_choice("schedule", kind, ("cosine", "constant"))
  if not 0 <= warmup < stage.steps:
    raise InputError(f"warmup={warmup} does not lie within steps={stage.steps}")
  rise = optax.linear_schedule(0.0, peak, warmup)
  rest = optax.constant_schedule(peak)
  if kind == "cosine":
    steps = stage.steps - warmup
    rest = optax.cosine_decay_schedule(peak, steps, alpha=stage.final)
  return optax.join_schedules([rise, rest], [warmup])
