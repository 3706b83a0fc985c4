"""All tables of a report, and its headlines."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax.core import files
from calm_jax.reporting import audit, evaluations, paper
from calm_jax.reporting.costs import overhead
from calm_jax.reporting.grid import TableRow, grid, measure_trials
from calm_jax.reporting.predictions import HEADLINE
from calm_jax.reporting.runs import NO_RUNS, Run, RunGroup
from calm_jax.reporting.table import Cell, Table
from calm_jax.reporting.table1 import accuracy_cell, parts_table, table1

LOSS = "held-out loss"  # in ablations.json
# Titles, digits and notes of scores of text, the lower the better.
_SCORES = {
  "perplexity": (
    "Perplexity",
    2,
    "exp of the mean loss per token: over how many equally likely tokens the "
    "model hesitates.",
  ),
  "bits_per_byte": (
    "Bits per byte",
    3,
    "What it takes to code the text with the model; unlike perplexity it "
    "compares models of different tokenizers.",
  ),
}


def tables(groups: Sequence[RunGroup]) -> list[Table]:
  """Makes Tables 1 to 6, even without numbers of ours, then all others."""
  made = [evaluations.table5(groups)]
  makers = [
    functools.partial(evaluations.paper_table, name)
    for name in evaluations.TABLES
  ]
  for make in (table1, *makers):
    each = [(make(group), group) for group in groups]
    each = [(table, group) for table, group in each if not table.empty]
    made += [_name(*pair, len(each)) for pair in each] or [make(NO_RUNS)]
  made.sort(key=lambda table: table.name[: len("table-1")])
  for group in groups:
    more = [parts_table(group), evaluations.others(group)]
    more.append(_back_translation(group))
    more += [_scores(group, name) for name in _SCORES]
    more += [*audit.tables(group), trials_table(group.trials)]
    made += [_name(table, group, len(groups)) for table in more if table.rows]
  return [*made, overhead(groups)]


def headlines(group: RunGroup) -> list[str]:
  """Says what the composed model achieved, a sentence for each benchmark."""
  columns = group.columns
  if "composed" not in columns:
    return []
  composed, sentences = columns["composed"], []
  cell = measure_trials(composed, functools.partial(accuracy_cell, HEADLINE))
  if cell:
    of_paper = paper.TABLES["table-1"]["kv_math"]["composed"]
    uncertainty = " ".join(cell.uncertainty)
    uncertainty = f", {uncertainty}" if uncertainty else ""
    sentences.append(
      "KV-MATH over keys never seen in training the composition: "
      f"{cell.number}% right{uncertainty} (the paper: {of_paper:.1f}%)."
    )
  for benchmark in group.benchmarks:
    names = list(group.subsets(benchmark).values())
    average = functools.partial(evaluations.average_cell, names)
    better = functools.partial(evaluations.better_cell, names, group, False)
    cell = measure_trials(composed, average)
    count = measure_trials(composed, better)
    of_anchor = columns.get("anchor")
    anchor = of_anchor and measure_trials(of_anchor, average)
    if cell and count and anchor:
      text = f"{benchmark}: composed {cell}, m_B {anchor.number}"
      if len(names) > 1:
        text += f", better on {count.number} of {len(names)}"
      sentences.append(f"{text}.")
  return sentences


def trials_table(summary: Mapping[str, Any]) -> Table:
  """Makes a row for each kind of `calm_jax.ablations.summarise`."""
  # From the last row, a kind that has all scores; m_B, the first, lacks some.
  scores = [row["scores"] for row in reversed([*summary.values()])]
  labels = list(dict.fromkeys(label for row in scores for label in row))
  rows = []
  for name, row in summary.items():
    run, count = row["runs"][0], len(row["runs"])
    difference = f" ({run['difference']:+,})" if run["difference"] else ""
    trained = f"{run['parameters']:,}{difference}"
    cells = [
      _trials_cell(row["scores"].get(label), label, count) for label in labels
    ]
    rows.append((name, trained, *cells))
  return Table(
    "ablations",
    "All numbers of the ablations",
    ("", "trained (against Θ_C)", *labels),
    rows,
    (
      "Trials start from other fresh parameters and see the data in another "
      "order; m_A and m_B are the same in all, and so are steps and the kind "
      "of data.",
      "In % and the higher the better, unless a column says otherwise: exact "
      "match of the whole answer, pass@1, or chrF1 of translations and "
      "descriptions, averaged over the languages. "
      f"The {LOSS} is measured with the right answer as input, "
      "which an unmasked composition reads off.",
    ),
    caption="mean [lowest to highest]",
  )


def _trials_cell(
  spread: Mapping[str, float] | None, label: str, trials: int
) -> Cell:
  digits = 3 if label == LOSS or label.startswith("bits") else 1
  if spread is None:
    return Cell(digits=digits)
  if trials == 1:
    return Cell(spread["mean"], digits=digits)
  ends = spread["lowest"], spread["highest"]
  return Cell(spread["mean"], *ends, digits=digits, trials=trials)


def _scores(group: RunGroup, section: str) -> Table:
  """Scores of text by set and model."""
  title, digits, note = _SCORES[section]
  rows = []
  for name in group.first(section):
    measure = functools.partial(_text_cell, section, name, digits)
    rows.append(TableRow(name, {}, group.columns, measure))
  notes = [f"{note} Bold is the best of the row."]
  name, caption = section.replace("_", "-"), "lower is better"
  return grid(name, title, rows, notes, group, best=min, caption=caption)


def _text_cell(
  section: str, name: str, digits: int, run: Run, model: str
) -> Cell | None:
  value = run.results.get(section, {}).get(name, {}).get(model)
  if value is None:
    return None
  return Cell(files.number_from_json(value), digits=digits)


def _back_translation(group: RunGroup) -> Table:
  """Table 7's overlap and delta of each back-translated set of problems."""
  rows = []
  for name, entry in group.first("evals").items():
    if "measures" in entry:
      overlap = next(iter(entry["measures"].values()))["overlap"]
      label = f"{entry['group']} {entry['subset']}, overlap {overlap:.1f}"
      measure = functools.partial(_delta_cell, name)
      rows.append(TableRow(label, {}, group.columns, measure))
  notes = [
    "Overlap: BLEU of the problems after translation there and back, against "
    "the originals. A cell is the accuracy on the originals less that on the "
    "returned problems, in points, with its paired interval and significance."
  ]
  title = "Back-translated problems (Table 7)"
  caption = "accuracy lost, in points"
  return grid("back-translation", title, rows, notes, group, caption=caption)


def _delta_cell(name: str, run: Run, model: str) -> Cell | None:
  measures = run.evaluations.get(name, {}).get("measures", {}).get(model)
  if measures is None:
    return None
  names = ("delta", "delta_low", "delta_high", "delta_p")
  return Cell(*(measures[name] for name in names))


def _name(table: Table, group: RunGroup, count: int) -> Table:
  """Tells a table apart from the same one of another group."""
  if count < 2:
    return table
  name, title = f"{table.name}-{group.slug}", f"{table.title}, {group.name}"
  return dataclasses.replace(table, name=name, title=title)
