"""Accuracy against trained parameters: composing beside adapting m_B."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from calm_jax.core.errors import InputError
from calm_jax.reporting.figures import Figure, make_panels, style
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


def effort_figure(benchmarks: Mapping[str, Sequence[Effort]]) -> Figure:
  """Draws a panel for each benchmark: a mark for each model that was trained,
  and a line for each other.

  InputError if a benchmark has no model that was trained.
  """
  columns = min(len(benchmarks), 2)
  rows = math.ceil(len(benchmarks) / columns)
  size = (max(3.4 * columns, 5), 2.7 * rows + 1)
  with style():
    figure, panels = make_panels(len(benchmarks), columns, size, sharey=True)
    for axes, (title, found) in zip(panels, benchmarks.items(), strict=True):
      if not any(effort.trained for effort in found):
        raise InputError(f"{title}: no model to draw was trained")
      _draw(axes, found)
      axes.set_title(title, parse_math=False)
      axes.set_xlabel("trained parameters")
    panels[0].set_ylim(-3, 103)
    for axes in panels[::columns]:
      axes.set_ylabel("accuracy (%)")
    handles = dict(
      zip(*reversed(panels[0].get_legend_handles_labels()), strict=True)
    )
    figure.legend(
      handles.values(), handles.keys(), loc="outside lower center", ncols=2
    )
  return figure


def _draw(axes, found: Sequence[Effort]) -> None:
  trained = [effort for effort in found if effort.trained]
  for at, effort in enumerate(trained):
    below, above = effort.accuracy - effort.low, effort.high - effort.accuracy
    axes.errorbar(
      effort.trained,
      effort.accuracy,
      yerr=[[max(0.0, below)], [max(0.0, above)]],
      fmt=_MARKS[at % len(_MARKS)],
      color="k" if at == 0 else "0.45",
      label=effort.label,
      capsize=3,
      ms=8,
    )
  lines = [effort for effort in found if not effort.trained]
  for effort, dashes in zip(lines, (":", "--", "-.", "-") * 2, strict=False):
    axes.axhline(
      effort.accuracy, ls=dashes, color="#0072B2", label=effort.label
    )
  counts = [effort.trained for effort in trained]
  axes.set_xscale("log")
  axes.set_xlim(min(counts) / 3, max(counts) * 3)
