"""Figures of a run: loss, accuracy by length, gains, cross-attention.

Drawn on `Figure` objects, not through pyplot: no global state, no backend to
choose at import, and nothing to close. Lines differ by style and marker, and
maps by lightness, so that all of it reads in black and white.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from calm_jax.core.errors import InputError
from calm_jax.reporting.predictions import wilson_interval
from calm_jax.reporting.runs import MODELS

DPI = 150


class Gain(NamedTuple):
  """The gain in a language with its interval, in points of the metric."""

  label: str
  delta: float
  low: float
  high: float
  p_value: float


_STYLE = {
  "font.size": 11,
  "axes.titlesize": 11,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "0.88",
  "legend.frameon": False,
}
# Okabe and Ito's colours, told apart with any colour vision.
_LINES = {
  "augmenting": {"color": "#0072B2", "linestyle": ":", "marker": "s"},
  "anchor": {"color": "#D55E00", "linestyle": "--", "marker": "^"},
  "composed": {"color": "#000000", "linestyle": "-", "marker": "o"},
}
_LABELS = {
  "augmenting": "augmenting $m_A$",
  "anchor": "anchor $m_B$",
  "composed": "composed",
}
# Beyond this a heat map is scaled down rather than grown, in inches.
_MAX_WIDTH, _MAX_HEIGHT = 18.0, 24.0
_CELL = 0.21
_LANGUAGES = 50  # in a row of `gains_figure`


def loss_figure(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
  """Draws the training loss of each stage, one panel each, on a log axis.

  Args:
    stages: stage name to its metrics, dicts with "step" and "loss" or
      "eval_loss". A loss that a log axis cannot show is left out.

  Raises:
    InputError: no stage has a loss to draw.
  """
  series = {}
  for name, lines in stages.items():
    points = _curve(lines, "loss")
    if points.size:
      series[name] = points, _curve(lines, "eval_loss")
  if not series:
    raise InputError(f"no loss to draw in the stages {list(stages)}")
  columns = min(len(series), 3)
  rows = math.ceil(len(series) / columns)
  with matplotlib.rc_context(_STYLE):
    size = (max(3.5 * columns, 5), 3.0 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, curves) in zip(panels, series.items(), strict=False):
      _draw_loss(axes, *curves)
      axes.set_title(name, parse_math=False)
    for axes in panels[len(series) :]:
      axes.set_visible(False)
    for axes in panels[: len(series) : columns]:
      axes.set_ylabel("loss (nats per token)")
    _legend(figure, panels)
  return figure


def accuracy_figure(
  counts: Mapping[str, Mapping[str, Mapping[int, tuple[int, int]]]],
) -> Figure:
  """Draws accuracy by number of terms: a panel a data set, a line a model.

  Args:
    counts: title of the panel -> model -> number of terms -> (correct, total).
      The bars are 95% Wilson intervals.

  Raises:
    InputError: there is nothing to draw.
  """
  if not any(by_model for by_model in counts.values()):
    raise InputError("no predictions to draw")
  shown = {model for by_model in counts.values() for model in by_model}
  models = [model for model in MODELS if model in shown]
  terms = {
    n for by_model in counts.values() for c in by_model.values() for n in c
  }
  with matplotlib.rc_context(_STYLE):
    size = (max(4.2 * len(counts), 5), 3.7)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    for axes, (title, by_model) in zip(panels, counts.items(), strict=True):
      for model in models:
        if model in by_model:
          # Apart, or the bars of two models at the same value would merge.
          shift = 0.09 * (models.index(model) - (len(models) - 1) / 2)
          _draw_accuracy(axes, model, by_model[model], shift)
      axes.set_title(title, parse_math=False)
      axes.set_xlabel("number of terms")
      axes.set_xticks(sorted(terms))
      axes.set_xlim(min(terms) - 0.4, max(terms) + 0.4)
      axes.grid(axis="x", visible=False)
    panels[0].set_ylim(-3, 103)
    panels[0].set_ylabel("accuracy (%)")
    _legend(figure, panels)
  return figure


def gains_figure(gains: Sequence[Gain]) -> Figure:
  """Draws Figure 2: a composition's gains over m_B, language by language.

  A bar is the 95% interval; a mark is filled where p < 0.05.

  Args:
    gains: in the order to draw, from the left.

  Raises:
    InputError: there is nothing to draw.
  """
  if not gains:
    raise InputError("no languages to draw")
  rows = [gains[i : i + _LANGUAGES] for i in range(0, len(gains), _LANGUAGES)]
  size = (max(0.19 * max(map(len, rows)) + 1, 5), 2.9 * len(rows))
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, sharey=True).ravel()
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


def attention_figure(
  weights_CNLM: np.ndarray,
  tokens: Sequence[str],
  connections: Sequence[str],
  prompt_length: int,
  augmenting_tokens: Sequence[str] | None = None,
) -> Figure:
  """Draws the cross-attention of each connection while an answer is written.

  One panel per connection, averaged over its heads. A row is a token of the
  answer, predicted from the position before it; a column is a token that the
  augmenting model has read. Columns that are not yet visible are hatched: a
  weight of exactly zero in every head tells them.

  Args:
    weights_CNLM: cross-attention weights of one example.
    tokens: the L tokens of the anchor, prompt and answer.
    connections: C names.
    prompt_length: how many of the tokens are the prompt; at least 1.
    augmenting_tokens: the M tokens of the augmenting model, where it has a
      tokenizer of its own.

  Raises:
    InputError: the shapes do not fit each other, or there is no answer.
  """
  columns = list(tokens if augmenting_tokens is None else augmenting_tokens)
  _check_shapes(weights_CNLM, connections, tokens, columns, prompt_length)
  rows = list(tokens[prompt_length:])
  # The weights at position t are those that predict token t + 1.
  weights_CTM = weights_CNLM.mean(axis=1)[:, prompt_length - 1 : -1]
  if augmenting_tokens is None:
    # Nothing predicts from the last token: its column would be empty.
    columns, weights_CTM = columns[:-1], weights_CTM[..., :-1]
  count = len(connections)
  across = 2 if count > 2 and 2 * len(columns) * _CELL < _MAX_WIDTH - 3 else 1
  down = math.ceil(count / across)
  width = min(_CELL, (_MAX_WIDTH / across - 1) / len(columns))
  height = min(_CELL, (_MAX_HEIGHT / down - 1) / len(rows))
  size = (
    max(across * (width * len(columns) + 0.5) + 0.5, 5.5),
    down * (height * len(rows) + 0.4) + 1.9,
  )
  with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
      down, across, squeeze=False, sharex=True, sharey=True
    )
    panels = grid.ravel()[:count]
    top = max(float(weights_CTM.max()), 1e-6)
    for axes, name, weights_TM in zip(
      panels, connections, weights_CTM, strict=True
    ):
      image = _draw_attention(axes, weights_TM, top)
      if augmenting_tokens is None:
        axes.axvline(prompt_length - 0.5, color="0.25", lw=1, ls="--")
      axes.set_title(f"connection {name}", loc="left", parse_math=False)
    for axes in grid.ravel()[count:]:
      axes.set_visible(False)
    for axes in grid[:, 0]:
      _label(axes.yaxis, rows, height)
    for axes in panels[-across:]:
      # The lowest of each column: a last row may have a gap.
      _label(axes.xaxis, columns, width, rotation=90)
      axes.tick_params(labelbottom=True)
    figure.supylabel("token being predicted", fontsize=11)
    figure.supxlabel("token read by the augmenting model", fontsize=11)
    figure.colorbar(
      image,
      ax=list(grid.ravel()),
      location="top",
      shrink=min(1.0, 5 / size[0]),
      aspect=30,
      pad=0.025,
      label="attention weight, mean of the heads",
    )
  return figure


def svg(figure: Figure) -> bytes:
  """The figure as an SVG file, the same for the same figure."""
  file = io.BytesIO()
  with matplotlib.rc_context({"svg.hashsalt": "calm_jax"}):
    figure.savefig(file, format="svg", metadata={"Date": None})
  return file.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
  """Writes a PNG."""
  figure.savefig(path, dpi=DPI, format="png")


def _check_shapes(
  weights_CNLM: np.ndarray,
  connections: Sequence[str],
  tokens: Sequence[str],
  columns: Sequence[str],
  prompt_length: int,
) -> None:
  shape = weights_CNLM.shape
  expected = (len(connections), len(tokens), len(columns))
  if weights_CNLM.ndim != 4 or (shape[0], *shape[2:]) != expected:
    raise InputError(
      f"attention weights of shape {shape} do not fit {expected[0]} "
      f"connections, {expected[1]} tokens and {expected[2]} tokens seen"
    )
  if not 1 <= prompt_length < len(tokens):
    raise InputError(
      f"a prompt of {prompt_length} of {len(tokens)} tokens leaves no answer "
      "to draw"
    )


def _smooth(values: np.ndarray) -> np.ndarray:
  """A centred moving average over a twenty-fifth of the curve.

  At the ends it is the mean of the part of the window that there is.
  """
  half = math.ceil(len(values) / 50)
  total = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  low = np.maximum(index - half, 0)
  high = np.minimum(index + half + 1, len(values))
  return (total[high] - total[low]) / (high - low)


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
  """Steps and values, [2, points]."""
  points = [(x["step"], float(x[name])) for x in lines if name in x]
  points = [p for p in points if math.isfinite(p[1]) and p[1] > 0]
  return np.array(points, dtype=float).reshape(-1, 2).T


def _draw_loss(axes, training: np.ndarray, held_out: np.ndarray) -> None:
  steps, losses = training
  lone = "o" if len(steps) == 1 else None
  axes.plot(steps, losses, color="0.65", lw=0.6, label="as logged")
  axes.plot(
    steps, _smooth(losses), color="#0072B2", lw=2, marker=lone, label="smoothed"
  )
  if held_out.size:
    axes.plot(*held_out, "k--", marker="D", ms=4, lw=1.2, label="evaluation")
  axes.set_yscale("log")
  axes.set_xlabel("step")
  axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
  # A loss often spans less than a decade, where a log axis has no major tick.
  low, high = axes.get_ylim()
  narrow = high / low < 300
  axes.yaxis.set_major_locator(
    LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=12)
  )
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
  axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, panels) -> None:
  """One legend for all panels, of each label once."""
  handles = {}
  for axes in panels:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside lower center",
    ncols=len(handles),
    handlelength=3,
  )


def _short_number(value: float, _=None) -> str:
  return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def _draw_accuracy(
  axes, model: str, by_terms: Mapping[int, tuple[int, int]], shift: float
) -> None:
  terms = sorted(by_terms)
  shares = np.array([by_terms[n][0] / by_terms[n][1] for n in terms])
  bounds = np.array([wilson_interval(*by_terms[n]) for n in terms])
  axes.errorbar(
    np.array(terms) + shift,
    100 * shares,
    yerr=100 * np.abs(bounds.T - shares),
    capsize=3,
    lw=1.8,
    elinewidth=1.1,
    markersize=6,
    markerfacecolor="white" if model != "composed" else None,
    label=_LABELS[model],
    **_LINES[model],
  )


def _draw_attention(axes, weights_TM: np.ndarray, top: float):
  # Hatched below the picture: shows only where the masked array is empty.
  axes.set_facecolor("white")
  axes.patch.set_hatch("////")
  axes.patch.set_edgecolor("0.8")
  return axes.imshow(
    np.ma.masked_equal(weights_TM, 0.0),
    cmap="Greys",
    vmin=0,
    vmax=top,
    aspect="auto",
    interpolation="nearest",
  )


def _label(axis, tokens: Sequence[str], cell: float, rotation=0) -> None:
  # Every k-th token, where the cells are too small for a readable name each.
  every = max(1, math.ceil(0.13 / cell))
  places = range(0, len(tokens), every)
  axis.set_ticks(
    places,
    [_visible(tokens[i]) for i in places],
    rotation=rotation,
    fontsize=9,
    family="monospace",
    parse_math=False,
  )
  axis.set_tick_params(length=2)


def _visible(token: str, width: int = 12) -> str:
  """A token with its blanks made visible, cut to a width."""
  token = token.replace(" ", "␣").replace("▁", "␣")
  token = token.replace("\n", "⏎").replace("\t", "⇥")
  token = "".join(c if c.isprintable() else "·" for c in token)
  return token if len(token) <= width else token[: width - 1] + "…"
