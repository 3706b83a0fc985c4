"""A table, made once and shown as Markdown, CSV or on the terminal."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

NOTHING = "–"


@dataclasses.dataclass(frozen=True)
class Cell:
  """A number of ours, and the paper's where its table has the column."""

  ours: float | None = None
  low: float | None = None  # of its interval, or of several trials' range
  high: float | None = None
  p_value: float | None = None  # of ours being no better or worse than m_B's
  digits: int = 1  # after the point
  trials: int = 1  # `ours` is their mean
  paper: float | None = None
  paper_column: bool = False  # if the paper has others in this column

  @property
  def number(self) -> str:
    """As "paper / ours", or ours alone."""
    both = [self.paper, self.ours] if self.paper_column else [self.ours]
    if both == [None] * len(both):
      return NOTHING
    return " / ".join(
      NOTHING if x is None else f"{x:.{self.digits}f}" for x in both
    )

  @property
  def uncertainty(self) -> list[str]:
    """The interval and p, as far as they are known."""
    parts = []
    if self.low is not None and self.high is not None:
      trials = f", {self.trials} trials" if self.trials > 1 else ""
      low, high = (f"{x:.{self.digits}f}" for x in (self.low, self.high))
      parts.append(f"[{low} to {high}{trials}]")
    if self.p_value is not None:
      small = self.p_value < 0.001
      parts.append("p<0.001" if small else f"p={self.p_value:.3f}")
    return parts

  def __str__(self) -> str:
    return " ".join([self.number, *self.uncertainty])


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows as long as the header, whose first column names the row."""

  name: str  # of its files
  title: str
  header: tuple[str, ...]
  rows: Sequence[tuple[str | Cell, ...]]
  notes: tuple[str, ...] = ()  # full sentences that say what the numbers mean
  bold: frozenset[tuple[int, int]] = frozenset()  # (row, column) to stress
  caption: str = ""  # what the numbers of a cell are

  @property
  def full_title(self) -> str:
    return f"{self.title} ({self.caption})" if self.caption else self.title

  @property
  def empty(self) -> bool:
    """True if there is no number of ours."""
    cells = [cell for row in self.rows for cell in row[1:]]
    return not any(isinstance(c, str) or c.ours is not None for c in cells)


def as_markdown(table: Table) -> str:
  """Writes a table with its title as a heading and its notes as a list."""
  lines = [f"## {_escape(table.full_title)}", ""]
  lines.append(_row(map(_escape, table.header)))
  lines.append(_row([":--", *["--:"] * (len(table.header) - 1)]))
  for row, cells in enumerate(table.rows):
    texts = [_escape(str(cell)) for cell in cells]
    for column, text in enumerate(texts):
      if (row, column) in table.bold:
        texts[column] = f"**{text}**"
    lines.append(_row(texts))
  if table.notes:
    lines += ["", *(f"- {_escape(note)}" for note in table.notes)]
  return "\n".join(lines)


def as_numbers(
  table: Table,
) -> tuple[list[str], list[list[str | float | None]]]:
  """Returns a header, and rows with a column for each number of a cell.

  Those are the paper's, ours, the ends of the interval, p, and trials.
  """
  columns: list[list] = []
  for at, head in enumerate(table.header):
    cells = [row[at] for row in table.rows]
    if not any(isinstance(cell, Cell) for cell in cells):
      columns.append([head, *map(str, cells)])
      continue
    for field in ("paper", "ours", "low", "high", "p_value", "trials"):
      # Of a text among numbers: none.
      values = [getattr(cell, field, None) for cell in cells]
      if field == "trials":
        values = [v if v and v > 1 else None for v in values]
      if field == "ours" or any(value is not None for value in values):
        columns.append([f"{head} ({field})", *values])
  header, *rows = map(list, zip(*columns, strict=True))
  return header, rows


def as_csv(table: Table) -> str:
  """Writes the rows of `as_numbers`, with six digits."""
  header, rows = as_numbers(table)
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(header)
  for row in rows:
    writer.writerow(
      [f"{x:g}" if isinstance(x, int | float) else x for x in row]
    )
  return file.getvalue()


def print_tables(
  tables: Iterable[Table], console: Console | None = None
) -> None:
  """Prints tables to the console; standard output if None."""
  console = console or Console()
  for table in tables:
    grid = RichTable(
      title=Text(table.full_title), box=box.SIMPLE_HEAD, title_justify="left"
    )
    for number, name in enumerate(table.header):
      # Text: square brackets in a name must not be read as rich's markup.
      grid.add_column(Text(name), justify="right" if number else "left")
    for row, cells in enumerate(table.rows):
      grid.add_row(
        *(
          Text(str(cell), style="bold" if (row, column) in table.bold else "")
          for column, cell in enumerate(cells)
        )
      )
    console.print(grid)
    for note in table.notes:
      console.print(Padding(Text(note, style="dim"), (0, 2)))
    console.print()


def _row(cells: Iterable[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
  # "_" inside a word is literal in Markdown: m_A and kv_math stay as they are.
  return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")
