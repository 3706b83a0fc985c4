"""Tables 1 to 6 of the paper beside ours, and scores of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from calm_jax.reporting import paper
from calm_jax.reporting.costs import ours, overhead
from calm_jax.reporting.grid import Measure, Row, grid, percent, spread
from calm_jax.reporting.runs import Column, Experiment, Run, number
from calm_jax.reporting.table import NOTHING, Cell, Table
from calm_jax.reporting.table1 import HEADLINE, of_table1, table1
from calm_jax.reporting.trials import trials_table

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


def tables(found: Sequence[Experiment]) -> list[Table]:
  """Tables 1 to 6, those with nothing of ours too, then what the paper lacks.

  Raises:
    InputError: an accuracy or a chrF1 is not from 0 to 100.
  """
  made = [_table5(found)]
  for make in (table1, _table2, _table3, _table4, _table6):
    each = [(make(one), one) for one in found]
    each = [(table, one) for table, one in each if not table.empty]
    made += [_named(*pair, len(each)) for pair in each] or [make(None)]
  made.sort(key=lambda table: table.name[: len("table-1")])
  for one in found:
    more = [_others(one)] if {*_groups(one)} - {*paper.TABLE5} else []
    more += [_scores(one, name) for name in _SCORES if one.first(name)]
    more += [trials_table(one.trials)] if one.trials else []
    made += [_named(table, one, len(found)) for table in more]
  return [*made, overhead(found)]


def headlines(experiment: Experiment) -> list[str]:
  """What the composed model came to, a sentence for each group."""
  columns = experiment.columns
  if "composed" not in columns:
    return []
  said = []
  cell = spread(columns["composed"], of_table1(HEADLINE))
  if cell:
    of_paper = paper.TABLE1["kv_math"]["composed"]
    doubt = f", {cell.doubt}" if cell.doubt else ""
    said.append(
      "KV-MATH over keys never seen in training the composition: "
      f"{cell.number}% right{doubt} (the paper: {of_paper:.1f}%)."
    )
  for group in _groups(experiment):
    names = [*_subsets(experiment, group).values()]
    mine, better = (
      spread(columns["composed"], measure)
      for measure in (_average(names), _better(names, columns, False))
    )
    if mine and better and "anchor" in columns:
      base = spread(columns["anchor"], _average(names))
      text = f"{group}: composed {mine}, m_B {base.number}"
      if len(names) > 1:
        text += f", better on {better.number} of {len(names)}"
      said.append(f"{text}.")
  return said


def _table2(experiment: Experiment | None) -> Table:
  rows = _block(experiment, "FLORES-200", paper.TABLE2)
  title = "translation into English, FLORES-200, chrF1"
  notes = _group_notes(experiment, "FLORES-200")
  return grid("table-2", title, rows, notes, experiment)


def _table3(experiment: Experiment | None) -> Table:
  low = _block(experiment, "GSM8K", paper.TABLE3_LOW, "GSM8K ", paper.TABLE6)
  high = _block(experiment, "MGSM", paper.TABLE3_HIGH, "MGSM ")
  notes = [
    "GSM8K: the paper's low-resource languages, into which the problems were "
    "machine-translated; MGSM: high-resource languages. Without a code: "
    "English.",
    *_group_notes(experiment, "GSM8K"),
    *_group_notes(experiment, "MGSM"),
  ]
  title = "grade-school mathematics, accuracy in %"
  return grid("table-3", title, [*low, *high], notes, experiment)


def _table4(experiment: Experiment | None) -> Table:
  rows, notes = [], []
  for group in ("HumanEval", "MBPP", "CodeXGLUE"):
    own = group == "CodeXGLUE"
    wanted = {
      name: row
      for name, row in paper.TABLE4.items()
      if (name == group) or (own and name.islower())
    }
    rows += _block(experiment, group, wanted, f"{group} " if own else "")
    notes += _group_notes(experiment, group)
  title = "code: pass@1 in % (HumanEval, MBPP), chrF1 (CodeXGLUE)"
  return grid("table-4", title, rows, notes, experiment)


def _table6(experiment: Experiment | None) -> Table:
  rows = _block(experiment, "GSM8K", paper.TABLE6, only=True)
  title = "GSM8K in all low-resource languages, accuracy in %"
  notes = _group_notes(experiment, "GSM8K")
  return grid("table-6", title, rows, notes, experiment)


def _others(experiment: Experiment) -> Table:
  rows, notes = [], []
  for group in _groups(experiment):
    if group not in paper.TABLE5:
      rows += _block(experiment, group, {}, f"{group} ")
      notes += _group_notes(experiment, group)
  title = "Evaluations that the paper lacks"
  made = grid("evaluations", title, rows, notes, experiment)
  return dataclasses.replace(made, beside="in %, higher is better")


def _table5(found: Sequence[Experiment]) -> Table:
  rows = []
  for group, averages in paper.TABLE5.items():
    having = [one for one in found if group in _groups(one)]
    for one in having or [None]:
      names, columns = _subsets(one, group), _columns(one)
      if group == "GSM8K":
        names.pop("", None)  # English; the paper's are low-resource languages.
      names = [*names.values()]
      label = group if len(having) < 2 else f"{group}, {one.name}"
      rows.append(Row(label, averages, columns, _average(names)))
      if group in paper.TABLE5_OF or len(names) > 1:
        better = paper.TABLE5_BETTER.get(group, {})
        theirs, own = paper.TABLE5_OF.get(group), len(names)
        of = f", of {theirs or NOTHING} / {own or NOTHING}"
        for sign, numbers, ties in ((">", better, False), ("≥", {}, True)):
          measure = _better(names, columns, ties)
          name = f"{label} #({sign} m_B){of}"
          rows.append(Row(name, numbers, columns, measure, 0))
  notes = [
    "#(> m_B): for how many of the languages the model is better than m_B; the "
    "paper does not say how it counts ties, so they are left out (>) and "
    "counted (≥). m_B fine-tuned is the paper's m_B^NTL or m_B^Code.",
    *(f"{one.name}: {ours(one)}" for one in found if _groups(one)),
  ]
  # Neither m_A alone nor other last stages.
  more = [k for one in found for k in one.columns if "/" not in k]
  more = [k for k in more if k not in ("base", "augmenting")]
  keys = ["anchor", *paper.TABLE5["MBPP"], *more]
  return grid(
    "table-5", "ablations, baselines and controls", rows, notes, None, keys
  )


def _better(
  names: Iterable[str], columns: Mapping[str, Column], ties: bool
) -> Measure:
  """Table 5's #(> m_B), ties left out or counted."""

  def measure(run: Run, model: str) -> Cell | None:
    if model == "anchor" or "anchor" not in columns:
      return None
    # Not every trial has measured m_B, which is the same for all.
    alone = columns["anchor"].runs[0]
    mine = [_of_eval(name)(run, model) for name in names]
    base = [_of_eval(name)(alone, "anchor") for name in names]
    if not mine or None in (*mine, *base):
      return None
    pairs = [(a.ours, b.ours) for a, b in zip(mine, base, strict=True)]
    return Cell(sum(a > b or (ties and a == b) for a, b in pairs), digits=0)

  return measure


