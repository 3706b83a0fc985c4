"""Runs an experiment: its stages, its evaluation, its report.

  python -m calm_jax.train --config=configs/kv.py --config.seed=1

Started again by the same command, it goes on where it stopped.

With --config.mesh.fsdp=-1 it runs on all devices of this machine; with
--config.distributed too, on those of all processes, each of which is started
by the same command and of which the first writes; see
calm_jax.parallel.processes.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from calm_jax import cli, report
from calm_jax.core import hub, trees
from calm_jax.experiments import config_files, quantisation_plan, recipe
from calm_jax.experiments.recipe import TrainedRun
from calm_jax.experiments.settings import Settings
from calm_jax.language_model import LanguageModel
from calm_jax.models import lora
from calm_jax.parallel import processes
from calm_jax.planning import overhead


def main(config: ConfigDict) -> dict[str, Any]:
  """Runs everything that a config asks for; returns results.json."""
  settings = config_files.read_settings(config)
  if settings.distributed:
    processes.start(settings.heartbeat)
  with processes.quiet_but_first():
    run = recipe.run_recipe(settings)
    results = _evaluate(run, settings) | {
      "config": config_files.to_dict(config)
    }
    if jax.process_index() == 0:
      report.write_report(run.folder, results)
      report.print_results(run.folder)
    save_models(run, settings)
  return results


def _evaluate(run: TrainedRun, settings: Settings) -> dict[str, Any]:
  """Evaluates what a run trained; draws where the composed model attends."""
  last, *others = run.models
  final, data = run.models[last], settings.last.data
  results = run.experiment.evaluate(
    run.frozen_models | {"composed": final}, data
  )
  results["other_runs"] = {
    name: run.experiment.evaluate(
      {"composed": run.models[name]},
      settings.stages[name].data,
      prefix=f"{name}/",
    )
    for name in others
  }
  # The maps are of one row, which cannot be shuffled.
  if final.is_composed and settings.composition.control != "shuffled":
    maps = run.experiment.attention_maps(final, data)
    np.savez(run.folder / "attention.npz", **maps)
  return results | {
    "kind": settings.kind,
    "parameters": run.parameters,
    "flops": overhead.training_flops(
      run.untrained.spec,
      settings.last.batch_size,
      settings.last.length,
      settings.last.augmenting_length,
    ),
    "seconds": run.seconds,
  }


def save_models(run: TrainedRun, settings: Settings) -> None:
  """Writes the composition, and the models that this run trained itself.

  A run that adapted m_B instead writes that, with LoRA merged into its kernels.
  """
  last = settings.recipe[-1]
  params = run.trees[last]
  if jax.process_count() > 1:
    params = processes.fetch(params)
  if jax.process_index() != 0:
    return
  params = params | {"anchor": lora.merge(params["anchor"])}
  model = dataclasses.replace(run.untrained, params=params)
  if not run.models[last].is_composed:
    _export(model, "anchor", run.folder / "model")
    return
  exact = dataclasses.replace(
    model, params=quantisation_plan.undo(params, run.exact_leaves)
  )
  for part in settings.parts.values():
    if part not in model.sources or _is_changed(settings, part, exact.params):
      source = _export(exact, part, run.folder / "models" / part)
      model = dataclasses.replace(model, sources=model.sources | {part: source})
  shutil.rmtree(run.folder / "composition", ignore_errors=True)
  model.save(run.folder / "composition")


def _is_changed(settings: Settings, part: str, params: dict) -> bool:
  """Whether this run made other weights than the loaded ones of a model."""
  if part == settings.parts["augmenting"] and settings.random_augmenting:
    return True
  patterns = [
    pattern
    for name in settings.recipe
    for pattern in settings.stages[name].trainable
  ]
  return any(
    re.fullmatch(pattern, name)
    for name in trees.flatten(params)
    if name.startswith(f"{part}/")
    for pattern in patterns
  )


def _export(model: LanguageModel, part: str, folder: Path) -> hub.CheckpointRef:
  shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
  model.part(part).export_hf(folder)
  return hub.locate(folder)


if __name__ == "__main__":
  cli.run_with_config(main)
