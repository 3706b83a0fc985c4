"""Runs an experiment: its stages, its evaluation, its report.

  python -m calm_jax.train --config=configs/kv.py --config.seed=1

Started again by the same command, it goes on where it stopped.

With --config.mesh.fsdp=-1 it runs on all devices of this machine; with
--config.distributed too, on those of all processes, each of which is started by
the same command. The first of them writes; see calm_jax.parallel.processes.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from calm_jax import cli, report
from calm_jax.core import hub, trees
from calm_jax.experiments import config_files, quantisation_plan, recipe
from calm_jax.experiments.base import measure
from calm_jax.language_model import LanguageModel
from calm_jax.models import lora
from calm_jax.parallel import processes
from calm_jax.planning import overhead


def main(config: ConfigDict) -> dict[str, Any]:
  """Runs everything that a config asks for; returns results.json."""
  settings = config_files.read_settings(config)
  if settings.distributed:
    processes.start(settings.heartbeat)
  with processes.quiet_but_first(), recipe.make_trackers(settings) as trackers:
    draw = report.can_draw()
    run = recipe.run_recipe(settings, trackers)
    # With the models that config.add_to brings.
    fields = ("anchor", "augmenting")
    models = {name: getattr(run.settings, name) for name in fields}
    described = config_files.to_dict(config) | models
    results = _evaluate(run) | {"config": described}
    if jax.process_index() == 0:
      report.write_results(run.folder, results, draw)
      report.print_results(run.folder)
      report.log_results(run.folder, trackers.started(), draw)
    save_models(run)
    if settings.last.model == "composed":
      for tracker in trackers.started():
        tracker.artefact("composition", run.folder / "composition")
  return results


def _evaluate(run: recipe.TrainedRun) -> dict[str, Any]:
  """Evaluates what a run trained; draws where the composed model attends."""
  settings, models, stage = run.settings, run.models, run.settings.last
  columns = run.frozen_models | {"composed": models.pop(settings.recipe[-1])}
  results = measure(
    run.experiment, columns, stage.data, run.folder, settings.audit
  )
  results["other_runs"] = {
    name: run.experiment.evaluate(
      {"composed": other}, settings.stages[name].data, prefix=f"{name}/"
    )
    for name, other in models.items()
  }
  flops = overhead.training_flops(
    run.untrained.spec, stage.batch_size, stage.length, stage.augmenting_length
  )
  return results | {
    "kind": settings.kind,
    "parameters": run.parameters,
    "flops": flops,
    **run.costs_json,
  }


def save_models(run: recipe.TrainedRun) -> None:
  """Writes the composition, and the models that this run trained itself.

  A run that adapted m_B instead writes that, with LoRA merged into its kernels.
  """
  params = run.trees[run.settings.recipe[-1]]
  if jax.process_count() > 1:
    params = processes.fetch(params)
  if jax.process_index() != 0:
    return
  params = params | {"anchor": lora.merge(params["anchor"])}
  model = dataclasses.replace(run.untrained, params=params)
  if run.settings.last.model != "composed":
    _export(model, "anchor", run.folder / "model")
    return
  exact = dataclasses.replace(
    model, params=quantisation_plan.undo(params, run.exact_leaves)
  )
  for part in run.settings.parts.values():
    if part not in model.sources or _is_changed(run, part, exact.params):
      source = _export(exact, part, run.folder / "models" / part)
      model = dataclasses.replace(model, sources=model.sources | {part: source})
  shutil.rmtree(run.folder / "composition", ignore_errors=True)
  model.save(run.folder / "composition")


def _is_changed(run: recipe.TrainedRun, part: str, params: dict) -> bool:
  """Checks whether this run made other weights than a model was loaded with."""
  settings = run.settings
  if settings.random_augmenting and part != "anchor":
    return True
  names = [n for n in trees.flatten(params) if n.startswith(f"{part}/")]
  stages = settings.recipe
  return quantisation_plan.training_stage(settings, stages, names) is not None


def _export(model: LanguageModel, part: str, folder: Path) -> hub.CheckpointRef:
  shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
  model.part(part).export_hf(folder)
  return hub.locate(folder)


if __name__ == "__main__":
  cli.run_with_config(main)