def _average(names: Iterable[str]) -> Measure:
  """Of several evaluations; of a single one with its interval."""

  def measure(run: Run, model: str) -> Cell | None:
    cells = [_of_eval(name)(run, model) for name in names]
    if len(cells) < 2 or None in cells:
      return cells[0] if len(cells) == 1 else None
    return Cell(sum(cell.ours for cell in cells) / len(cells))

  return measure


def _of_eval(name: str | None) -> Measure:
  def measure(run: Run, model: str) -> Cell | None:
    one = run.results.get("evals", {}).get(name, {})
    score = one.get("scores", {}).get(model)
    if score is None:
      return None
    against = one.get("against_anchor", {}).get(model, {})
    value = percent(score["value"])
    low, high, p = score.get("low"), score.get("high"), against.get("p_value")
    return Cell(value, low=low, high=high, p_value=p)

  return measure


def _block(
  experiment: Experiment | None,
  group: str,
  numbers: Mapping[str, Mapping[str, float]],
  prefix: str = "",
  elsewhere: Iterable[str] = (),
  only: bool = False,
) -> list[Row]:
  """Rows of a group: the paper's, then those that only we have, the average.

  Args:
    experiment: ours; None for the paper's rows alone.
    group: of results["groups"].
    numbers: the paper's rows by subset, or by group where it has one.
    prefix: of the labels.
    elsewhere: subsets of ours that another table has.
    only: whether to leave out rows that the paper lacks.
  """
  names = {s or group: name for s, name in _subsets(experiment, group).items()}
  shown = [subset for subset in numbers if subset != paper.AVERAGE]
  if not only:
    shown += [s for s in names if s not in {*shown, *elsewhere}]
  columns = _columns(experiment)
  rows = [
    Row(
      s if s == group else prefix + s,
      numbers.get(s, {}),
      columns,
      _of_eval(names.get(s)),
    )
    for s in shown
  ]
  # Beside the paper's average, that of the paper's rows.
  own = [n for s, n in names.items() if not numbers or s in numbers]
  if paper.AVERAGE in numbers or len(own) > 1:
    average = numbers.get(paper.AVERAGE, {})
    rows.append(Row(f"{prefix}average", average, columns, _average(own)))
  return rows


