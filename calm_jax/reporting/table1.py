"""Table 1: the key-value task (§4.1)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm_jax.evals import statistics
from calm_jax.evals.exact_match import count_right
from calm_jax.reporting import paper
from calm_jax.reporting.grid import TableRow, grid, percent
from calm_jax.reporting.predictions import (
  HEADLINE,
  SETS,
  read_rows,
  wilson_interval,
)
from calm_jax.reporting.runs import Run, RunGroup
from calm_jax.reporting.table import Cell, Table

# Columns of predictions and what they count.
_PARTS = {"num_terms": "term", "num_products": "product"}
_ANSWERS = {
  "steps": "the composition is trained to write the expression in numbers, "
  "then the result",
  "direct": "the composition is trained to write the result alone, as in the "
  "paper",
}


def accuracies(
  results: Mapping[str, Any], model: str
) -> dict[str, float | None]:
  """Returns accuracies of Table 1 by the rows' labels, the headline first."""
  rows = sorted(SETS, key=lambda row: not row.startswith("kv_math"))
  return {SETS[row]: _accuracy(results, model, row) for row in rows}


def table1(group: RunGroup) -> Table:
  """Makes Table 1; of `NO_RUNS`, the paper's numbers alone.

  InputError if an accuracy is not from 0 to 100, or a file of predictions is
  not what a run writes.
  """
  rows = []
  for row, label in SETS.items():
    # The paper does not say which keys; its number goes to the strictest.
    of_paper = "kv_math" if row == HEADLINE else row
    numbers = paper.TABLES["table-1"].get(of_paper, {})
    is_measured = any(
      _accuracy(run.results, column.model, row) is not None
      for column in group.columns.values()
      for run in column.runs
    )
    if numbers or is_measured:
      measure = functools.partial(accuracy_cell, row)
      rows.append(TableRow(label, numbers, group.columns, measure))
  notes = [
    "Exact match of the whole answer. KV-SUBS: keys replaced by "
    "their values. NUM-MATH: arithmetic on numbers. KV-MATH: arithmetic on "
    "keys, which takes both models. Held-out: keys never seen in training the "
    "composition; mixed: held-in and held-out keys in one expression.",
    "The paper has one KV-MATH number and does not say which keys; it is set "
    "beside the strictest.",
  ]
  measured = [run.results for run in group.runs if "table1" in run.results]
  if measured:
    answer, examples = (measured[0].get(key) for key in ("answer", "examples"))
    if answer is not None:
      notes.append(f"Answer format {answer}: {_ANSWERS.get(answer, answer)}.")
    if examples is not None:
      notes.append(f"Examples evaluated: {examples} of each row.")
  title = "key-value arithmetic, accuracy in %"
  table = grid("table-1", title, rows, notes, group)
  return dataclasses.replace(table, bold=frozenset({(2, 3)}))


def accuracy_cell(row: str, run: Run, model: str) -> Cell | None:
  """An accuracy, its Wilson interval, and p against m_B."""
  value = percent(_accuracy(run.results, model, row))
  if value is None:
    return None
  right = [bool(r["correct"]) for r in read_rows(run.path(row, model))]
  # A file that holds only some of the examples says nothing of the number.
  if not right or abs(100 * sum(right) / len(right) - value) >= 0.01:
    return Cell(value)
  low, high = wilson_interval(sum(right), len(right))
  anchor = [bool(r["correct"]) for r in read_rows(run.path(row, "anchor"))]
  p_value = None
  if model != "anchor" and len(anchor) == len(right):
    ours, theirs = (np.array(x, float)[:, None] for x in (right, anchor))
    mean = statistics.mean_of(len(right))
    p_value = statistics.compare(ours, theirs, mean).p_value
  return Cell(value, 100 * low, 100 * high, p_value)


def parts_table(group: RunGroup) -> Table:
  """Rows of Table 1 by number of terms and of products, where these differ."""
  rows = []
  runs = [(r, c.model) for c in group.columns.values() for r in c.runs]
  for name in (HEADLINE, "num_math", "num_math_steps"):
    for column, noun in _PARTS.items():
      numbers: set[int] = set()
      for run, model in runs:
        numbers |= {*count_right(read_rows(run.path(name, model)), column)}
      for number in sorted(numbers) if len(numbers) > 1 else []:
        plural = "" if number == 1 else "s"
        label = f"{SETS[name]}: {number} {noun}{plural}"
        measure = functools.partial(_part_cell, name, column, number)
        rows.append(TableRow(label, {}, group.columns, measure))
  title = "Key-value arithmetic by number of terms and of products"
  notes = ["Expressions of 0 products hold + and − only."]
  return grid("terms", title, rows, notes, group, caption="in %")


def _part_cell(
  name: str, column: str, number: int, run: Run, model: str
) -> Cell | None:
  counts = count_right(read_rows(run.path(name, model)), column)
  if number not in counts:
    return None
  right, total = counts[number]
  low, high = wilson_interval(right, total)
  return Cell(100 * right / total, 100 * low, 100 * high)


def _accuracy(results: Mapping[str, Any], model: str, row: str) -> float | None:
  table = results.get("table1", {})
  if not row.startswith("kv_math"):
    return table.get(row, {}).get(model)
  kv_math = table.get("kv_math", {})
  value = kv_math.get(f"{model}{row.removeprefix('kv_math')}")
  if value is None and row == HEADLINE:
    # Models that were asked one kind only were asked the headline's.
    return kv_math.get(model)
  return value
