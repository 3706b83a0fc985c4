"""Figure of the cross-attention of a composition over one example."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

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
) -> Figure:
  """Draws the cross-attention of each connection while an answer is written.

  One panel per connection, averaged over its heads. A row is a token of the
  answer, predicted from the position before it; a column is a token that the
  augmenting model has read. Columns that are not yet visible are hatched: a
  weight of exactly zero in every head tells them.

  Args:
    weights_CNLM: cross-attention weights of one example.
    tokens: the L tokens of the anchor, of which `prompt_length` are the prompt.
    connections: C names.
    prompt_length: at least 1, and less than L.
    augmenting_tokens: the M tokens of m_A, if its tokenizer is another.

  Raises InputError if the shapes do not fit each other, or there is no answer.
  """
  columns = list(tokens if augmenting_tokens is None else augmenting_tokens)
  expected = (len(connections), len(tokens), len(columns))
  _check_shapes(weights_CNLM.shape, expected, prompt_length)
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
  with matplotlib.rc_context({**figures.STYLE, "axes.grid": False}):
    figure, panels = figures.make_panels(
      count, across, size, sharex=True, sharey=True
    )
    top = max(float(weights_CTM.max()), 1e-6)
    for axes, name, weights in zip(
      panels, connections, weights_CTM, strict=True
    ):
      image = _draw_attention(axes, weights, top)
      if augmenting_tokens is None:
        axes.axvline(prompt_length - 0.5, color="0.25", lw=1, ls="--")
      axes.set_title(f"connection {name}", loc="left", parse_math=False)
    for axes in panels[::across]:
      _label(axes.yaxis, rows, height)
    for axes in panels[-across:]:
      # The lowest of each column: a last row may have a gap.
      _label(axes.xaxis, columns, width, rotation=90)
      axes.tick_params(labelbottom=True)
    figure.supylabel("token being predicted", fontsize=11)
    figure.supxlabel("token read by the augmenting model", fontsize=11)
    figure.colorbar(
      image,
      ax=figure.axes,
      location="top",
      shrink=min(1.0, 5 / size[0]),
      aspect=30,
      pad=0.025,
      label="attention weight, mean of the heads",
    )
  return figure


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
  """Makes the blanks of a token visible, and cuts it to a width."""
  for blank, mark in ((" ", "␣"), ("▁", "␣"), ("\n", "⏎"), ("\t", "⇥")):
    token = token.replace(blank, mark)
  token = "".join(c if c.isprintable() else "·" for c in token)
  return token if len(token) <= width else token[: width - 1] + "…"