def _group_notes(experiment: Experiment | None, group: str) -> list[str]:
  names = _subsets(experiment, group)
  if not names:
    return []
  every = {k: v for run in experiment.runs for k, v in _evals(run).items()}
  having = [every[name] for name in names.values()]
  parts = [*dict.fromkeys(one["metric"] for one in having)]
  parts += [f"{_range(one['examples'] for one in having)} examples each"]
  asked = _range(one["asked_shots"] for one in having)
  fitted = _range(round(one["shots"], 1) for one in having)
  parts.append(f"{asked} shots asked for, {fitted} fitted on average")
  if cut := sum(one.get("prompts_cut", 0) for one in having):
    parts.append(f"{cut:,} prompts cut at their beginning, too long even so")
  parts += dict.fromkeys(one["note"] for one in having if one["note"])
  what = f"{len(names)} subsets, " if len(names) > 1 else ""
  return [f"Ours on {group}: {what}{'; '.join(parts)}."]


def _range(values: Iterable[float]) -> str:
  found = sorted(set(values))
  ends = [f"{v:,}" for v in dict.fromkeys((found[0], found[-1]))]
  return " to ".join(ends)


def _evals(run: Run) -> Mapping[str, Any]:
  return run.results.get("evals", {})


def _groups(experiment: Experiment) -> list[str]:
  every = (e["group"] for run in experiment.runs for e in _evals(run).values())
  return [*dict.fromkeys(every)]


def _subsets(experiment: Experiment | None, group: str) -> dict[str, str]:
  """Names of a group's evaluations by subset."""
  return {
    one["subset"]: name
    for run in (experiment.runs if experiment else ())
    for name, one in _evals(run).items()
    if one["group"] == group
  }


def _columns(experiment: Experiment | None) -> Mapping[str, Column]:
  return experiment.columns if experiment else {}


def _scores(experiment: Experiment, name: str) -> Table:
  """A score of text by set and model, the lower the better."""
  digits = 2 if name == "perplexity" else 3

  def of(text: str) -> Measure:
    def measure(run: Run, model: str) -> Cell | None:
      value = run.results.get(name, {}).get(text, {}).get(model)
      return None if value is None else Cell(number(value), digits=digits)

    return measure

  rows = [
    Row(text, {}, experiment.columns, of(text))
    for text in experiment.first(name)
  ]
  title, note = _SCORES[name]
  note += " Bold is the best of the row."
  slug = name.replace("_", "-")
  made = grid(slug, title, rows, [note], experiment, best=min)
  return dataclasses.replace(made, beside="lower is better")


def _named(table: Table, experiment: Experiment, of: int) -> Table:
  """Told apart from the same table of another experiment."""
  if of < 2:
    return table
  title = f"{table.title}, {experiment.name}"
  name = f"{table.name}-{experiment.slug}"
  return dataclasses.replace(table, name=name, title=title)
