"""The optimizer of the trainable leaves of a tree: AdamW, or Muon."""

import dataclasses
import re
from collections.abc import Hashable
from typing import Any

import jax
import optax
from optax import contrib

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
  ) -> tuple[Any, optax.OptState]:
    """Returns the trainable leaves and the state after one update."""
    made: Any = self.transformation.update(
      self._masked_tree(gradients), state, self._masked_tree(trainable)
    )
    updates, _ = trees.partition(made[0], self.mask)
    return optax.apply_updates(trainable, updates), made[1]

  def _masked_tree(self, trainable: Tree) -> Tree:
    frozen = dict.fromkeys(trees.flatten(self.mask), optax.MaskedNode())
    return trees.unflatten(frozen | trees.flatten(trainable))


def make_optimizer(stage: Stage, mask: Tree) -> Optimizer:
  """The stage's optimizer of the leaves of a `trees.mask`.

  The gradients' global norm is clipped, then "adamw" or "muon" makes updates of
  them, the leaves decay, and the learning rate scales both.

  Raises InputError for another optimizer, or a schedule that cannot be.
  """
  check_choice("optimizer", stage.optimizer, ("adamw", "muon"))
  learning_rate = schedule(stage)

  def decayed(tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: re.fullmatch(stage.decay, path[-1].key) is not None, tree
    )

  direction = optax.scale_by_adam(stage.b1, stage.b2, stage.eps)
  if stage.optimizer == "muon":
    transformations: dict[Hashable, Any] = {"muon": _muon(), "adam": direction}
    direction = optax.partition(transformations, _optimizers_of_leaves)
  # Nested as optax.adamw is, for checkpoints of earlier versions.
  updates = optax.chain(
    direction,
    optax.add_decayed_weights(stage.weight_decay, decayed),
    optax.scale_by_learning_rate(learning_rate),
  )
  clipped = optax.chain(optax.clip_by_global_norm(stage.clip), updates)
  return Optimizer(optax.masked(clipped, mask), learning_rate, mask)


def _muon() -> optax.GradientTransformation:
  """Orthogonal updates of matrices, as large as those of AdamW usually are.

  An orthogonal matrix is multiplied by 0.3 sqrt(its longer side), which gives
  its entries a root mean square of about 0.3 whatever the shape. That of AdamW
  is 0.2 to 0.4 (arXiv 2502.16982, section 2.2), so one learning rate suits all
  leaves.
  """

  def matrices(tree: Any) -> Any:
    # Layers and experts are stacked on the dimensions before the last two.
    numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda _: numbers, tree)

  def scale(x: jax.Array) -> jax.Array:
    return x * (0.3 * max(x.shape[-2:]) ** 0.5)

  return optax.chain(
    contrib.scale_by_muon(weight_dimension_numbers=matrices),
    optax.stateless(lambda updates, _: jax.tree.map(scale, updates)),
  )


def _optimizers_of_leaves(tree: Tree) -> Tree:
  """Says "muon" for the matrices between hidden states, else "adam".

  Embeddings, the head and LoRA's thin matrices are Adam's, as are vectors.
  """

  def choose(path: tuple, _) -> str:
    *_, owner, name = (key.key for key in path)
    return "muon" if name == "kernel" and owner != "head" else "adam"

  return jax.tree_util.tree_map_with_path(choose, tree)


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
