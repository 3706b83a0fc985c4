"""The report as one HTML page that loads nothing else: page.html, filled in."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from calm_jax.core import files
from calm_jax.reporting import examples, figures
from calm_jax.reporting.grid import HOW_TO_READ
from calm_jax.reporting.pictures import Picture, pictures
from calm_jax.reporting.predictions import is_right
from calm_jax.reporting.runs import LABELS, MODELS, Run, RunGroup
from calm_jax.reporting.table import Cell, Table
from calm_jax.reporting.tables import headlines

# Characters of an example that are shown; a model may write without an end.
_LONGEST = 2000


class Section(NamedTuple):
  """A section of the page, with one or two of these contents."""

  id: str
  title: str
  tables: Sequence[Table] = ()
  pictures: Sequence[Picture] = ()
  chosen: Sequence[examples.Chosen] = ()
  runs: Sequence[Run] = ()
  folded: Sequence[Table] = ()


def page(groups: Sequence[RunGroup], tables: Sequence[Table]) -> str:
  """Writes the page of all groups and their tables."""
  sections = [
    Section(table.name, table.title, tables=[table])
    for table in tables
    if not table.empty
  ]
  for group in groups:
    sections += _group_sections(group, named=len(groups) > 1)
  if empty := [table for table in tables if table.empty]:
    title = "The paper's tables that no run has numbers for"
    sections.append(Section("others", title, folded=empty))
  source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
  strict = jinja2.StrictUndefined
  return jinja2.Template(source, autoescape=True, undefined=strict).render(
    how_to_read=HOW_TO_READ,
    groups=groups,
    sections=sections,
    headlines=headlines,
    svg=lambda figure: base64.b64encode(figures.svg(figure)).decode(),
    texts=_texts,
    paths=_paths,
    settings=lambda run: _flat(run.config),
  )


def _group_sections(group: RunGroup, named: bool) -> list[Section]:
  """Everything of a group that is not a table of the report."""
  name, sections = f", {group.name}" if named else "", []

  def add(id_: str, title: str, **contents) -> None:
    title = f"{title}{name}"
    sections.append(Section(f"{id_}-{group.slug}", title, **contents))

  if drawn := pictures(group):
    add("figures", "Figures", pictures=drawn)
  if chosen := examples.choose(group.runs[0]):
    counts = [_counts(chosen)]
    add("examples", "Examples of Table 8's kinds", tables=counts, chosen=chosen)
  add("files", "Runs, files and settings", runs=group.runs)
  return sections


def _counts(chosen: Sequence[examples.Chosen]) -> Table:
  return Table(
    "examples",
    "How many examples are of each kind",
    ("", *(benchmark.title for benchmark in chosen)),
    [
      (kind, *(Cell(benchmark.counts[kind], digits=0) for benchmark in chosen))
      for kind in chosen[0].counts
    ],
    (examples.RULE,),
  )


def _texts(example: examples.Comparison) -> list[tuple[str, str]]:
  """The question, the right answer and each model's, with their headings."""
  texts = [("asked", example.question)]
  if example.wanted is not None:
    texts.append(("wanted", example.wanted))
  for model in MODELS:
    row = example.rows[model]
    verdict = "✓ right" if is_right(row) else "✗ wrong"
    if "correct" not in row:
      verdict += f", chrF1 {row['score']:.1f}"
    elif row.get("verdict"):
      verdict += f", {row['verdict']}"
    texts.append((f"{LABELS[model]}: {verdict}", row["prediction"]))
  return [(heading, _shorten(text)) for heading, text in texts]


def _shorten(text: str) -> str:
  if not text.strip():
    return "(nothing)"
  return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _paths(run: Run) -> list[str]:
  return [
    path.relative_to(run.folder).as_posix()
    for pattern in ("predictions/**/*.jsonl", "scores/**/*.jsonl")
    for path in sorted(run.folder.glob(pattern))
  ]


def _flat(
  tree: Mapping[str, Any], prefix: str = ""
) -> Iterable[tuple[str, str]]:
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      value = files.to_json(value)
      text = json.dumps(value, ensure_ascii=False, default=str)
      yield f"{prefix}{name}", text
