"""Runs the stages of an experiment, from settings to trained models."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from calm_jax.composition import execution
from calm_jax.composition.connections import Composition, paper_count
from calm_jax.core import trees
from calm_jax.core.errors import InputError, check_choice, check_folder
from calm_jax.experiments import (
  quantisation_plan,
  run_models,
  saved_composition,
  sharded_models,
)
from calm_jax.experiments.base import Experiment
from calm_jax.experiments.key_values import KeyValueExperiment
from calm_jax.experiments.settings import Settings
from calm_jax.experiments.text import TextExperiment
from calm_jax.language_model import LanguageModel
from calm_jax.parallel import processes
from calm_jax.parallel.sharding import Layout
from calm_jax.training import profiler, trackers, trainer
from calm_jax.training.stage import Stage
from calm_jax.training.trackers import Trackers
from calm_jax.training.utilisation import Cost

EXPERIMENTS: dict[str, type[Experiment]] = {
  "key_values": KeyValueExperiment,
  "text": TextExperiment,
}


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A run after its last stage."""

  settings: Settings
  experiment: Experiment
  folder: Path  # of the results; thrown away in all processes but the first
  # The frozen models and a fresh composition, before the last stage.
  untrained: LanguageModel
  # All parameters after the last stage and each alternative, by stage.
  trees: dict[str, dict]
  lora_rank: int  # of the matrices on the anchor; 0 for none
  costs: dict[str, Cost]  # of each stage
  exact_leaves: dict[str, Any]  # by name, as they were before quantising

  @property
  def models(self) -> dict[str, LanguageModel]:
    """The models that the last stage and its alternatives trained, by stage."""
    models = {}
    for name, tree in self.trees.items():
      model = dataclasses.replace(self.untrained, params=tree)
      models[name] = model.part(self.settings.stages[name].model)
    return models

  @property
  def frozen_models(self) -> dict[str, LanguageModel]:
    """The models that are joined; m_A only if the last stage uses it."""
    parts, sides = self.settings.parts, ["anchor"]
    if self.settings.last.model == "composed":
      sides = [*self.settings.augmenting_sides, "anchor"]
    return {side: self.untrained.part(parts[side]) for side in sides}

  @property
  def parameters(self) -> dict[str, int]:
    """Counts of parameters, for results.json."""
    settings, model = self.settings, self.untrained
    params = self.trees[settings.recipe[-1]]
    is_trained = trees.mask(params, settings.last.trainable)
    trained = trees.count(trees.partition(params, is_trained)[0])
    composition = model.num_composition_params
    return {
      **{s: model.part(p).num_params for s, p in settings.parts.items()},
      "composition": composition,
      "composition_paper_count": paper_count(model.spec),
      "trained": trained,
      "lora_rank": self.lora_rank,
      "trained_minus_composition": trained - composition,
    }

  @property
  def costs_json(self) -> dict[str, dict[str, float | None]]:
    """Seconds and FLOPs of training by stage, for results.json."""
    return {
      "seconds": {name: cost.seconds for name, cost in self.costs.items()},
      "stage_flops": {name: cost.flops for name, cost in self.costs.items()},
    }


def make_trackers(settings: Settings) -> Trackers:
  """Makes the trackers of a run, in the first process; none in the others.

  Raises InputError for settings that no run can have.
  """
  check(settings)
  if jax.process_index() != 0:
    return Trackers()
  names = (*settings.recipe, *settings.alternatives)
  return Trackers(
    settings.trackers,
    Path(settings.workdir, settings.output),
    dataclasses.asdict(settings),
    {name: settings.stages[name].steps for name in names},
  )


def run_recipe(settings: Settings, log: Trackers) -> TrainedRun:
  """Runs all stages, from wherever an earlier process left them.

  `log` is what `make_trackers` returned.

  Raises InputError if the settings ask for what is not there, or the folder
  holds a run of other settings.
  """
  settings = saved_composition.resolve(settings)
  _check_models(settings)
  layout = make_layout(settings)
  folder = processes.own_folder(Path(settings.workdir, settings.output))
  experiment, model = _compose(settings, folder, layout)
  quantisation_plan.check(settings, model.params)
  _check_trainable(settings, model.params)
  # Faults in the data of the last stage are found before the first one runs.
  batches = {
    name: _make_batches(settings, name, experiment, model, layout)
    for name in (*settings.recipe, *settings.alternatives)
  }
  run_stage = functools.partial(_run_stage, settings, layout, model.spec, log)
  costs: dict[str, Cost] = {}
  params = model.params
  for name in settings.recipe[:-1]:
    params, costs[name] = run_stage(name, params, batches[name])
  exact_params, params = params, quantisation_plan.quantise(settings, params)
  exact = quantisation_plan.exact_leaves(exact_params, params)
  if layout is not None:
    params = layout.place(params)
  untrained = dataclasses.replace(model, params=params)
  del model, exact_params
  params, rank = run_models.add_lora(settings, params)
  trained = {}
  for name in settings.ends:
    trained[name], costs[name] = run_stage(name, params, batches[name])
  return TrainedRun(
    settings, experiment, folder, untrained, trained, rank, costs, exact
  )


