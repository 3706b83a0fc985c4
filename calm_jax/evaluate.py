"""Measures a model as an experiment does, without training anything.

  python -m calm_jax.evaluate --config=configs/ntl.py --model=DIR_OR_ID \\
    --out=DIR

A composition is measured beside the models that it joins. What the config says
of tasks, dtype, mesh and kernels holds; its own models and stages are left out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from calm_jax import cli, report
from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.experiments import placement, recipe
from calm_jax.language_model import LanguageModel
from calm_jax.models import quantisation
from calm_jax.parallel import processes
from calm_jax.train import plain


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command line says besides the config.

  Attributes:
    model: a checkpoint or a composition, a folder or a hub id.
    out: the folder of results.json, the report and the predictions.
    quantise: its frozen models: int8, int4 or none; as saved if empty.
  """

  model: str
  out: str
  quantise: str = ""


def main(config: ConfigDict, options: Options) -> dict[str, Any]:
  """Evaluates a model by a config; returns results.json.

  Raises:
    InputError: no such model, what the experiment raises, a model of other
      tokens than the experiment's, or results of something else in `out`.
  """
  settings = plain(config)
  if settings["distributed"]:
    processes.start(settings["heartbeat"])
  with processes.quiet_but_first():
    return _main(settings, options)


def _main(settings: dict[str, Any], options: Options) -> dict[str, Any]:
  recipe.check(settings)
  folder = Path(options.out)
  _check_folder(folder)
  if any(settings["quantise"].values()):
    raise InputError(
      "config.quantise is for models that a run loads; here give --quantise"
    )
  model = placement.load(
    options.model,
    recipe.layout_of(settings),
    settings["dtype"],
    {"": None, "none": ""}.get(options.quantise, options.quantise),
  )
  spec = recipe.configured(model.spec, settings)
  model = dataclasses.replace(model, spec=spec)
  columns = _columns(model)
  folder = processes.own_folder(folder)
  make, task = recipe.EXPERIMENTS[settings["experiment"]]
  frozen = {side: m for side, m in columns.items() if side != "composed"}
  experiment = make(
    task(**settings["task"], seed=settings["seed"]), folder, frozen
  )
  ours, theirs = model.text().fingerprint, experiment.tokenizer.fingerprint
  if ours != theirs:
    raise InputError(
      f"{options.model} reads other tokens than the experiment's: give the "
      "config that it was trained by, its seed and its task's settings too"
    )
  data = settings["stages"][settings["recipe"][-1]]["data"]
  results = experiment.evaluate(columns, data)
  counts = {side: m.num_params for side, m in frozen.items()}
  if model.is_composed:
    counts["composition"] = model.num_composition_params
    if _can_be_looked_at(model):
      np.savez(folder / "attention.npz", **experiment.look(model, data))
  results |= {
    "model": options.model,
    "quantise": quantisation.kind_of(model.params),
    "parameters": counts,
    # A folder of its own, not one of a run's kinds.
    "config": settings
    | {side: m.origin for side, m in frozen.items()}
    | {"output": ""},
  }
  if jax.process_index() == 0:
    report.write_report(folder, results)
    report.print_results(folder)
  return results


def _check_folder(folder: Path) -> None:
  """What training wrote took longer than an evaluation does."""
  path = folder / "results.json"
  if path.exists() and "model" not in files.read_json(path):
    raise InputError(f"{folder} holds the results of a run; give another --out")


def _can_be_looked_at(model: LanguageModel) -> bool:
  """Of one row, which cannot be shuffled, and of one text beside it."""
  joined = model.spec.augmenting
  alone = len(joined) == 1 or not model.tokenizers
  return alone and all(a.control != "shuffled" for _, a in joined)


def _columns(model: LanguageModel) -> dict[str, LanguageModel]:
  """The models by column of the results; of several m_A none by itself."""
  if not model.is_composed:
    return {"anchor": model}
  names = [name for name, _ in model.spec.augmenting]
  alone = {"anchor": model.part("anchor")}
  if len(names) == 1:
    alone = {"augmenting": model.part(f"augmenting/{names[0]}")} | alone
  return alone | {"composed": model}


if __name__ == "__main__":
  cli.run_with_config(main, Options)
