"""Decides which models of a run are quantised, and when.

A model that no stage trains is quantised while it is loaded. One that a stage
trains is quantised before the last stage, and its exact leaves are kept to be
written out.
"""

from __future__ import annotations

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

  Args:
    settings: of the run.
    side: "anchor" or "augmenting".
    shapes: of the model's own tree.
  """
  names = [f"{settings.parts[side]}/{n}" for n in trees.flatten(shapes)]
  stages = (*settings.recipe, *settings.alternatives)
  is_random = side == "augmenting" and settings.random_augmenting
  is_made_here = is_random or side not in settings.checkpoints
  if is_made_here or _training_stage(settings, stages, names):
    return ""
  return getattr(settings.quantise, side)


def check(settings: Settings, params: dict) -> None:
  """Checks that no last stage trains a model that is quantised by then.

  Raises:
    InputError: one does, or an unknown kind of quantisation.
  """
  for side, part in settings.parts.items():
    bits = getattr(settings.quantise, side)
    quantisation.check(bits)
    names = [n for n in trees.flatten(params) if n.startswith(f"{part}/")]
    if bits and (name := _training_stage(settings, settings.ends, names)):
      raise InputError(
        f"config.quantise wants the {part} in {bits}, but the stage {name!r} "
        "trains it: only frozen models are quantised"
      )


def quantise(settings: Settings, params: dict) -> dict:
  """The whole tree, quantised as for the last stage where it is not yet."""
  bits = settings.quantise
  augmenting = {
    name: _quantised(tree, bits.augmenting)
    for name, tree in params["augmenting"].items()
  }
  return params | {
    "anchor": _quantised(params["anchor"], bits.anchor),
    "augmenting": augmenting,
  }


def _quantised(params: dict, bits: str) -> dict:
  if quantisation.kind_of(params):
    return params
  return quantisation.quantise(params, bits)


def exact_leaves(params: dict, quantised: dict) -> dict[str, Any]:
  """The leaves that `quantise` replaced, by name, in the host's memory."""
  kept = trees.flatten(quantised)
  return {
    name: processes.fetch(leaf)
    for name, leaf in trees.flatten(params).items()
    if name not in kept
  }


def undo(params: dict, exact: dict[str, Any]) -> dict:
  """A quantised tree with its exact leaves in their old places."""
  rest = {
    name: leaf
    for name, leaf in trees.flatten(params).items()
    if name.rpartition("/")[0] not in exact
  }
  return trees.unflatten(rest | exact)


def _training_stage(
  settings: Settings, stages: Iterable[str], names: list[str]
) -> str | None:
  """The first of the stages that trains one of these leaves."""
  for stage in stages:
    for pattern in settings.stages[stage].trainable:
      if any(re.fullmatch(pattern, name) for name in names):
        return stage
  return None
