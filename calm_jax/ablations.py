"""Table 5: what each part of the composition is worth (§4.4), and controls.

  python -m calm_jax.ablations --config=configs/kv.py:ablations

Trains m_A and m_B once, then the last stage as every kind of
`experiments.variants`, on the same data and for as many steps, several times
each: from other fresh parameters and in another order of the data. Started
again by the same command, it goes on where it stopped.
"""

import copy
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich.console import Console

from calm_jax import cli
from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.experiments import config_files, recipe, variants
from calm_jax.experiments.settings import Settings
from calm_jax.reporting import table
from calm_jax.reporting.runs import RESULTS, Run, model_label
from calm_jax.reporting.table1 import accuracies
from calm_jax.reporting.tables import LOSS, trials_table
from calm_jax.training.metrics import read_metrics

FOLDER = "ablations"
WIDTH = 200  # columns of the printed table
Results = dict[str, Any]
Runs = dict[str, list[Results]]  # by kind


class Trial(NamedTuple):
  """The settings of one run, and the same as dicts for its results.json."""

  settings: Settings
  config: dict[str, Any]


def main(config: ConfigDict) -> dict[str, Any]:
  """Runs what config.ablations asks for; returns ablations.json."""
  plan = _plan(config)
  kinds = config.ablations.kinds
  left = sum(_finished(trial) is None for trial in plan)
  print(
    f"{len(plan)} runs: {', '.join(kinds)}, {config.ablations.trials} times "
    f"each, after the stages that they share; {left} are left, about "
    f"{left * config.ablations.minutes:.0f} min on two CPU cores",
    flush=True,
  )
  runs: Runs = {kind: [] for kind in kinds}
  summary: dict[str, Any] = {}
  spent: list[float] = []
  for trial in plan:
    kind, number = trial.settings.kind, trial.settings.trial
    results = _finished(trial)
    if results is None:
      began = time.monotonic()
      results = execute(trial)
      spent.append(time.monotonic() - began)
      left -= 1
      # The first run has trained what all share.
      typical = statistics.fmean(spent[1:] or spent)
      print(
        f"{kind}, trial {number}: {spent[-1]:.0f} s; left: {left} runs, "
        f"{left * typical / 60:.0f} min",
        flush=True,
      )
    runs[kind].append(results)
    # Written after each run, for a command that is stopped.
    summary, folder = summarise(runs), Path(config.workdir, FOLDER)
    files.write_json(folder / "ablations.json", summary)
    text = table.as_markdown(trials_table(summary))
    files.write_atomically(folder / "ablations.md", f"{text}\n")
  # The table's numbers are not to be broken across lines.
  console = Console(width=max(Console().width, WIDTH))
  table.print_tables([trials_table(summary)], console)
  return summary


def _plan(config: ConfigDict) -> list[Trial]:
  """All runs that config.ablations asks for, trial by trial."""
  kinds, trials = config.ablations.kinds, config.ablations.trials
  if "jsonl" not in config.trackers:
    raise InputError(
      "ablations read the held-out loss from metrics.jsonl: config.trackers="
      f"{config.trackers!r} needs jsonl"
    )
  if config.distributed:
    raise InputError(
      "ablations are runs of one process: leave config.distributed, or start "
      "each run by calm_jax.train"
    )
  if not kinds or set(kinds) - set(variants.KINDS) or trials < 1:
    raise InputError(
      f"ablations of kinds={kinds}, trials={trials}: give one trial or more, "
      f"and some of {list(variants.KINDS)}"
    )
  numbered = itertools.product(range(trials), kinds)
  return [plan_trial(config, kind, number) for number, kind in numbered]


def plan_trial(config: ConfigDict, kind: str, number: int) -> Trial:
  """The run of a kind, with the models that all kinds share."""
  changed = copy.deepcopy(config)  # which keeps references
  variants.apply_kinds([kind], changed)
  changed.update(
    kind=kind, trial=number, alternatives=(), output=f"{FOLDER}/{kind}/{number}"
  )
  as_dict = config_files.to_dict(changed)
  del as_dict["ablations"]
  return Trial(config_files.read_settings(changed), as_dict)


def _finished(trial: Trial) -> Results | None:
  """The results of a run, if it has been made with these settings."""
  path = Path(trial.settings.workdir, trial.settings.output, RESULTS)
  if not path.exists():
    return None
  results = json.loads(path.read_text())
  same = results["config"] == json.loads(json.dumps(trial.config))
  return results if same else None


def execute(trial: Trial) -> Results:
  """Trains and evaluates a trial, and writes its results.json."""
  settings = trial.settings
  with recipe.make_trackers(settings) as trackers:
    trained = recipe.run_recipe(settings, trackers)
  [(last, final)] = trained.models.items()
  models = {"composed": final}
  if settings.kind == "composed" and not settings.trial:
    models |= trained.frozen_models  # which are the same for all runs
  results = trained.experiment.evaluate(models, settings.last.data)
  lines = read_metrics(trained.folder / last)
  losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
  results |= {
    "kind": settings.kind,
    "parameters": trained.parameters,
    **trained.costs_json,
    "eval_loss": losses[-1] if losses else None,
    "config": trial.config,
  }
  files.write_json(trained.folder / RESULTS, results)
  return results


def scores(results: dict[str, Any], model: str) -> dict[str, float]:
  """The numbers that a table shows of a model, the headline first."""
  shown = accuracies(results, model)
  for name in ("perplexity", "bits_per_byte"):
    for text, values in results.get(name, {}).items():
      shown[f"{name.replace('_', ' ')}, {text}"] = values.get(model)
  for group, values in results.get("groups", {}).items():
    shown[group] = values["average"].get(model)
  return {label: value for label, value in shown.items() if value is not None}


def summarise(runs: Runs) -> dict[str, Any]:
  """ablations.json: by kind the runs' numbers, their mean and their range."""
  rows: dict[str, list[dict]] = {}
  for results in runs.get("composed", []):
    for model in Run(Path(), results).sides:
      if frozen := scores(results, model):
        untrained = {"parameters": 0, "difference": None}
        rows[model_label(model)] = [{"scores": frozen} | untrained]
  for kind, made in runs.items():
    rows[variants.KINDS[kind].label] = [_row(results) for results in made]
  return {
    name: {"runs": made, "scores": _spread([run["scores"] for run in made])}
    for name, made in rows.items()
    if made
  }


def _row(results: dict[str, Any]) -> dict[str, Any]:
  loss, counts = results["eval_loss"], results["parameters"]
  return {
    "scores": scores(results, "composed") | ({LOSS: loss} if loss else {}),
    "parameters": counts["trained"],
    "difference": counts["trained_minus_composition"],
    "lora_rank": counts["lora_rank"],
    "seconds": results["seconds"],
    "trial": results["config"]["trial"],
    "output": results["config"]["output"],
  }


def _spread(scores: list[dict[str, float]]) -> dict[str, dict[str, float]]:
  """Mean, lowest and highest of each number of the first run, by its label."""
  spread = {}
  for label in scores[0]:
    values = [run[label] for run in scores if label in run]
    ends = {"lowest": min(values), "highest": max(values)}
    spread[label] = {"mean": sum(values) / len(values)} | ends
  return spread


if __name__ == "__main__":
  # Trials differ in numbers only: their programs are compiled once.
  cli.keep_compiled_programs()
  cli.run_with_config(main)
