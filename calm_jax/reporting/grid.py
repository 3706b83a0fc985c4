"""A table of numbers from rows and columns that say how they are found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from calm_jax.core.errors import InputError
from calm_jax.reporting import paper
from calm_jax.reporting.costs import ours
from calm_jax.reporting.runs import LABELS, Column, Experiment, Run, number
from calm_jax.reporting.table import Cell, Table

HOW_TO_READ = (
  "A cell of Tables 1 to 6 is paper / ours, or ours alone in a column that the "
  "paper lacks; a dash is nothing. In brackets: 95% interval over the "
  "examples, or lowest and highest of several trials. p: two-sided, of a "
  "paired permutation test against m_B on the same examples. An interval "
  "without width says that all examples came out alike. An average of ours is "
  "over those of the paper's rows that were evaluated."
)
Measure = Callable[[Run, str], Cell | None]


class Row(NamedTuple):
  """A row to be: its label, the paper's numbers, and how ours are found."""

  label: str
  paper: Mapping[str, float]
  columns: Mapping[str, Column]
  measure: Measure
  digits: int = 1


def grid(
  name: str,
  title: str,
  rows: Sequence[Row],
  notes: Iterable[str],
  experiment: Experiment | None,
  keys: Iterable[str] = (),
  best: Callable | None = None,
  stressed: Iterable[tuple[int, int]] = (),
) -> Table:
  """A table of rows, with the columns that any of them has.

  Args:
    name: of its files; "table-1" to "table-6" are the paper's.
    title: without the number of the table.
    rows: what is in it.
    notes: what must be said of the numbers.
    experiment: whose models are named below; None for none.
    keys: of the columns in their order; by default the paper's come first.
    best: min or max, to stress the best number of each row.
    stressed: (row, column) of cells to stress.
  """
  beside = dict.fromkeys(key for row in rows for key in row.paper)
  keys = [*keys] or [*beside, *(k for row in rows for k in row.columns)]
  keys = [*dict.fromkeys(keys)]
  made = []
  for row in rows:
    cells = []
    for key in keys:
      column = row.columns.get(key)
      cell = spread(column, row.measure) if column else None
      cell = cell or Cell(digits=row.digits)
      known = {"paper": row.paper.get(key), "beside": key in beside}
      cells.append(Cell(**(vars(cell) | known)))
    made.append((row.label, *cells))
  # Columns that have nothing at all.
  full = [
    at
    for at in range(1, len(keys) + 1)
    if keys[at - 1] in beside or any(r[at].ours is not None for r in made)
  ]
  made = [(row[0], *(row[at] for at in full)) for row in made]
  labels = {k: c.label for row in rows for k, c in row.columns.items()}
  header = [labels.get(keys[at - 1], LABELS.get(keys[at - 1])) for at in full]
  numbered = name.startswith("table-")
  title = f"Table {name[-1]}: {title}" if numbered else title
  table = Table(name, title, ("", *header), made)
  said = [*notes]
  if numbered:
    said.append(paper.MODELS.get(name, paper.MODELS["others"]))
  if experiment:
    said.append(ours(experiment))
  if table.empty:
    said = ["No run that was given has any of these numbers."]
  bold = frozenset(_best(made, best) if best else stressed)
  beside = "paper / ours" if numbered else ""
  return dataclasses.replace(table, notes=tuple(said), bold=bold, beside=beside)


def _best(rows: Sequence[tuple], best: Callable) -> Iterable[tuple[int, int]]:
  for row, (_, *cells) in enumerate(rows):
    finite = [c.ours for c in cells if c.ours is not None]
    finite = [x for x in finite if math.isfinite(x)]
    for at, cell in enumerate(cells, start=1):
      if finite and cell.ours == best(finite):
        yield row, at


def spread(column: Column, measure: Measure) -> Cell | None:
  """What is measured of a column: of trials the mean and the range."""
  cells = [measure(run, column.model) for run in column.runs]
  cells = [cell for cell in cells if cell is not None]
  if len(cells) < 2:
    return cells[0] if cells else None
  values = [cell.ours for cell in cells]
  mean = sum(values) / len(values)
  ends = {"low": min(values), "high": max(values), "trials": len(values)}
  return Cell(mean, digits=cells[0].digits, **ends)


def percent(value: Any) -> float | None:
  """A number of results.json; InputError if it is not from 0 to 100."""
  value = number(value)
  if value is not None and not 0 <= value <= 100:
    raise InputError(f"{value} is not in percent, from 0 to 100")
  return value
