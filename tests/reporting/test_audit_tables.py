"""The audit's tables and bars, of results made up."""

from __future__ import annotations

import made_runs

from calm_jax.reporting import audit, runs
from calm_jax.reporting.pictures import pictures


def score(value):
  return {"value": value, "low": value - 2, "high": value + 3}


def entry(values, chance=None):
  scores = {name: score(value) for name, value in values.items()}

  def less(a, b):
    delta = values[a] - values[b]
    ends = {"low": delta - 1, "high": delta + 1}
    return {"delta": delta, "p_value": 0.5} | ends

  return {
    "metric": "accuracy", "examples": 8, "scores": scores, "chance": chance,
    "content": less("correct", "mismatched"),
    "left_over": less("mismatched", "anchor"),
  }  # fmt: skip


VALUES = {
  "correct": 90.0, "mismatched": 12.5, "zeroed": 10.0, "noise": 11.0,
  "without kv/2->4": 33.0, "anchor": 10.0, "augmenting/kv": 70.0,
}  # fmt: skip


def group(tmp_path, kinds=("composed",)):
  for kind in kinds:
    likelihood = {name: -value / 100 for name, value in VALUES.items()}
    made = {
      "answers": {"asked": entry(VALUES, 12.0)},
      "likelihood": {"text": entry(likelihood)},
      "draws": 3,
    }
    folder = tmp_path / "run"
    folder = folder if kind == "composed" else folder / kind
    made_runs.text(folder, kind, audit=made)
  [found] = runs.find_groups([tmp_path / "run"])
  return found


def test_tables(tmp_path):
  effects, by_control, likelihood, parts = audit.tables(group(tmp_path))
  [row] = effects.rows
  assert [str(cell) for cell in row] == [
    "asked", "90.0 [88.0 to 93.0]", "12.5 [10.5 to 15.5]",
    "10.0 [8.0 to 13.0]", "77.5 [76.5 to 78.5]", "2.5 [1.5 to 3.5]", "12.0",
  ]  # fmt: skip
  labels = [row[0] for row in by_control.rows]
  assert labels == [*list(VALUES)[:5], "m_B alone", "m_A kv alone"]
  assert [row[1].ours for row in by_control.rows] == list(VALUES.values())
  assert likelihood.header[-1] == "left over"
  assert likelihood.rows[0][0] == "text"
  assert parts.rows[0][1].digits == 3


def test_several_kinds_are_told_apart(tmp_path):
  found = audit.entries(group(tmp_path, ("composed", "vanilla")), "answers")
  assert [one.label for one in found] == [
    "composed: asked", "vanilla m_A: asked",
  ]  # fmt: skip


def test_bars(tmp_path):
  found = group(tmp_path)
  drawn = [p for p in pictures(found) if p.title.startswith("Audit")]
  assert [picture.title for picture in drawn] == [
    "Audit: answers", "Audit: likelihood",
  ]  # fmt: skip
  [axes] = drawn[0].figure.axes
  heights = [bar.get_height() for bar in axes.patches]
  assert heights == [90.0, 12.5, 10.0, 11.0, 10.0, 70.0]
  assert list(axes.lines[0].get_ydata()) == [88.0, 93.0]
  names = [label.get_text() for label in axes.get_xticklabels()]
  assert names[-2:] == ["m_B alone", "m_A kv alone"]


def test_runs_without_an_audit(tmp_path):
  made_runs.text(tmp_path / "run")
  [found] = runs.find_groups([tmp_path / "run"])
  assert audit.tables(found) == []
