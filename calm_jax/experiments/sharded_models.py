"""Models whose parameters are sharded over the devices of a mesh."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax

from calm_jax.language_model import LanguageModel, load_any
from calm_jax.parallel import mesh, placement
from calm_jax.parallel.sharding import Layout, Rules


def make_layout(
  axes: dict[str, int],
  rules: Rules,
  replicated: Sequence[str] = (),
  devices: Sequence[jax.Device] | None = None,
) -> Layout | None:
  """Makes the layout of a run's arrays; None for one device.

  `replicated` are as in `Settings`; for the rest see `mesh.make_mesh`.
  """
  made = mesh.make_mesh(axes, devices)
  if made is None:
    return None
  return Layout(made, (*((pattern, ()) for pattern in replicated), *rules))


def shard(model: LanguageModel, layout: Layout | None) -> LanguageModel:
  """Shards a model's parameters; without a layout it stays as it is.

  A single model is sharded as an anchor. It generates and scores as before; on
  several processes all of them call it together, and with the same arguments.
  """
  if layout is None:
    return model
  spec = model.spec.with_compute(placement.placements(layout))
  params = layout.place(model.params)
  return dataclasses.replace(model, spec=spec, params=params)


def load(
  path_or_hub_id: str | os.PathLike, layout: Layout | None, **options
) -> LanguageModel:
  """Loads a model or composition; each process keeps what its devices hold.

  To check a composition's hashes each reads all of its files. The options are
  those of `load_any`.
  """
  places = functools.partial(shardings, layout)
  return shard(load_any(path_or_hub_id, shardings=places, **options), layout)


def shardings(layout: Layout | None, part: str) -> Callable | None:
  """The `shardings` of `load_model` for "anchor" or "augmenting/<name>"."""
  if layout is None:
    return None
  return functools.partial(layout.shardings, prefix=f"{part}/")
