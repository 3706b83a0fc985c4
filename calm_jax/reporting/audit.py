"""The audit of compositions: tables of its numbers, and bars by control."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from calm_jax.core import files
from calm_jax.reporting.figures import Figure, make_panels, style
from calm_jax.reporting.runs import RunGroup, model_label
from calm_jax.reporting.table import Cell, Table

_CONTROLS = ("correct", "mismatched", "zeroed", "noise")
# Digits, and captions, of the two kinds of measures.
_KINDS = {
  "answers": (1, "Audit: answers", "in %"),
  "likelihood": (3, "Audit: likelihood", "log-likelihood, nats per byte"),
}
_NOTES = (
  "One trained composition, whose states of m_A were replaced when it was "
  "asked: mismatched are those of other examples (the mean of several draws), "
  "noise has their norms, and zeroed adds nothing to m_B.",
  "Content is correct less mismatched: what the answers owe to m_A having read "
  "this example. Left over is mismatched less m_B alone: what Θ_C has learnt "
  "itself. Both are paired over the examples.",
)
_CHANCE = "Chance is how often another example's right answer is right too."
_PARTS = (
  "Connections are named by m_A, its layer, and m_B's layer. Of two, one "
  "without is the other alone."
)
_MOST_PANELS = 12


class AuditEntry(NamedTuple):
  """The numbers of an audit on one set."""

  label: str
  entry: Mapping[str, Any]

  @property
  def models(self) -> list[str]:
    """The columns of models alone."""
    heads = ("augmenting", "anchor")
    return [c for c in self.entry["scores"] if c.partition("/")[0] in heads]


def entries(group: RunGroup, kind: str) -> list[AuditEntry]:
  """Returns "answers" or "likelihood" of all audited runs of a group."""
  audited = [run for run in group.runs if "audit" in run.results]
  return [
    AuditEntry(name if len(audited) == 1 else f"{run.label}: {name}", entry)
    for run in audited
    for name, entry in run.results["audit"][kind].items()
  ]


def tables(group: RunGroup) -> list[Table]:
  """Makes two tables of each kind of measure, as far as there are numbers."""
  made = []
  for kind, (digits, title, caption) in _KINDS.items():
    if found := entries(group, kind):
      made += [
        _effects(found, kind, digits, title, caption),
        _controls(found, kind, digits, f"{title} by control", caption),
      ]
  return made


def _effects(
  found: list[AuditEntry], kind: str, digits: int, title: str, caption: str
) -> Table:
  """A row for each set: what matters most, with the paired differences."""
  has_chance = kind == "answers"
  rows = []
  for label, entry in found:
    scores = [entry["scores"][c] for c in ("correct", "mismatched", "anchor")]
    effects = [entry[name] for name in ("content", "left_over")]
    cells = [_cell(one, digits) for one in (*scores, *effects)]
    chance = (Cell(entry["chance"], digits=digits),) if has_chance else ()
    rows.append((label, *cells, *chance))
  header = ("", "correct", "mismatched", "m_B alone", "content", "left over")
  header += ("chance",) if has_chance else ()
  notes = (*_NOTES, _CHANCE) if has_chance else _NOTES
  bold = frozenset((row, 4) for row in range(len(rows)))
  return Table(f"audit-{kind}", title, header, rows, notes, bold, caption)


def _controls(
  found: list[AuditEntry], kind: str, digits: int, title: str, caption: str
) -> Table:
  """A row for each control, part taken out or left alone, and model alone."""
  names = {name: None for _, entry in found for name in entry["scores"]}
  models = {m: None for one in found for m in one.models}
  rows = []
  for name in (*(n for n in names if n not in models), *models):
    label = _alone(name) if name in models else name
    cells = (_cell(entry["scores"].get(name), digits) for _, entry in found)
    rows.append((label, *cells))
  header = ("", *(label for label, _ in found))
  return Table(
    f"audit-{kind}-controls", title, header, rows, (_PARTS,), caption=caption
  )


def _alone(model: str) -> str:
  return f"{model_label(model)} alone"


def _cell(score: Mapping[str, Any] | None, digits: int) -> Cell:
  """A score or a difference with its interval."""
  if score is None:
    return Cell(digits=digits)
  value = score["delta" if "delta" in score else "value"]
  ends = value, score["low"], score["high"]
  return Cell(*map(files.number_from_json, ends), digits=digits)


def bars_figure(found: list[AuditEntry], ylabel: str) -> Figure:
  """Draws a panel of bars with 95% intervals for each of the first sets."""
  found = found[:_MOST_PANELS]
  columns = min(len(found), 3)
  rows = -(-len(found) // columns)
  with style():
    size = (max(3.4 * columns, 5), 3.0 * rows)
    figure, panels = make_panels(len(found), columns, size)
    for at, (axes, one) in enumerate(zip(panels, found, strict=True)):
      names = [*_CONTROLS, *one.models]
      cells = [_cell(one.entry["scores"][name], 1) for name in names]
      for x, cell in enumerate(cells):
        shade = "0.25" if x == 0 else "0.75" if x < len(_CONTROLS) else "white"
        axes.bar(x, cell.ours, color=shade, edgecolor="k", lw=0.8)
        axes.plot([x, x], [cell.low, cell.high], color="#D55E00", lw=2)
      labels = [*_CONTROLS, *map(_alone, one.models)]
      axes.set_xticks(range(len(names)), labels, rotation=90)
      axes.axhline(0, color="k", lw=0.8)
      axes.grid(axis="x", visible=False)
      axes.set_title(one.label)
      if at % columns == 0:
        axes.set_ylabel(ylabel)
  return figure
