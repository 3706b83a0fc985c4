"""Figures of a run: loss, accuracy by length, gains.

They are drawn without pyplot, which has global state, and can be read in black
and white.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.core.extras import import_extra
from calm_jax.reporting.predictions import CountsByTerms, wilson_interval
from calm_jax.reporting.runs import MODELS

if TYPE_CHECKING:
  import matplotlib.figure

Figure: TypeAlias = "matplotlib.figure.Figure"
DPI = 150


class Gain(NamedTuple):
  """The gain in a language with its interval, in points of the metric."""

  label: str
  delta: float
  low: float
  high: float
  p_value: float


_STYLE = {"font.size": 11, "axes.titlesize": 11}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
_STYLE |= {"axes.axisbelow": True, "grid.color": "0.88"}
_STYLE |= {"legend.frameon": False}
# Okabe and Ito's colours can be told apart with any colour vision.
_LINES = {
  "augmenting": ("augmenting $m_A$", "s:", "#0072B2"),
  "anchor": ("anchor $m_B$", "^--", "#D55E00"),
  "composed": ("composed", "o-", "#000000"),
}
_LANGUAGES = 50  # in a row of `gains_figure`


def load_matplotlib() -> ModuleType:
  """Imports matplotlib; InputError names the extra that has it."""
  return import_extra("figures and reports", "matplotlib", "report")


def style(grid: bool = True) -> AbstractContextManager:
  """Returns a context in which figures are drawn in the style of reports."""
  return load_matplotlib().rc_context(_STYLE | {"axes.grid": grid})


def loss_figure(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
  """Draws the training loss of each stage, one panel each, on a log axis.

  Args:
    stages: stage name to its metrics, dicts with "step" and "loss" or
      "eval_loss". A loss that a log axis cannot show is left out.

  Raises InputError if no stage has a loss to draw.
  """
  curves = {
    name: [curve(lines, kind) for kind in ("loss", "eval_loss")]
    for name, lines in stages.items()
  }
  curves = {name: pair for name, pair in curves.items() if pair[0].size}
  if not curves:
    raise InputError(f"no loss to draw in the stages {list(stages)}")
  columns = min(len(curves), 3)
  size = (max(3.5 * columns, 5), 3.0 * math.ceil(len(curves) / columns))
  with style():
    figure, panels = make_panels(len(curves), columns, size)
    for axes, (name, pair) in zip(panels, curves.items(), strict=True):
      _draw_loss(axes, *pair)
      axes.set_title(name, parse_math=False)
    for axes in panels[::columns]:
      axes.set_ylabel("loss (nats per token)")
    _legend(figure, panels)
  return figure


def accuracy_figure(counts: CountsByTerms) -> Figure:
  """Draws accuracy by number of terms: a panel a data set, a line a model.

  The bars are 95% Wilson intervals. InputError if there is nothing to draw.
  """
  pairs = [pair for by_model in counts.values() for pair in by_model.items()]
  if not pairs:
    raise InputError("no predictions to draw")
  shown = {model for model, _ in pairs}
  models = [model for model in MODELS if model in shown]
  terms = sorted({number for _, by_terms in pairs for number in by_terms})
  size = (max(4.2 * len(counts), 5), 3.7)
  with style():
    figure, panels = make_panels(len(counts), len(counts), size, sharey=True)
    for axes, (title, by_model) in zip(panels, counts.items(), strict=True):
      for at, model in enumerate(models):
        if model in by_model:
          # Apart, or the bars of two models at the same value would merge.
          shift = 0.09 * (at - (len(models) - 1) / 2)
          _draw_accuracy(axes, model, by_model[model], shift)
      axes.set_title(title, parse_math=False)
      axes.set_xlabel("number of terms")
      axes.set_xticks(terms)
      axes.set_xlim(terms[0] - 0.4, terms[-1] + 0.4)
      axes.grid(axis="x", visible=False)
    panels[0].set_ylim(-3, 103)
    panels[0].set_ylabel("accuracy (%)")
    _legend(figure, panels)
  return figure


def gains_figure(gains: Sequence[Gain]) -> Figure:
  """Draws Figure 2: a composition's gains over m_B, language by language.

  A bar is the 95% interval; a mark is filled where p < 0.05. InputError if
  there are no gains.
  """
  if not gains:
    raise InputError("no languages to draw")
  rows = [gains[i : i + _LANGUAGES] for i in range(0, len(gains), _LANGUAGES)]
  size = (max(0.19 * max(map(len, rows)) + 1, 5), 2.9 * len(rows))
  with style():
    figure, panels = make_panels(len(rows), 1, size, sharey=True)
    for axes, row in zip(panels, rows, strict=True):
      for at, gain in enumerate(row):
        sure = gain.p_value < 0.05
        axes.plot([at, at], [gain.low, gain.high], color="0.45", lw=1.2)
        axes.plot(at, gain.delta, "ko", mfc="k" if sure else "w", ms=5)
      axes.axhline(0, color="k", lw=0.8)
      labels = [gain.label for gain in row]
      axes.set_xticks(range(len(row)), labels, rotation=90)
      axes.set_xlim(-0.8, max(map(len, rows)) - 0.2)
      axes.grid(axis="x", visible=False)
      axes.set_ylabel("gain over $m_B$")
  return figure


def make_panels(
  count: int, columns: int, size: tuple[float, float], **options
) -> tuple[Figure, np.ndarray]:
  """Makes a figure with `count` panels, row by row."""
  import matplotlib.figure

  figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
  rows = math.ceil(count / columns)
  panels = figure.subplots(rows, columns, squeeze=False, **options).ravel()
  for axes in panels[count:]:
    axes.set_visible(False)
  return figure, panels[:count]


def svg(figure: Figure) -> bytes:
  """Returns an SVG file, the same for the same figure."""
  file = io.BytesIO()
  with load_matplotlib().rc_context({"svg.hashsalt": "calm_jax"}):
    figure.savefig(file, format="svg", metadata={"Date": None})
  return file.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
  """Writes a PNG."""
  figure.savefig(path, dpi=DPI, format="png")


def _smooth(values: np.ndarray) -> np.ndarray:
  """A centred moving average; its window is a twenty-fifth of the curve."""
  half = math.ceil(len(values) / 50)
  total = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  low = np.maximum(index - half, 0)
  high = np.minimum(index + half + 1, len(values))
  return (total[high] - total[low]) / (high - low)


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
  """Steps and values [2, points] of metrics, as far as a log axis has them."""
  points = [(x["step"], float(x[name])) for x in lines if name in x]
  points = [p for p in points if math.isfinite(p[1]) and p[1] > 0]
  return np.array(points, dtype=float).reshape(-1, 2).T


def _draw_loss(axes, training: np.ndarray, held_out: np.ndarray) -> None:
  from matplotlib import ticker

  steps, losses = training
  lone = "o" if len(steps) == 1 else None
  axes.plot(steps, losses, color="0.65", lw=0.6, label="as logged")
  smooth = {"color": "#0072B2", "lw": 2, "label": "smoothed"}
  axes.plot(steps, _smooth(losses), marker=lone, **smooth)
  if held_out.size:
    axes.plot(*held_out, "k--", marker="D", ms=4, lw=1.2, label="evaluation")
  axes.set_yscale("log")
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(
    lambda x, _: f"{x / 1000:g}k" if abs(x) >= 1000 else f"{x:g}"
  )
  # A loss often spans less than a decade, where a log axis has no major tick.
  low, high = axes.get_ylim()
  ticks = (1, 2, 5) if high / low < 300 else (1,)
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=ticks, numticks=12))
  axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
  axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _legend(figure: Figure, panels) -> None:
  """One legend for all panels, of each label once."""
  handles = {}
  for axes in panels:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  place: Any = {"loc": "outside lower center", "ncols": len(handles)}
  figure.legend(handles.values(), handles.keys(), handlelength=3, **place)


def _draw_accuracy(
  axes, model: str, by_terms: Mapping[int, tuple[int, int]], shift: float
) -> None:
  terms = sorted(by_terms)
  shares = np.array([by_terms[n][0] / by_terms[n][1] for n in terms])
  bounds = np.array([wilson_interval(*by_terms[n]) for n in terms])
  label, shape, colour = _LINES[model]
  style = {"capsize": 3, "lw": 1.8, "elinewidth": 1.1, "ms": 6}
  axes.errorbar(
    np.array(terms) + shift,
    100 * shares,
    yerr=100 * np.abs(bounds.T - shares),
    fmt=shape,
    color=colour,
    label=label,
    mfc="white" if model != "composed" else None,
    **style,
  )
