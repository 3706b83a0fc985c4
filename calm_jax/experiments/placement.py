"""Models on a mesh: the parts of the tree, and what each is told of it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from calm_jax import language_model
from calm_jax.core import trees
from calm_jax.language_model import LanguageModel
from calm_jax.parallel import mesh
from calm_jax.parallel.sharding import Layout


def layout_of(
  settings: Mapping[str, Any], devices: Sequence[jax.Device] | None = None
) -> Layout | None:
  """The layout of "mesh", "replicated" and "sharding"; None for one device.

  Args:
    settings: of an experiment, or these three of them.
    devices: see `mesh.make_mesh`.
  """
  axes = mesh.make_mesh(settings["mesh"], devices)
  if axes is None:
    return None
  replicated = tuple((pattern, ()) for pattern in settings["replicated"])
  return Layout(axes, (*replicated, *settings["sharding"]))


def place(model: LanguageModel, layout: Layout | None) -> LanguageModel:
  """The model with its parameters where a layout says; as it is for None.

  A single model is placed as an anchor. It generates and scores as before; on
  several processes all of them call it together, and with the same arguments.
  """
  if layout is None:
    return model
  spec = model.spec.with_compute(lambda part: {"place": layout.at(f"{part}/")})
  params = layout.place(model.params)
  return dataclasses.replace(model, spec=spec, params=params)


def load(
  path_or_hub_id: str | os.PathLike,
  layout: Layout | None,
  dtype: str | None = None,
  quantise: str | None = None,
) -> LanguageModel:
  """`language_model.load_any`, each process keeping what its devices hold.

  To check a composition's hashes each reads all of its files.
  """
  places = layout and functools.partial(shardings, layout)
  model = language_model.load_any(
    path_or_hub_id, dtype, quantise, shardings=places
  )
  return place(model, layout)


def shardings(layout: Layout | None, part: str) -> Callable | None:
  """What `language_model.load_model` is told of a model; None without a layout.

  Args:
    layout: of the whole tree.
    part: which the model is, "anchor" or "augmenting/<name>".
  """
  if layout is None:
    return None

  def of_shapes(shapes):
    whole = {f"{part}/{n}": leaf for n, leaf in trees.flatten(shapes).items()}
    placed = trees.flatten(layout.shardings(trees.unflatten(whole)))
    return trees.unflatten({n[len(part) + 1 :]: s for n, s in placed.items()})

  return of_shapes
