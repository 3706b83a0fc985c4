"""The report as one HTML page that loads nothing else."""

from __future__ import annotations

import base64
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from calm_jax.core import trees
from calm_jax.core.files import to_json
from calm_jax.reporting import examples, figures
from calm_jax.reporting.grid import HOW_TO_READ
from calm_jax.reporting.pictures import Picture, pictures
from calm_jax.reporting.predictions import is_right
from calm_jax.reporting.runs import LABELS, MODELS, Experiment
from calm_jax.reporting.table import Cell, Table
from calm_jax.reporting.tables import headlines

_TITLE = "Composed language models: the paper and ours"
_INTRODUCTION = (
  "Beside the numbers of the paper (Bansal et al. 2024, LLM Augmented LLMs, "
  "arXiv 2401.02412) stand those of the runs below. Ours are other models, "
  "most of them far smaller, trained on other data: what can be compared is "
  "how the columns of one side relate, not a cell with its neighbour."
)
# Characters of an example that are shown; a model may write without an end.
_LONGEST = 2000


def page(found: Sequence[Experiment], made: Iterable[Table]) -> str:
  """The whole page.

  Args:
    found: the experiments.
    made: their tables.

  Raises:
    InputError: a file of a run is not what a run writes.
  """
  made = [*made]
  sections = {
    table.name: (table.title, _table(table))
    for table in made
    if not table.empty
  }
  for one in found:
    sections |= _of_experiment(one, named=len(found) > 1)
  empty = [table for table in made if table.empty]
  if empty:
    tables = "".join(f"<h3>{escape(t.title)}</h3>{_table(t)}" for t in empty)
    names = ", ".join(t.title.split(":")[0] for t in empty)
    folded = f"<details><summary>{names}</summary>{tables}</details>"
    sections["others"] = (
      "The paper's tables that no run has numbers for",
      folded,
    )
  links = "".join(
    f'<li><a href="#{escape(key)}">{escape(title)}</a></li>'
    for key, (title, _) in sections.items()
  )
  body = [
    f"<p>{escape(_INTRODUCTION)}</p><p>{escape(HOW_TO_READ)}</p>",
    *(_said(one) for one in found),
    f'<nav aria-label="contents"><ul>{links}</ul></nav>',
    *(
      f'<section id="{escape(key)}"><h2>{escape(title)}</h2>{text}</section>'
      for key, (title, text) in sections.items()
    ),
  ]
  template = resources.files("calm_jax.reporting") / "page.html"
  return string.Template(template.read_text(encoding="utf-8")).substitute(
    title=_TITLE, body="\n".join(body)
  )


def _said(experiment: Experiment) -> str:
  lines = "".join(f"<li>{escape(line)}</li>" for line in headlines(experiment))
  folder = escape(str(experiment.root))
  name = f"<strong>{escape(experiment.name)}</strong>"
  return f"<p>{name} ({folder})</p><ul>{lines}</ul>"


def _of_experiment(
  experiment: Experiment, named: bool
) -> dict[str, tuple[str, str]]:
  """What is not a table: (title, HTML) of each section."""
  parts = {}
  drawn = pictures(experiment)
  if drawn:
    parts["figures"] = "Figures", "".join(map(_figure, drawn))
  chosen = examples.choose(experiment.runs[0])
  if chosen:
    parts["examples"] = "Examples of Table 8's kinds", _chosen(chosen)
  parts["files"] = "Runs, files and settings", _files(experiment)
  name = experiment.name
  return {
    f"{key}-{experiment.slug}": (f"{title}, {name}" if named else title, text)
    for key, (title, text) in parts.items()
  }


def _table(table: Table) -> str:
  head = "".join(f'<th scope="col">{escape(h)}</th>' for h in table.header)
  rows = []
  for row, (name, *cells) in enumerate(table.rows):
    texts = [
      _cell(cell, (row, at) in table.bold)
      for at, cell in enumerate(cells, start=1)
    ]
    rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(texts)}</tr>')
  notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
  title = escape(table.title)
  return (
    f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">'
    f"<table><caption>{escape(table.beside or table.title)}</caption>"
    f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    f'</div><ul class="notes">{notes}</ul>'
  )


