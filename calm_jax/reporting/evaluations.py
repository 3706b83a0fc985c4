"""Tables 2 to 6: translation, mathematics, code and the ablations on them."""

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from calm_jax.reporting import paper
from calm_jax.reporting.costs import describe_models
from calm_jax.reporting.grid import TableRow, grid, percent
from calm_jax.reporting.runs import NO_RUNS, Run, RunGroup
from calm_jax.reporting.table import NOTHING, Cell, Table


class TableBlock(NamedTuple):
  """Rows of a benchmark: the paper's, those that only we have, the average."""

  benchmark: str  # its name in results.json
  numbers: paper.PaperTable  # by subset, or by benchmark without subsets
  prefix: str = ""  # of the labels
  elsewhere: Collection[str] = ()  # subsets of ours that another table has
  papers_only: bool = False  # leaves out rows that the paper lacks


_GSM8K, _CODE = paper.TABLES["table-6"], paper.TABLES["table-4"]
_PROGRAMS = ("HumanEval", "MBPP")
_DESCRIPTIONS = {k: v for k, v in _CODE.items() if k not in _PROGRAMS}
# Titles, blocks of rows and notes of the paper's tables of one experiment.
TABLES = {
  "table-2": (
    "translation into English, FLORES-200, chrF1",
    [TableBlock("FLORES-200", paper.TABLES["table-2"])],
    (),
  ),
  "table-3": (
    "grade-school mathematics, accuracy in %",
    [
      TableBlock("GSM8K", paper.TABLES["table-3-gsm8k"], "GSM8K ", _GSM8K),
      TableBlock("MGSM", paper.TABLES["table-3-mgsm"], "MGSM "),
    ],
    (
      "GSM8K: the paper's low-resource languages, into which the problems were "
      "machine-translated; MGSM: high-resource languages. Without a code: "
      "English.",
    ),
  ),
  "table-4": (
    "code: pass@1 in % (HumanEval, MBPP), chrF1 (CodeXGLUE)",
    [
      *(TableBlock(name, {name: _CODE[name]}) for name in _PROGRAMS),
      TableBlock("CodeXGLUE", _DESCRIPTIONS, "CodeXGLUE "),
    ],
    (),
  ),
  "table-6": (
    "GSM8K in all low-resource languages, accuracy in %",
    [TableBlock("GSM8K", _GSM8K, papers_only=True)],
    (),
  ),
}


def paper_table(name: str, group: RunGroup) -> Table:
  """Makes one of TABLES; of `NO_RUNS`, the paper's numbers alone."""
  title, blocks, notes = TABLES[name]
  return _table(name, title, blocks, group, notes)


def others(group: RunGroup) -> Table:
  """The evaluations that the paper lacks."""
  names = [b for b in group.benchmarks if b not in paper.TABLES["table-5"]]
  blocks = [TableBlock(name, {}, f"{name} ") for name in names]
  title = "Evaluations that the paper lacks"
  caption = "in %, higher is better"
  return _table("evaluations", title, blocks, group, caption=caption)


def _table(
  name: str,
  title: str,
  blocks: Sequence[TableBlock],
  group: RunGroup,
  notes: Iterable[str] = (),
  caption: str = "",
) -> Table:
  rows = [row for block in blocks for row in _rows(group, block)]
  described = [n for block in blocks for n in _notes(group, block.benchmark)]
  return grid(name, title, rows, [*notes, *described], group, caption=caption)


def _rows(group: RunGroup, block: TableBlock) -> list[TableRow]:
  benchmark, numbers, prefix, elsewhere, papers_only = block
  subsets = group.subsets(benchmark).items()
  names = {subset or benchmark: name for subset, name in subsets}
  shown = [subset for subset in numbers if subset != paper.AVERAGE]
  if not papers_only:
    shown += [s for s in names if s not in {*shown, *elsewhere}]
  rows = [(subset, [names.get(subset, "")]) for subset in shown]
  # Beside the paper's average, that of the paper's rows.
  averaged = [n for s, n in names.items() if not numbers or s in numbers]
  if paper.AVERAGE in numbers or len(averaged) > 1:
    rows.append((paper.AVERAGE, averaged))
  return [
    TableRow(
      subset if subset == benchmark else f"{prefix}{subset}",
      numbers.get(subset, {}),
      group.columns,
      functools.partial(average_cell, evaluated),
    )
    for subset, evaluated in rows
  ]


