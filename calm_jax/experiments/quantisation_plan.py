"""Decides when the models of a run are quantised.

One that no stage trains is while it is loaded. One that a stage trains is
before the last stage, and its exact leaves are kept to be written out.
"""

import re
from collections.abc import Iterable
from typing import Any

from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.experiments.settings import Settings
from calm_jax.models import quantisation
from calm_jax.parallel import processes


def bits_when_loaded(settings: Settings, side: str, shapes: dict) -> str:
  """The quantisation of a model all through the run; "" if only at its end.

  `side` is one of `settings.parts`, `shapes` the model's own tree.
  """
  names = [f"{settings.parts[side]}/{n}" for n in trees.flatten(shapes)]
  stages = (*settings.recipe, *settings.alternatives)
  is_random = side != "anchor" and settings.random_augmenting
  is_made_here = is_random or side not in settings.checkpoints
  if is_made_here or training_stage(settings, stages, names):
    return ""
  return _bits(settings, side)


def _bits(settings: Settings, side: str) -> str:
  return getattr(settings.quantise, side.partition("/")[0])


def check(settings: Settings, params: dict) -> None:
  """Raises InputError if a last stage trains what is quantised by then."""
  for side, part in settings.parts.items():
    bits = _bits(settings, side)
    quantisation.check(bits)
    names = [n for n in trees.flatten(params) if n.startswith(f"{part}/")]
    if bits and (name := training_stage(settings, settings.ends, names)):
      raise InputError(
        f"config.quantise wants the {part} in {bits}, but the stage {name!r} "
        "trains it: only frozen models are quantised"
      )


def training_stage(
  settings: Settings, stages: Iterable[str], names: list[str]
) -> str | None:
  """The first of the stages that trains one of the leaves with these names."""
  for stage in stages:
    for pattern in settings.stages[stage].trainable:
      if any(re.fullmatch(pattern, name) for name in names):
        return stage
  return None


def quantise(settings: Settings, params: dict) -> dict:
  """The whole tree, quantised as for the last stage where it is not yet."""

  def quantised(tree: dict, bits: str) -> dict:
    is_done = quantisation.kind_of(tree)
    return tree if is_done else quantisation.quantise(tree, bits)

  anchor = quantised(params["anchor"], settings.quantise.anchor)
  augmenting = {
    name: quantised(tree, settings.quantise.augmenting)
    for name, tree in params["augmenting"].items()
  }
  return params | {"anchor": anchor, "augmenting": augmenting}


def exact_leaves(params: dict, quantised: dict) -> dict[str, Any]:
  """The leaves that `quantise` replaced, by name, in the host's memory."""
  kept = trees.flatten(quantised)
  leaves = trees.flatten(params).items()
  return {n: processes.fetch(leaf) for n, leaf in leaves if n not in kept}


def undo(params: dict, exact: dict[str, Any]) -> dict:
  """A quantised tree with its exact leaves in their old places."""
  leaves = trees.flatten(params).items()
  rest = {n: leaf for n, leaf in leaves if n.rpartition("/")[0] not in exact}
  return trees.unflatten(rest | exact)
