"""The figures that a group of runs has data for."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.reporting import audit, effort, figures, paper
from calm_jax.reporting.attention import draw_maps
from calm_jax.reporting.predictions import count_by_terms
from calm_jax.reporting.runs import Run, RunGroup
from calm_jax.training.metrics import read_metrics

# What the bars of an audit show, by its kind.
_AUDITED = {"answers": "%", "likelihood": "nats per byte"}
_QUESTIONS = "questions"  # the task of evaluations by exact match


class Picture(NamedTuple):
  """A figure, its title, and a description in words."""

  figure: figures.Figure
  title: str
  caption: str


def pictures(group: RunGroup) -> list[Picture]:
  """Draws accuracy by trained parameters, the audit, gains, accuracy by length,
  loss and attention, as far as possible.

  InputError if a file is not what a run writes.
  """
  first = group.runs[0]
  drawn = [_efforts(group)]
  drawn += [_audit(group, *pair) for pair in _AUDITED.items()]
  drawn += [_gains(benchmark, first) for benchmark in group.benchmarks]
  drawn += [_accuracy(first), _loss(group), _attention(group)]
  return [picture for picture in drawn if picture]


def stages(
  folders: Iterable[Path], order: Iterable[str]
) -> dict[str, list[dict]]:
  """Reads the metrics of each stage with a loss, in the order they were run."""
  paths = {
    path.parent.name: path.parent
    for folder in folders
    for path in sorted(folder.glob("*/metrics.jsonl"))
  }
  names = [
    name for name in dict.fromkeys([*order, *sorted(paths)]) if name in paths
  ]
  metrics = {name: read_metrics(paths[name]) for name in names}
  return {
    name: lines
    for name, lines in metrics.items()
    if figures.curve(lines, "loss").size
  }


def language_order(
  results: Mapping[str, Any], codes: Iterable[str]
) -> tuple[list[str], str]:
  """Sorts languages from low to high resource, as far as that is known.

  As the config lists them, unless that is by name; else by how badly m_B
  predicts held-out text of them; else by name. Returns the codes, and what
  their order is.
  """
  codes = sorted(codes)
  listed = [*(results.get("config", {}).get("task", {}).get("languages") or ())]
  if listed == sorted(listed):
    listed = []
  rank = {code: at for at, code in enumerate(listed)}
  how = "in the order of the config's task.languages"
  if not rank.keys() & set(codes):
    bits = results.get("bits_per_byte", {})
    rank = {c: -float(x["anchor"]) for c, x in bits.items() if "anchor" in x}
    how = "from many to few bits per byte that m_B needs for held-out text"
  if not rank.keys() & set(codes):
    return codes, "by name, for how much text there is of each is not known"
  if rest := [code for code in codes if code not in rank]:
    how += f", then those without a place in it ({', '.join(rest)})"
  return sorted(codes, key=lambda code: rank.get(code, math.inf)), how


def _efforts(group: RunGroup) -> Picture | None:
  """Draws the benchmarks of questions that several trained models answered."""
  entries = group.evaluations.values()
  asked = dict.fromkeys(e["group"] for e in entries if e["task"] == _QUESTIONS)
  by_name = {name: effort.efforts(group, name) for name in asked}
  found = {
    name: efforts
    for name, efforts in by_name.items()
    if sum(e.trained > 0 for e in efforts) > 1
  }
  if not found:
    return None
  return Picture(
    effort.effort_figure(found),
    "Accuracy by trained parameters",
    "Mean of all kinds of questions; bars: 95% Wilson intervals. A line is a "
    "model, or a way to use both, that nothing was trained for.",
  )


def _audit(group: RunGroup, kind: str, ylabel: str) -> Picture | None:
  found = audit.entries(group, kind)
  if not found:
    return None
  return Picture(
    audit.bars_figure(found, ylabel),
    f"Audit: {kind}",
    "One trained composition with m_A's own states (correct), those of other "
    "examples (mismatched), none (zeroed) and noise, beside the models alone. "
    "What correct is above mismatched comes from what m_A has read; lines are "
    "95% intervals.",
  )


def _gains(benchmark: str, run: Run) -> Picture | None:
  deltas = {
    entry["subset"]: entry["against_anchor"]["composed"]
    for entry in run.evaluations.values()
    if entry["group"] == benchmark
    and entry["task"] != _QUESTIONS
    and "composed" in entry.get("against_anchor", {})
  }
  if len(deltas) < 2:
    return None
  order, how = language_order(run.results, deltas)
  gains = [
    figures.Gain(name, *(deltas[name][k] for k in figures.Gain._fields[1:]))
    for name in order
  ]
  better = sum(gain.delta > 0 for gain in gains)
  title, of_paper = f"Gains of the composed model, {benchmark}", ""
  if benchmark == "FLORES-200":
    title = f"Figure 2: gains of the composed model, {benchmark}"
    counted = paper.TABLES["table-5-better"][benchmark]["composed"]
    languages = paper.TABLE5_LANGUAGES[benchmark]
    of_paper = f" (the paper: {counted:.0f} of {languages})"
  return Picture(
    figures.gains_figure(gains),
    title,
    f"From the left {how}. Above 0 for {better} of {len(gains)}{of_paper}. "
    "Bars: 95% intervals, paired over the examples; filled where p < 0.05.",
  )


def _accuracy(run: Run) -> Picture | None:
  counts = count_by_terms(run)
  if not counts:
    return None
  return Picture(
    figures.accuracy_figure(counts),
    "Accuracy by number of terms",
    "Each point is the share of right answers among the expressions of that "
    "many terms; bars: 95% Wilson intervals.",
  )


def _loss(group: RunGroup) -> Picture | None:
  run = group.runs[0]
  order = run.results.get("seconds", {})
  curves = stages(dict.fromkeys((run.root, run.folder.absolute())), order)
  if not curves:
    return None
  return Picture(
    figures.loss_figure(curves),
    "Training loss",
    "Cross-entropy of each stage on a log axis; the thick line is a moving "
    "average, the dashed one the loss on examples that are not trained on.",
  )


def _attention(group: RunGroup) -> Picture | None:
  paths = [run.folder / "attention.npz" for run in group.runs]
  path = next(filter(Path.exists, paths), None)
  if path is None:
    return None
  with np.load(path, allow_pickle=False) as arrays:
    maps = dict(arrays)
  names = {"weights", "tokens", "connections", "prompt_length"}
  if not names <= maps.keys():
    raise InputError(f"{path} needs {sorted(names)}, has {[*maps]}")
  return Picture(
    draw_maps(maps),
    "Where the composed model looks",
    "Cross-attention of one example, mean of the heads. A row is a token of "
    "the answer, a column a token that the augmenting model has read; the "
    "dashed line is the end of the prompt, hatched is not yet visible.",
  )
