"""Tables of numbers, whose rows and columns say how a cell is measured."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.reporting import paper
from calm_jax.reporting.costs import describe_models
from calm_jax.reporting.runs import LABELS, NO_RUNS, Column, Run, RunGroup
from calm_jax.reporting.table import Cell, Table

HOW_TO_READ = (
  "A cell of Tables 1 to 6 is paper / ours, or ours alone in a column that the "
  "paper lacks; a dash is nothing. In brackets: 95% interval over the "
  "examples, or lowest and highest of several trials. p: two-sided, of a "
  "paired permutation test against m_B on the same examples. An interval "
  "without width says that all examples came out alike. An average of ours is "
  "over those of the paper's rows that were evaluated."
)
# The cell of a run's model; None if it was not measured.
Measure = Callable[[Run, str], Cell | None]


class TableRow(NamedTuple):
  """A row: its label, the paper's numbers, and how ours are measured."""

  label: str
  paper: Mapping[str, float]
  columns: Mapping[str, Column]
  measure: Measure
  digits: int = 1

  def cell(self, key: str, paper_column: bool) -> Cell:
    column = self.columns.get(key)
    ours = measure_trials(column, self.measure) if column else None
    ours, of_paper = ours or Cell(digits=self.digits), self.paper.get(key)
    return dataclasses.replace(ours, paper=of_paper, paper_column=paper_column)


def grid(
  name: str,
  title: str,
  rows: Sequence[TableRow],
  notes: Iterable[str],
  group: RunGroup = NO_RUNS,
  keys: Iterable[str] = (),
  best: Callable | None = None,
  caption: str = "",
) -> Table:
  """Makes a table of rows, with the columns that any of them has.

  Args:
    name: of its files; "table-1" to "table-6" are the paper's.
    title, caption: without what the paper's tables have besides.
    group: the runs whose models the notes name.
    keys: the columns in their order; by default the paper's come first.
    best: min or max, to stress the best number of each row.
  """
  of_paper = dict.fromkeys(key for row in rows for key in row.paper)
  keys = keys or [*of_paper, *(key for row in rows for key in row.columns)]
  columns = {}
  for key in dict.fromkeys(keys):
    cells = [row.cell(key, key in of_paper) for row in rows]
    # Columns without any number are left out.
    if key in of_paper or any(cell.ours is not None for cell in cells):
      columns[key] = cells
  labels = LABELS | {k: c.label for row in rows for k, c in row.columns.items()}
  header = ("", *(labels.get(key, key) for key in columns))
  made = [
    (row.label, *(cells[at] for cells in columns.values()))
    for at, row in enumerate(rows)
  ]
  notes = [*notes]
  if name.startswith("table-"):
    title, caption = f"Table {name[-1]}: {title}", "paper / ours"
    notes.append(paper.MODELS.get(name, paper.MODELS["others"]))
  if group.runs:
    notes.append(describe_models(group))
  bold = frozenset(_best(made, best) if best else ())
  table = Table(name, title, header, made, tuple(notes), bold, caption)
  if not table.empty:
    return table
  note = "No run that was given has any of these numbers."
  return dataclasses.replace(table, notes=(note,))


def measure_trials(column: Column, measure: Measure) -> Cell | None:
  """Measures a column: of several trials the mean and the range."""
  cells = [measure(run, column.model) for run in column.runs]
  cells = [cell for cell in cells if cell is not None]
  if len(cells) < 2:
    return next(iter(cells), None)
  values = [cell.ours for cell in cells if cell.ours is not None]
  digits = cells[0].digits
  mean, trials = sum(values) / len(values), len(values)
  return Cell(mean, min(values), max(values), digits=digits, trials=trials)


def percent(value: Any) -> float | None:
  """A number of results.json; InputError if it is not from 0 to 100."""
  value = files.number_from_json(value)
  if value is not None and not 0 <= value <= 100:
    raise InputError(f"{value} is not in percent, from 0 to 100")
  return value


def _best(rows: Sequence[tuple], best: Callable) -> Iterable[tuple[int, int]]:
  for row, (_, *cells) in enumerate(rows):
    values = [cell.ours for cell in cells if cell.ours is not None]
    values = [value for value in values if math.isfinite(value)]
    for at, cell in enumerate(cells, start=1):
      if values and cell.ours == best(values):
        yield row, at
