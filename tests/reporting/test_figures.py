import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from calm_jax.core.errors import InputError
from calm_jax.reporting import attention, figures

ROOT = Path(__file__).parents[2]


def texts(figure):
  figure.canvas.draw()
  return [label.get_text() for label in figure.findobj(match=is_text)]


def is_text(artist):
  return hasattr(artist, "get_text") and bool(artist.get_text())


def causal_weights(connections, heads, length):
  weights = np.tril(np.ones((connections, heads, length, length)))
  return weights / weights.sum(axis=-1, keepdims=True)


def test_loss_has_a_panel_per_stage_and_skips_what_it_cannot_show(tmp_path):
  figure = figures.loss_figure(
    {
      "train $a$": [{"step": i, "loss": 2 / i} for i in range(1, 200)],
      "compose": [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 0.0},
        {"step": 4, "loss": 1.0},
        {"step": 4, "eval_loss": 1.5},
      ],
      "empty": [{"step": 1, "seconds": 3.0}],
    }
  )
  assert [axes.get_title() for axes in figure.axes] == ["train $a$", "compose"]
  raw, smooth, held_out = figure.axes[1].lines
  np.testing.assert_array_equal(raw.get_xdata(), [1, 4])
  np.testing.assert_array_equal(held_out.get_xydata(), [[4, 1.5]])
  assert smooth.get_linewidth() > raw.get_linewidth()
  assert figure.axes[0].get_yscale() == "log"
  figures.save_figure(figure, tmp_path / "loss.png")
  assert matplotlib.image.imread(tmp_path / "loss.png").ndim == 3


def test_no_loss_is_an_error():
  with pytest.raises(InputError, match="empty"):
    figures.loss_figure({"empty": [{"step": 1}]})


@pytest.mark.parametrize("size", [1, 2, 3, 199])
def test_smoothing_keeps_a_constant_and_the_length(size):
  np.testing.assert_allclose(figures._smooth(np.full(size, 3.0)), 3.0)


def test_smoothing_is_the_mean_of_its_window():
  values = np.arange(100.0) ** 2
  smooth = figures._smooth(values)
  assert smooth[50] == pytest.approx(values[48:53].mean())
  assert smooth[0] == pytest.approx(values[:3].mean())


def test_accuracy_bars_are_wilson_intervals_and_lines_differ_in_style():
  figure = figures.accuracy_figure(
    {
      "KV-MATH": {
        "anchor": {3: (0, 10), 4: (0, 10)},
        "composed": {4: (5, 10), 3: (10, 10)},
      },
      "NUM-MATH": {"augmenting": {3: (1, 10)}},
    }
  )
  kv, num = figure.axes
  assert [kv.get_title(), num.get_title()] == ["KV-MATH", "NUM-MATH"]
  anchor, composed = kv.containers
  np.testing.assert_allclose(composed.lines[0].get_ydata(), [100, 50])
  bars = composed.lines[2][0].get_segments()
  np.testing.assert_allclose(bars[0][:, 1], [72.25, 100], atol=0.01)
  np.testing.assert_allclose(bars[1][:, 1], [23.66, 76.34], atol=0.01)
  lines = [anchor.lines[0], composed.lines[0], num.containers[0].lines[0]]
  assert len({line.get_linestyle() for line in lines}) == 3
  assert len({line.get_marker() for line in lines}) == 3
  assert len(figure.legends[0].get_texts()) == 3


def test_no_predictions_is_an_error():
  with pytest.raises(InputError, match="no predictions"):
    figures.accuracy_figure({"KV-MATH": {}})


def test_attention_rows_are_the_predicted_tokens():
  tokens = ["a", "$+$", "▁b", "=", "1", "2", "</s>"]
  weights = causal_weights(2, 3, len(tokens))
  # Position 3, the last of the prompt, is what predicts the token "1".
  weights[0, :, 3] = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
  figure = attention.attention_figure(weights, tokens, ["4->8", "8->16"], 4)
  figure.canvas.draw()
  first, last = figure.axes[:2]
  assert [t.get_text() for t in first.get_yticklabels()] == ["1", "2", "</s>"]
  assert [t.get_text() for t in last.get_xticklabels()] == [
    *("a", "$+$", "␣b", "=", "1", "2")
  ]
  shown = first.images[0].get_array()
  assert shown.shape == (3, 6)
  np.testing.assert_array_equal(shown[0].filled(0), [0, 1, 0, 0, 0, 0])
  # Masked, hence hatched: beyond t; here t = 5 sees all that there is.
  assert last.images[0].get_array().mask.sum(axis=1).tolist() == [2, 1, 0]
  assert [axes.get_title(loc="left") for axes in (first, last)] == [
    "connection 4->8",
    "connection 8->16",
  ]
  assert any("attention weight" in text for text in texts(figure))


