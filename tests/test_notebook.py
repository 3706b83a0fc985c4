"""The notebook for Colab: every cell is run, at its smallest, on the CPU."""

from __future__ import annotations

import ast
import json
import re
import string
from pathlib import Path

import jax
import pytest
import spelled
from matplotlib.figure import Figure

PATH = Path(__file__).parents[1] / "notebooks" / "calm_colab.ipynb"


def cells() -> list[dict]:
  """Its cells of code."""
  notebook = json.loads(PATH.read_text())
  return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def run(source: str, namespace: dict):
  """Runs a cell; returns what Jupyter would show of its last line."""
  tree = ast.parse(source)
  last = None
  if isinstance(tree.body[-1], ast.Expr):
    last = ast.Expression(tree.body.pop().value)
  exec(compile(tree, str(PATH), "exec"), namespace)
  return last and eval(compile(last, str(PATH), "eval"), namespace)


@pytest.fixture
def quick_to_compile():
  """For programs that run for moments."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("quick_to_compile")
def test_all_cells_run(tmp_path, monkeypatch, capsys):
  text = string.ascii_letters + " ,.:"
  for seed, side in enumerate(("anchor", "augmenting")):
    folder = spelled.save(tmp_path / side, seed, text, max_length=128)
    monkeypatch.setenv(f"CALM_NOTEBOOK_{side.upper()}", str(folder))
  for name, value in {"SIZE": "tiny", "STEPS": 20, "LENGTH": 48}.items():
    monkeypatch.setenv(f"CALM_NOTEBOOK_{name}", str(value))
  monkeypatch.chdir(tmp_path)
  namespace, shown = {"__name__": "__main__"}, []
  for cell in cells():
    # It has magics, and needs a network. Nothing else may be left out.
    if cell["metadata"].get("tags") != ["install"]:
      shown.append(run("".join(cell["source"]), namespace))

  figures = [x for x in shown if isinstance(x, Figure)]
  panels = [sum(axes.has_data() for axes in f.axes) for f in figures]
  assert panels == [4, 2, 2], "losses, a connection and its scale, losses"
  for number, figure in enumerate(figures):
    figure.savefig(tmp_path / f"{number}.png")
  kv = json.loads((tmp_path / "runs/kv/results.json").read_text())["table1"]
  assert {"kv_subs", "num_math", "kv_math"} <= set(kv)
  assert 0 <= kv["kv_math"]["composed_held_out"] <= 100
  hub = namespace["results"]["perplexity"]
  for models in hub.values():
    assert all(value > 1 for value in models.values())
  assert set(hub) == {"domain", "anchor_domain"}
  out = capsys.readouterr().out
  assert "KV-MATH, all keys" in out, "Table 1"
  before, after = re.search(r"of the composition\n(.*)\n(.*)\n", out).groups()
  assert before == after != "", "untrained, it says what the anchor says"
  assert len(re.findall(r"\(right: ", out)) == 8 + 4


def test_nothing_is_stored_but_what_was_written():
  notebook = json.loads(PATH.read_text())
  tags = [cell["metadata"].get("tags") for cell in cells()]
  assert tags.count(["install"]) == tags.count(["parameters"]) == 1
  for cell in cells():
    assert cell["outputs"] == [] and cell["execution_count"] is None
  assert notebook["nbformat"] == 4
  ids = [cell["id"] for cell in notebook["cells"]]
  assert len(set(ids)) == len(ids)