def _cell(cell: str | Cell, best: bool) -> str:
  if isinstance(cell, str):
    return f'<td class="text">{escape(cell)}</td>'
  start = '<td class="best">' if best else "<td>"
  doubt = "".join(f"<small>{escape(part)}</small> " for part in cell.doubts)
  return f"{start}{escape(cell.number)}{doubt}</td>"


def _figure(picture: Picture) -> str:
  data = base64.b64encode(figures.svg(picture.figure)).decode()
  width = round(80 * picture.figure.get_figwidth())
  title, caption = escape(picture.title), escape(picture.caption)
  return (
    f"<h3>{title}</h3><figure>"
    f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">'
    f'<img width="{width}" alt="{title}. {caption}" '
    f'src="data:image/svg+xml;base64,{data}"></div>'
    f"<figcaption>{caption}</figcaption></figure>"
  )


def _chosen(chosen: Sequence[examples.Chosen]) -> str:
  counts = Table(
    "examples",
    "How many examples are of each kind",
    ("", *(one.title for one in chosen)),
    [
      (kind, *(Cell(one.counts[kind], digits=0) for one in chosen))
      for kind in chosen[0].counts
    ],
    (examples.RULE,),
  )
  shown = "".join(
    f"<h3>{escape(one.title)}</h3>"
    + "".join(_example(kind, example) for kind, example in one.first.items())
    for one in chosen
  )
  return _table(counts) + shown


def _example(kind: str, example: examples.Example) -> str:
  said = [("asked", example.question)]
  if example.wanted is not None:
    said.append(("wanted", example.wanted))
  for model in MODELS:
    row = example.rows[model]
    verdict = "✓ right" if is_right(row) else "✗ wrong"
    if "correct" not in row:
      verdict += f", chrF1 {row['score']:.1f}"
    elif row.get("verdict"):
      verdict += f", {row['verdict']}"
    said.append((f"{LABELS[model]}: {verdict}", row["prediction"]))
  items = "".join(
    f"<dt>{escape(term)}</dt><dd><pre>{_text(text)}</pre></dd>"
    for term, text in said
  )
  whole = ""
  if example.question != example.prompt.rstrip():
    whole = (
      "<details><summary>the whole prompt</summary>"
      f"<pre>{escape(example.prompt)}</pre></details>"
    )
  head = f"<h4>{escape(kind)} <small>({escape(example.source)})</small></h4>"
  return f'<div class="example">{head}<dl>{items}</dl>{whole}</div>'


def _text(text: str) -> str:
  if not text.strip():
    return "(nothing)"
  cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
  return escape(cut)


def _files(experiment: Experiment) -> str:
  parts = []
  for run in experiment.runs:
    paths = [
      path.relative_to(run.folder).as_posix()
      for pattern in ("predictions/**/*.jsonl", "scores/**/*.jsonl")
      for path in sorted(run.folder.glob(pattern))
    ]
    items = "".join(f"<li><code>{escape(path)}</code></li>" for path in paths)
    settings = "".join(
      f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
      for name, value in _settings(run.config)
    )
    kind = escape(LABELS.get(run.kind, run.kind))
    parts.append(
      f"<details><summary>{kind}: {escape(str(run.folder))}, {len(paths)} "
      f"files of predictions and scores</summary><ul>{items}</ul>"
      f'<div class="scroll"><table><caption>All settings</caption><tbody>'
      f"{settings}</tbody></table></div></details>"
    )
  rule = (
    "Every number of a table is worked out from the file of that row and model "
    "in its run's folder, predictions/<row>.<model>.jsonl, an example a line."
  )
  return f"<p>{escape(rule)}</p>{''.join(parts)}"


def _settings(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
  for name, value in trees.flatten(to_json(config), ".").items():
    yield name, json.dumps(value, ensure_ascii=False, default=str)