def test_attention_averages_over_heads():
  weights = np.zeros((1, 2, 3, 3))
  weights[0, 0, :, 0] = 1.0
  weights[0, 1, :, 1] = 1.0
  figure = attention.attention_figure(weights, list("abc"), ["x"], 2)
  np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[0.5, 0.5]])


def test_attention_over_another_tokenizer_keeps_all_columns():
  weights = np.full((3, 1, 4, 5), 0.2)
  figure = attention.attention_figure(
    weights, list("abcd"), ["1", "2", "3"], 2, list("vwxyz")
  )
  figure.canvas.draw()
  assert figure.axes[0].images[0].get_array().shape == (2, 5)
  # Two columns of panels, and one place left over.
  assert [axes.get_visible() for axes in figure.axes[:4]] == [True] * 3 + [
    False
  ]


def test_attention_of_a_long_text_is_scaled_down(tmp_path):
  length = 300
  figure = attention.attention_figure(
    causal_weights(4, 1, length), ["tok"] * length, list("1234"), 10
  )
  width, height = figure.get_size_inches()
  assert (
    width <= attention._MAX_WIDTH + 1 and height <= attention._MAX_HEIGHT + 2
  )


@pytest.mark.parametrize(
  ("shape", "prompt", "message"),
  [
    ((1, 2, 4, 5), 2, "do not fit"),
    ((2, 2, 4, 4), 2, "do not fit"),
    ((1, 4, 4), 2, "do not fit"),
    ((1, 2, 4, 4), 4, "no answer"),
    ((1, 2, 4, 4), 0, "no answer"),
  ],
)
def test_attention_that_does_not_fit(shape, prompt, message):
  with pytest.raises(InputError, match=message):
    attention.attention_figure(np.ones(shape), list("abcd"), ["x"], prompt)


def test_neither_import_nor_drawing_changes_matplotlib():
  # In a process of its own: other tests may have imported anything. "backend"
  # is left out, since reading it makes matplotlib import pyplot.
  code = """
import sys
import matplotlib

def settings():
  names = [n for n in matplotlib.rcParams if n != "backend"]
  return {n: matplotlib.rcParams[n] for n in names}

before = settings()
import calm_jax.report
from calm_jax.reporting import figures
figure = figures.loss_figure({"a": [{"step": 1, "loss": 2.0}]})
figures.save_figure(figure, sys.argv[1])
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code, os.devnull], check=True, cwd=ROOT)


def gain(label, delta, p_value=0.5):
  return figures.Gain(label, delta, delta - 1, delta + 1, p_value)


def test_gains_keep_their_order_and_wrap():
  gains = [gain(f"l{i:02}", i - 5, 0.01 * i) for i in range(60)]
  figure = figures.gains_figure(gains)
  figure.canvas.draw()
  labels = [[t.get_text() for t in a.get_xticklabels()] for a in figure.axes]
  assert labels[0] + labels[1] == [one.label for one in gains]
  assert [len(row) for row in labels] == [50, 10]
  lines = figure.axes[0].lines
  marks = [line for line in lines if line.get_marker() == "o"]
  assert [mark.get_ydata()[0] for mark in marks] == list(range(-5, 45))
  filled = [mark.get_markerfacecolor() == "k" for mark in marks]
  assert filled == [i < 5 for i in range(50)]
  np.testing.assert_array_equal(lines[0].get_ydata(), [-6, -4])


def test_no_gains_is_an_error():
  with pytest.raises(InputError, match="no languages"):
    figures.gains_figure([])


def test_an_svg_stands_alone_and_is_always_the_same():
  made = [figures.svg(figures.gains_figure([gain("a", 1)])) for _ in range(2)]
  assert made[0] == made[1]
  root = ElementTree.fromstring(made[0])
  links = [v for node in root.iter() for k, v in node.items() if "href" in k]
  assert all(link.startswith(("#", "data:")) for link in links)


@pytest.mark.parametrize("name", ["composition", "house"])
def test_drawings_are_well_formed_and_stand_alone(name):
  path = ROOT / "docs" / f"{name}.svg"
  root = ElementTree.parse(path).getroot()
  assert root.tag.endswith("svg") and int(root.get("width")) <= 920
  text = path.read_text(encoding="utf-8")
  # GitHub shows an SVG as an image: nothing from outside is loaded.
  assert re.findall(r'href="(?!#)', text) == []
  assert "<script" not in text
