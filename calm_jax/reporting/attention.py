"""Figure of the cross-attention of a composition over one example."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.reporting import figures

# Beyond this a heat map is scaled down rather than grown, in inches.
_MAX_WIDTH, _MAX_HEIGHT = 18.0, 24.0
_CELL = 0.21


def attention_figure(
  weights_CNLM: np.ndarray,
  tokens: Sequence[str],
  connections: Sequence[str],
  prompt_length: int,
  augmenting_tokens: Sequence[str] | None = None,
) -> figures.Figure:
  """Draws the cross-attention of each connection while an answer is written.

  One panel per connection, averaged over its heads. A row is a token of the
  answer, predicted from the position before it; a column is a token that the
  augmenting model has read. Columns that are not yet visible are hatched: a
  weight of exactly zero in every head tells them.

  Args:
    tokens: the L tokens of the anchor, of which `prompt_length` are the prompt.
    connections: C names.
    augmenting_tokens: the M tokens of m_A, if its tokenizer is another.

  Raises InputError if the shapes do not fit each other, or there is no answer.
  """
  same_tokens = augmenting_tokens is None
  columns = list(tokens if same_tokens else augmenting_tokens)
  expected = (len(connections), len(tokens), len(columns))
  _check_shapes(weights_CNLM.shape, expected, prompt_length)
  rows = list(tokens[prompt_length:])
  # The weights at position t are those that predict token t + 1.
  weights_CTM = weights_CNLM.mean(axis=1)[:, prompt_length - 1 : -1]
  if same_tokens:
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
  with figures.style(grid=False):
    shared = {"sharex": True, "sharey": True}
    figure, panels = figures.make_panels(count, across, size, **shared)
    images = _draw(panels, weights_CTM)
    for axes, name in zip(panels, connections, strict=True):
      axes.set_title(f"connection {name}", loc="left", parse_math=False)
      if same_tokens:
        axes.axvline(prompt_length - 0.5, color="0.25", lw=1, ls="--")
    for axes in panels[::across]:
      _label(axes.yaxis, rows, height)
    for axes in panels[-across:]:  # A last row may have a gap.
      _label(axes.xaxis, columns, width, rotation=90)
      axes.tick_params(labelbottom=True)
    figure.supylabel("token being predicted", fontsize=11)
    figure.supxlabel("token read by the augmenting model", fontsize=11)
    bar: dict[str, Any] = {"label": "attention weight, mean of the heads"}
    bar |= {"aspect": 30, "pad": 0.025, "shrink": min(1.0, 5 / size[0])}
    figure.colorbar(images[-1], ax=figure.axes, location="top", **bar)
  return figure


def draw_maps(maps: Mapping[str, Any]) -> figures.Figure:
  """Draws what `LanguageModel.attention` returns, as `attention_figure`."""
  return attention_figure(
    maps["weights"],
    maps["tokens"],
    maps["connections"],
    maps["prompt_length"],
    maps.get("augmenting_tokens"),  # where they are others than the anchor's
  )


def _check_shapes(
  shape: tuple[int, ...], expected: tuple[int, int, int], prompt_length: int
) -> None:
  if len(shape) != 4 or (shape[0], *shape[2:]) != expected:
    raise InputError(
      f"attention weights of shape {shape} do not fit {expected[0]} "
      f"connections, {expected[1]} tokens and {expected[2]} tokens seen"
    )
  if not 1 <= prompt_length < expected[1]:
    raise InputError(
      f"a prompt of {prompt_length} of {expected[1]} tokens leaves no answer "
      "to draw"
    )


def _draw(panels, weights_CTM: np.ndarray) -> list:
  """Draws heat maps on one scale; hatches show where there is no weight."""
  options = {"cmap": "Greys", "aspect": "auto", "interpolation": "nearest"}
  scale = {"vmin": 0, "vmax": max(float(weights_CTM.max()), 1e-6)}
  images = []
  for axes, weights_TM in zip(panels, weights_CTM, strict=True):
    axes.set_facecolor("white")
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("0.8")
    masked = np.ma.masked_equal(weights_TM, 0.0)
    images.append(axes.imshow(masked, **options, **scale))
  return images


def _label(axis, tokens: Sequence[str], cell: float, rotation=0) -> None:
  # Every k-th token, where the cells are too small for a readable name each.
  every = max(1, math.ceil(0.13 / cell))
  names = [_visible(token) for token in tokens[::every]]
  font = {"rotation": rotation, "fontsize": 9, "family": "monospace"}
  axis.set_ticks(range(0, len(tokens), every), names, parse_math=False, **font)
  axis.set_tick_params(length=2)


def _visible(token: str, width: int = 12) -> str:
  """Makes the blanks of a token visible, and cuts it to a width."""
  for blank, mark in ((" ", "␣"), ("▁", "␣"), ("\n", "⏎"), ("\t", "⇥")):
    token = token.replace(blank, mark)
  token = "".join(c if c.isprintable() else "·" for c in token)
  return token if len(token) <= width else token[: width - 1] + "…"
