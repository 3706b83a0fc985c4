"""Measures a model as an experiment does, without training anything.

  python -m calm_jax.evaluate --config=configs/ntl.py --model=DIR_OR_ID \\
    --out=DIR

A composition is measured beside the models that it joins. What the config says
of tasks, dtype, mesh and kernels holds; its own models and stages are left out.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from calm_jax import cli, report
from calm_jax.composition import execution
from calm_jax.core import files
from calm_jax.core.errors import InputError, check_folder
from calm_jax.experiments import config_files, recipe, sharded_models
from calm_jax.experiments.audit_sets import AuditOptions
from calm_jax.experiments.base import measure
from calm_jax.experiments.settings import Bits, Settings
from calm_jax.language_model import LanguageModel
from calm_jax.models import quantisation
from calm_jax.parallel import processes

# Values of --quantise that are no kind of quantisation: as saved, and none.
_QUANTISE = {"": None, "none": ""}


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  """The flags besides --config."""

  model: str = cli.option("a checkpoint or a composition: a folder or a hub id")
  out: str = cli.option("the folder of the results, report and predictions")
  quantise: str = cli.option(
    "the frozen models: int8, int4 or none; as saved if empty", ""
  )
  ignore: str = cli.option("keys of a config.json, with commas", "")
  anchor: str = cli.option(
    "where a composition's anchor is, if it was moved", ""
  )
  augmenting: str = cli.option(
    "the same of its m_A; of several NAME=DIR,NAME=DIR", ""
  )
  drop: str = cli.option(
    "names of augmenting models to leave out, with commas", ""
  )
  audit: bool = cli.option("measure a composition under controls too", False)


def main(config: ConfigDict, options: EvaluateOptions) -> dict[str, Any]:
  """Evaluates a model by a config; returns results.json.

  Raises:
    InputError: no such model, one of other tokens than the experiment's, what
      the experiment raises, or results of something else in `out`.
  """
  check_folder("--out", options.out)
  settings = config_files.read_settings(config)
  if settings.distributed:
    processes.start(settings.heartbeat)
  with processes.quiet_but_first():
    draw = report.can_draw()
    results = _evaluate(settings, options, config_files.to_dict(config))
    if jax.process_index() == 0:
      report.write_results(Path(options.out), results, draw)
      report.print_results(Path(options.out))
  return results


def _evaluate(
  settings: Settings, options: EvaluateOptions, config: dict[str, Any]
) -> dict[str, Any]:
  recipe.check(settings)
  path = Path(options.out, "results.json")
  if path.exists() and "model" not in files.read_json(path):
    raise InputError(
      f"{options.out} holds the results of a run; give another --out"
    )
  if settings.quantise != Bits():
    raise InputError(
      "config.quantise is for models that a run loads; here give --quantise"
    )
  layout = recipe.make_layout(settings)
  bits = _QUANTISE.get(options.quantise, options.quantise)
  model = sharded_models.load(
    options.model,
    layout,
    dtype=settings.dtype,
    quantise=bits,
    ignore=options.ignore,
    anchor=options.anchor,
    augmenting=options.augmenting,
  )
  for name in filter(None, options.drop.split(",")):
    model = model.drop(name)
  device = execution.Device.here()
  spec = execution.for_inference(model.spec, settings.asked, device)
  columns = _columns(dataclasses.replace(model, spec=spec))
  model = columns["composed"] if model.is_composed else columns["anchor"]
  frozen = {side: m for side, m in columns.items() if side != "composed"}
  folder = processes.own_folder(Path(options.out))
  experiment = recipe.EXPERIMENTS[settings.experiment](
    settings.task, settings.seed, folder, frozen
  )
  if model.text().fingerprint != experiment.tokenizers["anchor"].fingerprint:
    raise InputError(
      f"{options.model} reads other tokens than the experiment's: give the "
      "config that it was trained by, its seed and its task's settings too"
    )
  audited = _audited(settings, options, model)
  data = settings.last.data
  results = measure(experiment, columns, data, folder, audited)
  counts = {side: m.num_params for side, m in frozen.items()}
  if model.is_composed:
    counts["composition"] = model.num_composition_params
  origins = {side: m.origin for side, m in frozen.items()}
  return results | {
    "model": options.model,
    "dropped": options.drop,
    "quantise": quantisation.kind_of(model.params),
    "parameters": counts,
    # The results are in a folder of their own, not in that of a kind of run.
    "config": config | origins | {"output": ""},
  }


def _audited(
  settings: Settings, options: EvaluateOptions, model: LanguageModel
) -> AuditOptions:
  """The audit that was asked for, of no examples for none."""
  if not options.audit:
    return dataclasses.replace(settings.audit, examples=0)
  if not (model.is_composed and settings.audit.examples):
    raise InputError(
      "--audit is for compositions, and config.audit.examples is not to be 0"
    )
  return settings.audit


def _columns(model: LanguageModel) -> dict[str, LanguageModel]:
  """The models by column of the results; see `Settings.augmenting_sides`."""
  if not model.is_composed:
    return {"anchor": model}
  parts = [f"augmenting/{name}" for name, _ in model.spec.augmenting]
  columns = {part: model.part(part) for part in parts}
  if len(parts) == 1:
    columns = {"augmenting": columns.pop(parts[0])}
  return columns | {"anchor": model.part("anchor"), "composed": model}


if __name__ == "__main__":
  cli.run_with_config(main, EvaluateOptions)
