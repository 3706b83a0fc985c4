"""Table 5: what each part of the composition is worth (§4.4), and controls.

  python -m calm_jax.ablations --config=configs/kv.py:ablations

Trains m_A and m_B once, then the last stage as every kind of
configs/common.py's KINDS, on the same data and for as many steps, several
times each: from other fresh parameters and in another order of the data.
Started again by the same command, it goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from calm_jax import cli, train
from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.experiments import recipe, variants
from calm_jax.reporting import table
from calm_jax.reporting.runs import LABELS, RESULTS
from calm_jax.reporting.table1 import accuracies
from calm_jax.reporting.trials import LOSS, trials_table
from calm_jax.training.metrics import read_metrics
from configs import common

FOLDER = "ablations"
WIDTH = 200  # of the printed table
Runs = dict[str, list[dict[str, Any]]]


def main(config: ConfigDict) -> dict[str, Any]:
  """Runs what config.ablations asks for; returns ablations.json."""
  asked, trials = config.ablations.kinds, config.ablations.trials
  if config.distributed:
    raise InputError(
      "ablations are runs of one process: leave config.distributed, or start "
      "each run by calm_jax.train"
    )
  unknown = [kind for kind in asked if kind not in common.KINDS]
  if unknown or not asked or trials < 1:
    raise InputError(
      f"ablations of kinds={asked}, trials={trials}: give one trial or more, "
      f"and some of {list(common.KINDS)}"
    )
  plan = [
    (kind, _settings(config, kind, trial))
    for trial in range(trials)
    for kind in asked
  ]
  left = sum(_finished(settings) is None for _, settings in plan)
  print(
    f"{len(plan)} runs: {', '.join(asked)}, {trials} times each, after the "
    f"stages that they share; {left} are left, about "
    f"{left * config.ablations.minutes:.0f} min on two CPU cores",
    flush=True,
  )
  runs: Runs = {kind: [] for kind in asked}
  spent: list[float] = []
  for kind, settings in plan:
    results = _finished(settings)
    if results is None:
      began = time.monotonic()
      results = run(settings)
      spent.append(time.monotonic() - began)
      left -= 1
      # The first has trained what all share.
      mean = sum(spent[1:] or spent) / len(spent[1:] or spent)
      print(
        f"{kind}, trial {settings['trial']}: {spent[-1]:.0f} s; "
        f"left: {left} runs, {left * mean / 60:.0f} min",
        flush=True,
      )
    runs[kind].append(results)
    # Also of what there is if this is stopped.
    summary = summarise(runs)
    folder = Path(config.workdir) / FOLDER
    files.write_json(folder / "ablations.json", summary)
    text = table.as_markdown(trials_table(summary))
    (folder / "ablations.md").write_text(f"{text}\n", encoding="utf-8")
  # Its columns are numbers that are to stay whole.
  console = Console(width=max(Console().width, WIDTH))
  table.print_tables([trials_table(summary)], console)
  return summary


def _settings(config: ConfigDict, kind: str, trial: int) -> dict[str, Any]:
  changed = config.copy_and_resolve_references()
  common.become([kind], changed)
  changed.update(
    kind=kind, trial=trial, alternatives=(), output=f"{FOLDER}/{kind}/{trial}"
  )
  settings = train.plain(changed)
  del settings["ablations"]
  return settings


def _finished(settings: dict[str, Any]) -> dict[str, Any] | None:
  """The results of a run, if it has been made with these settings."""
  path = Path(settings["workdir"]) / settings["output"] / RESULTS
  if not path.exists():
    return None
  results = json.loads(path.read_text())
  same = results["config"] == json.loads(json.dumps(settings))
  return results if same else None


def run(settings: dict[str, Any]) -> dict[str, Any]:
  """One run: its stages, its evaluation, its results.json."""
  fitted = recipe.fit(settings)
  [(last, final)] = fitted.models.items()
  models = {"composed": final}
  if settings["kind"] == "composed" and not settings["trial"]:
    models |= fitted.alone  # The same for all.
  results = fitted.experiment.evaluate(models, settings["stages"][last]["data"])
  losses = [
    line["eval_loss"]
    for line in read_metrics(fitted.folder / last)
    if "eval_loss" in line
  ]
  results |= {
    "kind": settings["kind"],
    "parameters": fitted.parameters,
    "seconds": fitted.seconds,
    "eval_loss": losses[-1] if losses else None,
    "config": settings,
  }
  files.write_json(fitted.folder / RESULTS, results)
  return results


def scores(results: dict[str, Any], model: str) -> dict[str, float]:
  """The numbers that a table shows of a model, the headline first."""
  found = accuracies(results, model)
  for name in ("perplexity", "bits_per_byte"):
    for text, values in results.get(name, {}).items():
      found[f"{name.replace('_', ' ')}, {text}"] = values.get(model)
  for group, values in results.get("groups", {}).items():
    found[group] = values["average"].get(model)
  return {label: value for label, value in found.items() if value is not None}


def summarise(runs: Runs) -> dict[str, Any]:
  """ablations.json: by kind the runs' numbers, their mean and their range."""
  found: dict[str, list[dict]] = {}
  for results in runs.get("composed", []):
    for model in ("augmenting", "anchor"):
      if alone := scores(results, model):
        name = LABELS[model]
        trained = {"parameters": 0, "difference": None}
        found[name] = [{"scores": alone} | trained]
  for kind, made in runs.items():
    found[variants.NAMES[kind]] = [_of_run(results) for results in made]
  return {
    name: {"runs": made, "scores": _spread([one["scores"] for one in made])}
    for name, made in found.items()
    if made
  }


def _of_run(results: dict[str, Any]) -> dict[str, Any]:
  loss = results["eval_loss"]
  return {
    "scores": scores(results, "composed") | ({LOSS: loss} if loss else {}),
    "parameters": results["parameters"]["trained"],
    "difference": results["parameters"]["trained_minus_composition"],
    "lora_rank": results["parameters"]["lora_rank"],
    "seconds": results["seconds"],
    "trial": results["config"]["trial"],
    "output": results["config"]["output"],
  }


def _spread(found: list[dict[str, float]]) -> dict[str, dict[str, float]]:
  """Mean, lowest and highest of each number that all runs have."""
  spread = {}
  for label in found[0]:
    values = [one[label] for one in found if label in one]
    spread[label] = {
      "mean": sum(values) / len(values),
      "lowest": min(values),
      "highest": max(values),
    }
  return spread


if __name__ == "__main__":
  # Trials differ in numbers only: their programs are compiled once.
  cli.keep_compiled_programs()
  cli.run_with_config(main)