def check(settings: Settings) -> None:
  """Raises InputError unless stages and trackers are there and workdir can be
  a folder."""
  if "://" in settings.workdir:
    raise InputError(
      f"workdir={settings.workdir!r} is an address, not a folder: mount the "
      "bucket, as docs/launch.md says, and give the folder"
    )
  check_folder("config.workdir", settings.workdir)
  trackers.check(settings.trackers)
  if not settings.recipe:
    raise InputError(
      "config.recipe is empty: name at least one stage, such as 'compose'"
    )
  for name in (*settings.recipe, *settings.alternatives):
    check_choice("stage", name, list(settings.stages))
    profiler.parse(settings.profile, name, settings.stages[name].steps)
  if not settings.augmenting_paths:
    raise InputError("config.augmenting is {}: name at least one model")
  for name in settings.compositions:
    known = list(settings.augmenting_paths)
    check_choice("model of config.compositions", name, known)
    settings.composition_of(name)
  for side in getattr(settings.task, "tokenizers", {}):
    parts = settings.parts
    known = list(dict.fromkeys([*parts, *parts.values(), "augmenting"]))
    check_choice("side of config.task.tokenizers", side, known)


def _check_trainable(settings: Settings, params: dict) -> None:
  """Raises InputError if what a stage trains will not be there."""
  shapes = jax.eval_shape(
    lambda tree: run_models.add_lora(settings, tree)[0], params
  )
  for name in (*settings.recipe, *settings.alternatives):
    trees.mask(shapes, settings.stages[name].trainable)


def _check_models(settings: Settings) -> None:
  """Checks that a run loads or trains each model that it needs."""
  if settings.experiment == "key_values":
    if settings.checkpoints:
      raise InputError(
        "the key-value experiment trains its own "
        f"{' and '.join(settings.checkpoints)}: leave --config.anchor and "
        "--config.augmenting empty"
      )
    return
  trained = {settings.stages[name].model for name in settings.recipe}
  for side, part in settings.parts.items():
    if side != "anchor" and settings.random_augmenting:
      continue
    is_needed = side == "anchor" or settings.last.model == "composed"
    if is_needed and side not in settings.checkpoints and part not in trained:
      option = side.partition("/")[0]
      raise InputError(
        f"no {side} model: give --config.{option}= its folder or hub id"
      )


def make_layout(settings: Settings) -> Layout | None:
  """The layout of all arrays of a run; None for one device."""
  layout = sharded_models.make_layout(
    settings.mesh, settings.sharding, settings.replicated
  )
  if layout is None and jax.device_count() > 1:
    count = jax.device_count()
    print(f"one of {count} devices is used; --config.mesh.fsdp=-1 takes all")
  return layout


def _compose(
  settings: Settings, folder: Path, layout: Layout | None
) -> tuple[Experiment, LanguageModel]:
  """Loads what is loaded, and makes the experiment and the composition."""
  loaded = run_models.load(settings, layout)
  experiment = EXPERIMENTS[settings.experiment](
    settings.task,
    settings.seed,
    folder,
    {side: loaded[side] for side in settings.parts if side in loaded},
  )
  composed = run_models.compose(settings, experiment.tokenizers, loaded)
  model = sharded_models.shard(composed, layout)
  if layout is not None:
    print(layout.describe(model.params), flush=True)
  return experiment, model


def _make_batches(
  settings: Settings,
  name: str,
  experiment: Experiment,
  model: LanguageModel,
  layout: Layout | None,
) -> tuple[Any, list]:
  """The training data of a stage, and its held-out batches."""
  stage, share = settings.stages[name], (0, 1)
  if layout is not None:
    share = layout.share(stage.batch_size, stage.accumulate)
  trained = model.part(stage.model)
  check_lengths(name, stage, trained)
  source = experiment.source(stage, trained, settings.stage_seed(name), share)
  return source, experiment.eval_batches(stage, trained)


def check_lengths(name: str, stage: Stage, model: LanguageModel) -> None:
  """Refuses rows that are longer than what a model was made for."""
  configs = {"the anchor": ("length", model.spec.anchor)}
  for other, joined in model.spec.augmenting:
    option = "augmenting_length" if other in model.tokenizers else "length"
    configs[f"the augmenting model {other!r}"] = option, joined.config
  for part, (option, config) in configs.items():
    if getattr(stage, option) > config.max_length:
      raise InputError(
        f"stages.{name}.{option}={getattr(stage, option)} is more than the "
        f"{config.max_length} tokens that {part} was made for: lower it to "
        f"{config.max_length} (longer plain text goes on in further rows, and "
        "too_long says what becomes of longer prompts)"
      )


def _run_stage(
  settings: Settings,
  layout: Layout | None,
  spec: Composition,
  log: Trackers,
  name: str,
  params: dict,
  batches: tuple[Any, list],
) -> tuple[dict, Cost]:
  """Runs one stage; returns the whole tree after it, and its cost."""
  output = settings.output if name in settings.ends else ""
  parts, paths = settings.parts, settings.checkpoints
  origins = {parts[side]: path for side, path in paths.items()}
  if settings.random_augmenting:
    others = [part for part in parts.values() if part != "anchor"]
    origins |= dict.fromkeys(others, "random weights")
  work = run_models.stage_work(settings.stages[name], params, layout)
  device = execution.Device.here()
  spec = execution.for_training(spec, settings.asked, device, work)
  chosen = execution.describe(spec, work).items()
  text = ", ".join(f"{choice} {value}" for choice, value in chosen)
  print(f"{name}: {settings.dtype}, {text}", flush=True)
  return trainer.run_stage(
    name,
    settings.stages[name],
    spec,
    params,
    *batches,
    Path(settings.workdir, output, name),
    log,
    origins=origins,
    seed=settings.stage_seed(name),
    layout=layout,
    watchdog=settings.watchdog,
    profile=settings.profile,
  )
