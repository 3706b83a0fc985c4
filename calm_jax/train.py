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
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from calm_jax import cli, report
from calm_jax.core import hub, trees
from calm_jax.experiments import quantising, recipe
from calm_jax.language_model import LanguageModel
from calm_jax.models import lora
from calm_jax.parallel import processes
from calm_jax.planning import overhead


def main(config: ConfigDict) -> dict[str, Any]:
  """Runs everything that a config asks for; returns results.json."""
  settings = plain(config)
  if settings["distributed"]:
    processes.start(settings["heartbeat"])
  with processes.quiet_but_first():
    return _main(settings)


def _main(settings: dict[str, Any]) -> dict[str, Any]:
  fitted = recipe.fit(settings)
  experiment, stages = fitted.experiment, settings["stages"]
  last, *others = fitted.models
  final = fitted.models[last]
  results = experiment.evaluate(
    fitted.alone | {"composed": final}, stages[last]["data"]
  )
  results["other_runs"] = {
    name: experiment.evaluate(
      {"composed": fitted.models[name]}, stages[name]["data"], prefix=f"{name}/"
    )
    for name in others
  }
  results |= {
    "kind": settings["kind"],
    "parameters": fitted.parameters,
    "flops": _flops(fitted, settings["stages"][last]),
    "seconds": fitted.seconds,
    "config": settings,
  }
  # Of one row, which cannot be shuffled.
  if final.is_composed and settings["composition"]["control"] != "shuffled":
    look = experiment.look(final, stages[last]["data"])
    np.savez(fitted.folder / "attention.npz", **look)
  if jax.process_index() == 0:
    report.write_report(fitted.folder, results)
    report.print_results(fitted.folder)
  _keep(fitted, settings)
  return results


def _flops(fitted: recipe.Fitted, stage: dict[str, Any]) -> dict[str, Any]:
  """Of a step of the last stage, and of what it could have been (C.2)."""
  return overhead.training_flops(
    fitted.whole.spec,
    stage["batch_size"],
    stage["length"],
    stage["augmenting_length"],
  )


def _keep(fitted: recipe.Fitted, settings: dict[str, Any]) -> None:
  """Writes the composition, and the models that this run trained itself.

  A run that adapted m_B instead writes that, LoRA merged into its kernels.
  """
  *_, last = settings["recipe"]
  trained = fitted.params[last]
  if jax.process_count() > 1:
    trained = processes.fetch(trained)
  if jax.process_index() != 0:
    return
  params = trained | {"anchor": lora.merge(trained["anchor"])}
  model = dataclasses.replace(fitted.whole, params=params)
  if not fitted.models[last].is_composed:
    _export(model, "anchor", fitted.folder / "model")
    return
  patterns = [
    pattern
    for name in settings["recipe"]
    for pattern in settings["stages"][name]["trainable"]
  ]
  before = quantising.undo(trained, fitted.exact)
  changed = {
    name
    for name, on in trees.flatten(trees.mask(before, patterns)).items()
    if on
  }
  exact = quantising.undo(params, fitted.exact)
  for part in ["anchor", *(f"augmenting/{n}" for n in params["augmenting"])]:
    own = any(name.startswith(f"{part}/") for name in changed)
    own = own or (part != "anchor" and settings["random_augmenting"])
    if part in model.sources and not own:
      continue
    source = _export(
      dataclasses.replace(model, params=exact),
      part,
      fitted.folder / "models" / part,
    )
    model = dataclasses.replace(model, sources=model.sources | {part: source})
  shutil.rmtree(fitted.folder / "composition", ignore_errors=True)
  model.save(fitted.folder / "composition")


def _export(model: LanguageModel, part: str, folder: Path) -> hub.CheckpointRef:
  shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
  model.part(part).export_hf(folder)
  return hub.locate(folder)


def plain(value: Any) -> Any:
  """A ConfigDict as plain dicts, which is all that goes below here."""
  if isinstance(value, ConfigDict):
    return {k: plain(v) for k, v in value.items()}
  return value


if __name__ == "__main__":
  cli.run_with_config(main)
