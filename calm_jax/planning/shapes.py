"""Describes what a config trains as shapes; no weight is read or made."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition import gguf_files
from calm_jax.composition.connections import Composition
from calm_jax.core import errors, files, hub
from calm_jax.core.batch import Batch, Sequence
from calm_jax.experiments import recipe, run_models, saved_composition
from calm_jax.experiments.settings import Settings
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families, loading
from calm_jax.training.stage import Stage


class Job(NamedTuple):
  """One stage of a run, with shapes in place of parameters."""

  settings: Settings
  stage: Stage
  spec: Composition
  params: dict  # in the dtypes that training keeps
  own: dict[str, int]  # lengths of rows of augmenting models with other tokens


def job(settings: Settings, stage: str = "") -> Job:
  """Makes the job of a stage; of the recipe's last if it is empty.

  A model may also be a config.json by itself. InputError if there is none.
  """
  settings = saved_composition.resolve(settings)
  stage = stage or settings.recipe[-1]
  errors.check_choice("stage", stage, list(settings.stages))
  options, configs = settings.stages[stage], _models(settings)
  spec, params = run_models.stage_shapes(settings, stage, configs)
  own = {}
  for side, name in settings.augmenting_sides.items():
    same_size = configs[side].vocab_size == configs["anchor"].vocab_size
    if options.augmenting_length or not same_size:
      own[name] = options.augmenting_length or options.length
  return Job(settings, options, spec, params, own)


def _models(settings: Settings) -> dict[str, ModelConfig]:
  configs = {
    side: _read(path, settings.ignore)
    for side, path in settings.checkpoints.items()
  }
  # Models from scratch read the other's tokens, or those of the experiment.
  sizes = [config.vocab_size for config in configs.values()]
  for side in settings.parts:
    if side not in configs:
      size = _trained_size(settings, side)
      if not size:
        size = sizes[0] if sizes else _vocabulary_size(settings)
      configs[side] = run_models.scratch_config(settings, side, size)
  return configs


def _read(path_or_hub_id: str, ignore: str) -> ModelConfig:
  if path_or_hub_id.endswith(".json"):
    return families.from_hf(files.read_json(Path(path_or_hub_id)))
  folder = gguf_files.locate(path_or_hub_id, files=[hub.CONFIG]).folder
  return loading.load_config(folder, ignore)


def _trained_size(settings: Settings, side: str) -> int:
  """The pieces of a tokenizer that the run trains at most; 0 for none."""
  asked = getattr(settings.task, "tokenizers", {})
  names = (settings.parts[side], side, side.partition("/")[0])
  return next((asked[name].pieces for name in names if name in asked), 0)


def _vocabulary_size(settings: Settings) -> int:
  if settings.experiment == "text":
    raise errors.InputError(
      "no model is given, so the size of the vocabulary is not known: give "
      "--config.anchor= or --config.augmenting= a folder, a hub id or a "
      "config.json"
    )
  make = recipe.EXPERIMENTS[settings.experiment]
  with tempfile.TemporaryDirectory() as folder:
    made = make(settings.task, settings.seed, Path(folder), {})
    return made.tokenizers["anchor"].vocab_size


def batch(job: Job, rows: int) -> Batch:
  """A training batch as shapes."""

  def array(length, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((rows, length), dtype)

  L = job.stage.length
  others = job.own if job.stage.model == "composed" else {}
  return Batch(
    Sequence(*[array(L)] * 3),
    {name: Sequence(*[array(length)] * 3) for name, length in others.items()},
    {name: array(L) for name in others},
    prompt_ends=array(L),
    targets=array(L),
    weights=array(L, jnp.float32),
  )