def _notes(group: RunGroup, benchmark: str) -> list[str]:
  """A sentence on the examples, the shots and the metric of a benchmark."""
  names = group.subsets(benchmark).values()
  entries = [group.evaluations[name] for name in names]
  if not entries:
    return []
  parts = [*dict.fromkeys(entry["metric"] for entry in entries)]
  parts.append(f"{_range(e['examples'] for e in entries)} examples each")
  asked = _range(entry["asked_shots"] for entry in entries)
  fitted = _range(round(entry["shots"], 1) for entry in entries)
  parts.append(f"{asked} shots asked for, {fitted} fitted on average")
  if cut := sum(entry.get("prompts_cut", 0) for entry in entries):
    parts.append(f"{cut:,} prompts cut at their beginning, too long even so")
  parts += dict.fromkeys(entry["note"] for entry in entries if entry["note"])
  subsets = f"{len(entries)} subsets, " if len(entries) > 1 else ""
  return [f"Ours on {benchmark}: {subsets}{'; '.join(parts)}."]


def _range(values: Iterable[float]) -> str:
  ordered = sorted(set(values))
  ends = [f"{v:,}" for v in dict.fromkeys((ordered[0], ordered[-1]))]
  return " to ".join(ends)


def table5(groups: Sequence[RunGroup]) -> Table:
  """Table 5 of all groups: averages, and how many languages are better."""
  rows = []
  for benchmark in paper.TABLES["table-5"]:
    evaluated = [group for group in groups if benchmark in group.benchmarks]
    for group in evaluated or [NO_RUNS]:
      name = f", {group.name}" if len(evaluated) > 1 else ""
      rows += _table5_rows(group, benchmark, f"{benchmark}{name}")
  notes = [
    "#(> m_B): for how many of the languages the model is better than m_B; the "
    "paper does not say how it counts ties, so they are left out (>) and "
    "counted (≥). m_B fine-tuned is the paper's m_B^NTL or m_B^Code.",
    *(f"{g.name}: {describe_models(g)}" for g in groups if g.benchmarks),
  ]
  keys = ["anchor", *paper.TABLES["table-5"]["MBPP"]]
  for group in groups:
    # Neither m_A alone nor alternative last stages.
    shown = [key for key in group.columns if "/" not in key]
    keys += [key for key in shown if key not in ("base", "augmenting")]
  title = "ablations, baselines and controls"
  return grid("table-5", title, rows, notes, keys=keys)


def _table5_rows(group: RunGroup, benchmark: str, label: str) -> list[TableRow]:
  subsets = group.subsets(benchmark)
  if benchmark == "GSM8K":
    subsets.pop("", None)  # English; the paper's are low-resource languages.
  names = list(subsets.values())
  averages = paper.TABLES["table-5"][benchmark]
  measure = functools.partial(average_cell, names)
  rows = [TableRow(label, averages, group.columns, measure)]
  count = paper.TABLE5_LANGUAGES.get(benchmark)
  if count or len(names) > 1:
    better = paper.TABLES["table-5-better"].get(benchmark, {})
    of = f"of {count or NOTHING} / {len(names) or NOTHING}"
    for sign, numbers, ties in ((">", better, False), ("≥", {}, True)):
      measure = functools.partial(better_cell, names, group, ties)
      name = f"{label} #({sign} m_B), {of}"
      rows.append(TableRow(name, numbers, group.columns, measure, 0))
  return rows


def _score(name: str, run: Run, model: str) -> Cell | None:
  """An evaluation's score with its interval, and p against m_B."""
  entry = run.evaluations.get(name, {})
  score = entry.get("scores", {}).get(model)
  if score is None:
    return None
  p_value = entry.get("against_anchor", {}).get(model, {}).get("p_value")
  low, high = score.get("low"), score.get("high")
  return Cell(percent(score["value"]), low, high, p_value)


def average_cell(names: Sequence[str], run: Run, model: str) -> Cell | None:
  """The average of several evaluations; a single one with its interval."""
  cells = [_score(name, run, model) for name in names]
  if len(cells) == 1:
    return cells[0]
  values = _values(cells)
  return Cell(sum(values) / len(values)) if values else None


def _values(cells: Sequence[Cell | None]) -> list[float]:
  """Returns the numbers of cells; none unless each has one."""
  values = [cell.ours for cell in cells if cell and cell.ours is not None]
  return values if len(values) == len(cells) else []


def better_cell(
  names: Sequence[str], group: RunGroup, ties: bool, run: Run, model: str
) -> Cell | None:
  """Table 5's #(> m_B), with ties left out or counted."""
  if model == "anchor" or "anchor" not in group.columns:
    return None
  # Not every trial has measured m_B, which is the same for all.
  anchor_run = group.columns["anchor"].runs[0]
  values = _values([_score(name, run, model) for name in names])
  anchor = _values([_score(name, anchor_run, "anchor") for name in names])
  if not values or not anchor:
    return None
  pairs = list(zip(values, anchor, strict=True))
  return Cell(sum(a > b or (ties and a == b) for a, b in pairs), digits=0)
