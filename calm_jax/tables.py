"""Results as tables of text: Table 1 of the paper beside ours, and the costs.

A table is made once and shown twice: on the terminal and in report.md.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from calm_jax import kinds
from calm_jax.errors import InputError

MODELS = ("augmenting", "anchor", "composed")
MODEL_NAMES = {
  "augmenting": "m_A",
  "anchor": "m_B",
  "composed": "composed",
}

# Accuracies of Table 1, in percent.
PAPER_TABLE1 = {
  "kv_subs": {"augmenting": 98.1, "anchor": 0.0, "composed": 92.9},
  "num_math": {"augmenting": 4.2, "anchor": 73.7, "composed": 72.0},
  "kv_math": {"augmenting": 0.7, "anchor": 0.0, "composed": 84.3},
}
TASK_NAMES = {
  "kv_subs": "KV-SUBS",
  "num_math": "NUM-MATH",
  "kv_math": "KV-MATH",
}
# The kinds of KV-MATH expressions by their keys; the first is the headline.
KINDS = {
  "held_out": "all keys held-out",
  "mixed": "mixed",
  "held_in": "all keys held-in",
}
NOTHING = "–"

_ANSWERS = {
  "steps": "the composition is trained to write the expression in numbers, "
  "then the result",
  "direct": "the composition is trained to write the result alone, as in the "
  "paper",
}
_SCORES = {
  "perplexity": (
    "Perplexity",
    "exp of the mean loss per token: over how many equally likely tokens the "
    "model hesitates.",
  ),
  "bits_per_byte": (
    "Bits per byte",
    "What it takes to code the text with the model; unlike perplexity it "
    "compares models of different tokenizers.",
  ),
}

Results = Mapping[str, Any]
Rows = list[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of text: the first column names the row.

  `bold` holds the (row, column) of cells to stress; `notes` are full
  sentences that say what the numbers mean.
  """

  title: str
  header: tuple[str, ...]
  rows: Rows
  notes: tuple[str, ...] = ()
  bold: frozenset[tuple[int, int]] = frozenset()


def table1_rows(results: Results) -> Rows:
  """Table 1: one row per data set, each cell "paper / ours" in percent.

  Args:
    results: has "table1": {task: {model: accuracy in %}}. Under
      "kv_math", "<model>_held_out", "<model>_mixed" and "<model>_held_in"
      are the accuracies by kind of key; "<model>" alone stands for the
      headline where "<model>_held_out" is absent.

  Returns:
    Rows of (data set, m_A, m_B, composed). A number that is absent is a dash.
    KV-MATH has a row per kind of key that was measured, and the paper's
    number stands beside the headline: all keys held-out.

  Raises:
    InputError: "table1" is absent, or an accuracy is not in [0, 100].
  """
  table1 = _section(results, "table1")
  rows = []
  for task, paper in PAPER_TABLE1.items():
    for label, ours in accuracies(task, table1.get(task, {})):
      is_first = label in (TASK_NAMES[task], _kind_label("held_out"))
      cells = [
        _beside(paper[model] if is_first else None, ours.get(model))
        for model in MODELS
      ]
      rows.append((label, *cells))
  return rows


def tables(results: Results) -> list[Table]:
  """Every table that the results have numbers for, in order of reading.

  Raises:
    InputError: neither "table1" nor "perplexity" is present, or a number
      is out of its range.
  """
  made = []
  if "table1" in results:
    made += _table1_tables(results)
  if "perplexity" in results:
    made.append(_score_table(results, "perplexity"))
  if "bits_per_byte" in results:
    made.append(_score_table(results, "bits_per_byte"))
  if not made:
    raise InputError('results have neither "table1" nor "perplexity"')
  return made + _cost_tables(results)


def print_table1(results: Results, console: Console | None = None) -> None:
  """Prints Table 1 beside ours, then parameter counts and seconds.

  Raises:
    InputError: see `table1_rows`.
  """
  print_tables([*_table1_tables(results), *_cost_tables(results)], console)


def print_results(results: Results, console: Console | None = None) -> None:
  """Prints every table of `tables(results)`.

  Raises:
    InputError: see `tables`.
  """
  print_tables(tables(results), console)


