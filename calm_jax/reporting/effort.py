"""Accuracy against trained parameters: composing beside adapting m_B."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from calm_jax.core.errors import InputError
from calm_jax.reporting.figures import STYLE
from calm_jax.reporting.predictions import wilson_interval
from calm_jax.reporting.runs import Column, RunGroup

_MARKS = "os^Dvp*X"


class Effort(NamedTuple):
  """A model's accuracy with its interval, in %, and what was trained for it."""

  label: str
  trained: int  # parameters; 0 where nothing was trained
  accuracy: float
  low: float
  high: float


def efforts(group: RunGroup, benchmark: str) -> list[Effort]:
  """Reads a benchmark's accuracy, over all subsets, of every column.

  The interval is Wilson's, over the questions of all trials.
  """
  names = group.subsets(benchmark).values()
  found = [_effort(column, list(names)) for column in group.columns.values()]
  return [effort for effort in found if effort]


def _effort(column: Column, names: Sequence[str]) -> Effort | None:
  right, total = 0.0, 0
  for run in column.runs:
    for name in names:
      entry = run.evaluations.get(name)
      if entry and column.model in entry["scores"]:
        score = entry["scores"][column.model]["value"]
        right += score * entry["examples"] / 100
        total += entry["examples"]
  if not total:
    return None
  counts = column.runs[0].results.get("parameters", {})
  trained = counts.get("trained", 0) if column.model == "composed" else 0
  low, high = wilson_interval(round(right), total)
  accuracy = 100 * right / total
  return Effort(column.label, trained, accuracy, 100 * low, 100 * high)


def effort_figure(found: Sequence[Effort], title: str) -> Figure:
  """Draws a mark for each model that was trained, and a line for each other.

  InputError if nothing was trained.
  """
  trained = [effort for effort in found if effort.trained]
  if not trained:
    raise InputError("no model to draw was trained")
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(6.6, 3.7), layout="constrained")
    axes = figure.subplots()
    for at, effort in enumerate(trained):
      spread = [[effort.accuracy - effort.low], [effort.high - effort.accuracy]]
      axes.errorbar(
        effort.trained,
        effort.accuracy,
        yerr=[[max(0.0, part) for part in side] for side in spread],
        fmt=_MARKS[at % len(_MARKS)],
        color="k" if at == 0 else "0.45",
        label=effort.label,
        capsize=3,
        ms=8,
      )
    lines = [effort for effort in found if not effort.trained]
    for effort, style in zip(lines, (":", "--", "-.", "-") * 2, strict=False):
      label = f"{effort.label}, nothing trained"
      axes.axhline(effort.accuracy, ls=style, color="#0072B2", label=label)
    axes.set_xscale("log")
    counts = [effort.trained for effort in trained]
    axes.set_xlim(min(counts) / 3, max(counts) * 3)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title, parse_math=False)
    figure.legend(loc="outside right upper")
  return figure
