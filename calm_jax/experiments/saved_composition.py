"""A saved composition that a run adds augmenting models to (config.add_to)."""

import dataclasses
import functools

from calm_jax.composition import checkpoint, model_files
from calm_jax.core import hub
from calm_jax.core.errors import InputError
from calm_jax.experiments import sharded_models
from calm_jax.experiments.settings import CompositionOptions, Settings
from calm_jax.language_model import LanguageModel, load_composed
from calm_jax.parallel.sharding import Layout
from calm_jax.training.stage import Stage


def resolve(settings: Settings) -> Settings:
  """The settings with the models of the saved composition among their own.

  Stages with the default `trainable` train the new connections only. No weight
  is read. Raises InputError if the two do not fit together.
  """
  if not settings.add_to:
    return settings
  names = [hub.CONFIG, checkpoint.CONFIG]
  folder = hub.locate(settings.add_to, None, names).folder
  saved = checkpoint.read_config(folder)
  options = {one["name"]: one for one in saved["augmenting"]}
  new = settings.augmenting_paths
  if twice := sorted(options.keys() & new.keys()):
    raise InputError(
      f"{settings.add_to} has augmenting models named {twice} already: give "
      "others in config.augmenting, or to a single one by "
      "--config.augmenting_name="
    )
  if settings.anchor or settings.random_augmenting:
    raise InputError(
      f"config.add_to={settings.add_to} brings its own anchor and trained "
      "models: leave config.anchor empty, and random_augmenting False"
    )
  sources = model_files.find(folder, saved, None, None, names)
  known = {field.name for field in dataclasses.fields(CompositionOptions)}
  kept = {
    name: {k: v for k, v in one.items() if k in known}
    for name, one in options.items()
  }
  paths = {name: sources[f"augmenting/{name}"].name for name in options}
  trainable = tuple(f"composition/{name}/.*" for name in new)
  stages = {
    name: dataclasses.replace(stage, trainable=trainable)
    if stage.trainable == Stage.trainable
    else stage
    for name, stage in settings.stages.items()
  }
  return dataclasses.replace(
    settings,
    anchor=sources["anchor"].name,
    augmenting=paths | new,
    compositions=settings.compositions | kept,
    stages=stages,
  )


def load(settings: Settings, layout: Layout | None) -> LanguageModel | None:
  """Loads the composition, its models as they were saved; None without one."""
  if not settings.add_to:
    return None
  places = functools.partial(sharded_models.shardings, layout)
  return load_composed(settings.add_to, dtype=settings.dtype, shardings=places)