def print_tables(
  shown: Iterable[Table], console: Console | None = None
) -> None:
  """Prints tables to the console; standard output if None."""
  console = console or Console()
  for table in shown:
    grid = RichTable(
      title=Text(table.title), box=box.SIMPLE_HEAD, title_justify="left"
    )
    for number, name in enumerate(table.header):
      # Text: square brackets in a name must not be read as rich's markup.
      grid.add_column(Text(name), justify="right" if number else "left")
    for row, cells in enumerate(table.rows):
      grid.add_row(
        *(
          Text(cell, style="bold" if (row, column) in table.bold else "")
          for column, cell in enumerate(cells)
        )
      )
    console.print(grid)
    for note in table.notes:
      console.print(Padding(Text(note, style="dim"), (0, 2)))
    console.print()


def _section(results: Results, name: str) -> Mapping[str, Any]:
  if not isinstance(results.get(name), Mapping):
    raise InputError(
      f'results have no section "{name}"; they have {sorted(results)}'
    )
  return results[name]


def _kind_label(kind: str) -> str:
  return f"{TASK_NAMES['kv_math']}, {KINDS[kind]}"


def accuracies(
  task: str, ours: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
  """(label of the row, accuracy by model) for each row of the task."""
  measured = [
    kind
    for kind in KINDS
    if task == "kv_math" and any(f"{model}_{kind}" in ours for model in MODELS)
  ]
  if not measured:
    return [(TASK_NAMES[task], {model: ours.get(model) for model in MODELS})]
  rows = []
  for kind in KINDS:
    if kind == "held_out" or kind in measured:
      values = {model: ours.get(f"{model}_{kind}") for model in MODELS}
      if kind == "held_out":
        values = {
          model: ours.get(model) if value is None else value
          for model, value in values.items()
        }
      rows.append((_kind_label(kind), values))
  return rows


def _beside(paper: float | None, ours: float | None) -> str:
  if paper is None and ours is None:
    return NOTHING
  shown = NOTHING if paper is None else f"{paper:.1f}"
  return f"{shown} / {_percent(ours)}"


def _percent(accuracy: float | None) -> str:
  if accuracy is None:
    return NOTHING
  if not 0 <= accuracy <= 100:
    raise InputError(f"accuracy {accuracy} is not in percent, from 0 to 100")
  return f"{accuracy:.1f}"


def _table1_tables(results: Results) -> list[Table]:
  rows = table1_rows(results)
  headline = len(PAPER_TABLE1) - 1
  made = [
    Table(
      title="Table 1: accuracy in %, paper / ours",
      header=("data set", *_model_names(results).values()),
      rows=rows,
      notes=_table1_notes(results),
      bold=frozenset({(headline, len(MODELS))}),
    )
  ]
  others = results.get("other_runs", {}).values()
  if any("table1" in run for run in others):
    made.append(_other_runs_table(results))
  return made


def _table1_notes(results: Results) -> tuple[str, ...]:
  notes = [
    "KV-SUBS: keys replaced by their values. NUM-MATH: arithmetic on numbers. "
    "KV-MATH: arithmetic on keys, which takes both models.",
    "Exact match of the whole answer. Held-out: keys never seen in training "
    "the composition; mixed: held-in and held-out keys in one expression.",
  ]
  kv_math = results["table1"].get("kv_math", {})
  if "composed_held_out" in kv_math:
    notes.append(
      "The paper has one KV-MATH number and does not say which kind; it is "
      "set beside the strictest."
    )
  answer = results.get("answer")
  if answer is not None:
    notes.append(f"Answer format {answer}: {_ANSWERS.get(answer, answer)}.")
  examples = results.get("examples")
  if isinstance(examples, Mapping):
    counts = ", ".join(f"{name} {n:,}" for name, n in examples.items())
    notes.append(f"Examples evaluated: {counts}.")
  elif examples is not None:
    notes.append(f"Examples evaluated: {examples:,} of each kind.")
  if kinds.label(results) != MODEL_NAMES["composed"]:
    notes.append("The paper's numbers of the last column are CALM's.")
  return tuple(notes)


def _other_runs_table(results: Results) -> Table:
  runs = {"this run": results} | {
    name: run for name, run in results["other_runs"].items() if "table1" in run
  }
  labels = [_kind_label(kind) for kind in KINDS]
  labels = [TASK_NAMES["kv_subs"], TASK_NAMES["num_math"], *labels]
  columns = []
  for run in runs.values():
    table1, column = run["table1"], {}
    for task in PAPER_TABLE1:
      for label, ours in accuracies(task, table1.get(task, {})):
        # One number for all of KV-MATH is the headline's.
        label = _kind_label("held_out") if label == "KV-MATH" else label
        column[label] = ours.get("composed")
    columns.append(column)
  rows = [
    (label, *(_percent(column.get(label)) for column in columns))
    for label in labels
    if any(column.get(label) is not None for column in columns)
  ]
  return Table(
    title="The composed model in other runs: accuracy in %",
    header=(
      "data set",
      *(
        f"{name}, {run['answer']}" if "answer" in run else name
        for name, run in runs.items()
      ),
    ),
    rows=rows,
    notes=("The same models alone and the same evaluation for each column.",),
  )


def _score_table(results: Results, name: str) -> Table:
  """A score of text by evaluation set and model, the lower the better."""
  names = _model_names(results)
  columns = {names[model]: (results[name], model) for model in MODELS}
  for run, other in results.get("other_runs", {}).items():
    if name in other:
      columns[f"composed, {run}"] = (other[name], "composed")
  rows, bold = [], set()
  for number, set_name in enumerate(results[name]):
    values = [
      by_set.get(set_name, {}).get(model) for by_set, model in columns.values()
    ]
    values = [None if value is None else float(value) for value in values]
    finite = [v for v in values if v is not None and math.isfinite(v)]
    digits = 2 if name == "perplexity" else 3
    rows.append(
      (
        set_name,
        *(NOTHING if v is None else f"{v:.{digits}f}" for v in values),
      )
    )
    bold |= {
      (number, column)
      for column, value in enumerate(values, start=1)
      if finite and value == min(finite)
    }
  title, note = _SCORES[name]
  return Table(
    title=f"{title} (lower is better)",
    header=("evaluation set", *columns),
    rows=rows,
    notes=(f"{note} Bold is the best of the row.",),
    bold=frozenset(bold),
  )


def _cost_tables(results: Results) -> list[Table]:
  made = []
  if results.get("parameters"):
    made.append(_parameters_table(results["parameters"]))
  if results.get("seconds"):
    made.append(_seconds_table(results["seconds"]))
  return made


def _model_names(results: Results) -> dict[str, str]:
  return MODEL_NAMES | {"composed": kinds.label(results)}


def _parameters_table(parameters: Mapping[str, int]) -> Table:
  names = {
    "anchor": "anchor m_B",
    "augmenting": "augmenting m_A",
    "composition": "composition Θ_C, ours",
    "composition_paper_count": "composition Θ_C, counted as in C.1",
  }
  anchor = parameters.get("anchor")
  rows = []
  for key, name in names.items():
    if parameters.get(key) is not None:
      count = parameters[key]
      share = f"{100 * count / anchor:.1f}%" if anchor else NOTHING
      rows.append((name, f"{count:,}", share))
  if more := parameters.get("trained_minus_composition"):
    trained = f"{parameters['trained']:,}"
    rows.append((f"trained here, {more:+,} against Θ_C", trained, ""))
  return Table(
    title="Parameters",
    header=("", "parameters", "of the anchor"),
    rows=rows,
    notes=(
      "Only Θ_C is trained in the composition. Appendix C.1 counts "
      "D_A D_B + 3 D_B² a connection and forgets W^O; ours is "
      "D_A D_B + 4 D_B² (and the norms, if any).",
    ),
  )


def _seconds_table(seconds: Mapping[str, float]) -> Table:
  rows = [(stage, _duration(value)) for stage, value in seconds.items()]
  if len(rows) > 1:
    rows.append(("all stages", _duration(sum(seconds.values()))))
  return Table(title="Time", header=("stage", "wall time"), rows=rows)


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
  )
