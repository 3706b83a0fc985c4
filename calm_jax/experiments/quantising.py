"""Which models of a run are quantised, and when; see `models.quantisation`.

One that no stage trains is quantised as it is read. One that a stage trains is
quantised before the last stage, and kept as it was to be written out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from calm_jax.composition import pretrained
from calm_jax.core import hub, trees
from calm_jax.core.errors import InputError
from calm_jax.language_model import LanguageModel
from calm_jax.models import decoder, quantisation
from calm_jax.models.hf import loading
from calm_jax.parallel import processes


def load(
  settings: dict[str, Any], side: str, part: str, shardings: Callable | None
) -> LanguageModel:
  """Loads a model, quantised if it is so all through the run.

  Args:
    settings: of the run.
    side: "anchor" or "augmenting".
    part: its name in the tree.
    shardings: see `language_model.load_model`.
  """
  source = hub.locate(settings[side])
  shapes = decoder.param_shapes(loading.load_config(source.folder))
  kind = from_the_start(settings, side, part, shapes)
  model = pretrained.load(source, settings["dtype"], shardings, kind)
  return LanguageModel(**vars(model))


def from_the_start(
  settings: dict[str, Any], side: str, part: str, shapes: dict
) -> str:
  """What a model is quantised to all through the run; "" if it is so later.

  Args:
    settings, side, part: as for `load`.
    shapes: of the model.
  """
  names = [f"{part}/{n}" for n in trees.flatten(shapes)]
  stages = (*settings["recipe"], *settings["alternatives"])
  changed = side == "augmenting" and settings["random_augmenting"]
  if changed or not settings[side] or _trains(settings, stages, names):
    return ""
  return settings["quantise"][side]


def check(settings: dict[str, Any], params: dict, ends: Iterable[str]) -> None:
  """Checks that no last stage trains what is to be quantised by then.

  Raises:
    InputError: one does, or an unknown kind of quantisation.
  """
  kinds = _kinds(settings)
  for kind in kinds.values():
    quantisation.check(kind)
  for part, kind in kinds.items():
    names = [n for n in trees.flatten(params) if n.startswith(f"{part}/")]
    if kind and (name := _trains(settings, ends, names)):
      raise InputError(
        f"config.quantise wants the {part} in {kind}, but the stage {name!r} "
        "trains it: only frozen models are quantised"
      )


def quantise(
  settings: dict[str, Any], params: dict
) -> tuple[dict, dict[str, Any]]:
  """The whole tree with the models quantised as config.quantise says.

  Returns:
    (tree, {name: leaf as it was}), the latter in the host's memory.
  """
  kinds = _kinds(settings)
  made, exact = {}, {}
  for name, leaf in trees.flatten(params).items():
    part = next((p for p in kinds if name.startswith(f"{p}/")), None)
    made[name] = leaf
    if part is not None:
      inside = name.removeprefix(f"{part}/")
      made[name] = quantisation.of_leaf(inside, leaf, kinds[part])
    if made[name] is not leaf:
      exact[name] = processes.fetch(leaf)
  return trees.unflatten(made), exact


def undo(params: dict, exact: dict[str, Any]) -> dict:
  """The whole tree with the leaves that `quantise` kept."""
  rest = {
    name: leaf
    for name, leaf in trees.flatten(params).items()
    if name.rpartition("/")[0] not in exact
  }
  return trees.unflatten(rest | exact)


def _kinds(settings: dict[str, Any]) -> dict[str, str]:
  """The kinds by the parts of the tree."""
  kinds = settings["quantise"]
  augmenting = f"augmenting/{settings['augmenting_name']}"
  return {"anchor": kinds["anchor"], augmenting: kinds["augmenting"]}


def _trains(
  settings: dict[str, Any], stages: Iterable[str], names: list[str]
) -> str | None:
  """The first of the stages that trains one of these leaves."""
  for stage in stages:
    for pattern in settings["stages"][stage]["trainable"]:
      if any(re.fullmatch(pattern, name) for name in names):
        return stage
  return None
