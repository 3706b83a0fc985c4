"""Finding runs in folders, and which of them belong together."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.experiments import variants

RESULTS = "results.json"
ABLATIONS = "ablations"
MODELS = ("augmenting", "anchor", "composed")
# Of the columns of tables; see `paper` for their keys.
LABELS = {"base": "m_A before", "augmenting": "m_A", "anchor": "m_B"} | {
  name: kind.label for name, kind in variants.KINDS.items()
}

# Kinds whose m_A has not been trained on its domain.
_OTHER_MA = ("vanilla", "random")


@dataclasses.dataclass(frozen=True)
class Run:
  """What one run, or an alternative last stage of it, left.

  Attributes:
    folder: of results.json and predictions/.
    results: as in results.json.
    prefix: of the names of files of predictions: "<alternative>/" or "".
  """

  folder: Path
  results: Mapping[str, Any]
  prefix: str = ""

  @property
  def kind(self) -> str:
    return self.results.get("kind", "composed")

  @property
  def config(self) -> Mapping[str, Any]:
    return self.results.get("config", {})

  @property
  def root(self) -> Path:
    """Of the stages that all kinds share, if it is above the folder."""
    folder = self.folder.absolute()
    depth = len(Path(self.config.get("output") or ".").parts)
    return folder.parents[depth - 1] if depth else folder

  def path(self, name: str, model: str) -> Path:
    """The file of a model's predictions of a set."""
    return self.folder / "predictions" / f"{self.prefix}{name}.{model}.jsonl"

  def measures(self, model: str) -> bool:
    """Whether there is any number of a model."""
    tables = [self.results.get(name, {}) for name in ("table1", "perplexity")]
    tables += [self.results.get("bits_per_byte", {})]
    tables += [e["scores"] for e in self.results.get("evals", {}).values()]
    rows = [t for table in tables for t in (table, *table.values())]
    return any(isinstance(row, Mapping) and model in row for row in rows)


@dataclasses.dataclass(frozen=True)
class Column:
  """A model of an experiment: a column of its tables.

  Attributes:
    label: what it is called.
    model: whose numbers of the runs these are, one of MODELS.
    runs: trials of it; most have one.
  """

  label: str
  model: str
  runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Runs that were asked the same questions.

  Attributes:
    name: of its folder.
    root: the folder.
    columns: by the key of the paper's column where it has one.
    runs: all of them, the one to speak of first.
    trials: ablations.json, where there is one.
  """

  name: str
  root: Path
  columns: dict[str, Column]
  runs: tuple[Run, ...]
  trials: Mapping[str, Any]

  @property
  def slug(self) -> str:
    """The name, as a part of names of files and of links."""
    return re.sub(r"[^\w-]+", "-", self.name).strip("-")

  def first(self, section: str) -> Mapping[str, Any]:
    """A section of the first run that has it; else empty."""
    having = (
      run.results[section] for run in self.runs if section in run.results
    )
    return next(having, {})


def experiments(folders: Iterable[str | os.PathLike]) -> list[Experiment]:
  """Every run in some folders, sorted into experiments.

  A folder is a run's own or an ablations' one. Runs below it are found too:
  of other kinds in FOLDER/<kind>, of ablations in
  FOLDER/ablations/<kind>/<trial>. Runs of the same experiment and task whose
  work folders lie side by side are one experiment if their kinds differ.

  Raises:
    InputError: no run is there, or results.json is not what a run writes.
  """
  groups: list[tuple[Any, list[Run], Path, Mapping]] = []
  seen: set[Path] = set()
  for folder in map(Path, folders):
    here = folder / ABLATIONS if (folder / ABLATIONS).is_dir() else folder
    trials = [p for p in here.glob(f"*/[0-9]*/{RESULTS}") if p.is_file()]
    own = [folder / RESULTS, *sorted(folder.glob(f"*/{RESULTS}"))]
    own = [path for path in own if path.is_file()]
    if not own and not trials:
      raise InputError(
        f"{folder} has no {RESULTS}, and nothing of an ablation: give the "
        "folder that calm_jax.train, .evaluate or .ablations wrote"
      )
    for path in own:
      if path.resolve() not in seen:
        seen.add(path.resolve())
        _join(groups, read(path.parent))
    if trials and here.resolve() not in seen:
      seen.add(here.resolve())
      made = [read(path.parent) for path in sorted(trials, key=_by_kind)]
      summary = here / "ablations.json"
      found = json.loads(summary.read_text()) if summary.exists() else {}
      groups.append((None, made, here, found))
  names: dict[str, int] = {}
  found = []
  for _, runs, root, summary in groups:
    name = root.resolve().name
    name = root.resolve().parent.name if name == ABLATIONS else name
    name += " ablations" * (root.name == ABLATIONS and name != ABLATIONS)
    names[name] = names.get(name, 0) + 1
    name += f" ({names[name]})" * (names[name] > 1)
    found.append(Experiment(name, root, columns(runs), tuple(runs), summary))
  return found


def read(folder: Path) -> Run:
  """A run's results.

  Raises:
    InputError: results.json is not a JSON object of some results.
  """
  path = folder / RESULTS
  try:
    results = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise InputError(f"{path} is not JSON: {error}") from error
  known = {"table1", "perplexity", "bits_per_byte", "evals"}
  if not isinstance(results, dict) or not known & results.keys():
    raise InputError(f"{path} has none of the sections {sorted(known)}")
  return Run(folder, results)


def columns(runs: list[Run]) -> dict[str, Column]:
  """The models of an experiment's runs, in the order of a table."""
  by_kind: dict[str, list[Run]] = {}
  for run in runs:
    by_kind.setdefault(run.kind, []).append(run)
  made = {}
  for key, model, having in (
    ("base", "augmenting", by_kind.get("vanilla", [])),
    ("augmenting", "augmenting", [r for r in runs if r.kind not in _OTHER_MA]),
    ("anchor", "anchor", runs),
  ):
    # The same in all trials, so one says it.
    if measured := [run for run in having if run.measures(model)][:1]:
      made[key] = Column(LABELS[key], model, tuple(measured))
  for kind in sorted(by_kind, key=_order):
    trials = tuple(by_kind[kind])
    label = LABELS.get(kind, kind)
    made[kind] = Column(label, "composed", trials)
    for name, results in trials[0].results.get("other_runs", {}).items():
      other = Run(trials[0].folder, results, f"{name}/")
      made[f"{kind}/{name}"] = Column(f"{label}, {name}", "composed", (other,))
  return made


def number(value: Any) -> float | None:
  """Of JSON, where infinity is a string; None stays None."""
  return None if value is None else float(value)


def _join(groups: list, run: Run) -> None:
  """Adds a run to the first group that it fits, else to a new one."""
  task = json.dumps(run.config.get("task"), sort_keys=True)
  key = (run.config.get("experiment"), task, run.root.parent)
  # One that shares its stages comes before one beside it.
  for other, runs, _, _ in sorted(groups, key=lambda g: g[2] != run.root):
    if other == key and run.kind not in {one.kind for one in runs}:
      runs.append(run)
      runs.sort(key=lambda one: _order(one.kind))
      return
  groups.append((key, [run], run.root, {}))


def _order(kind: str) -> int:
  return [*variants.KINDS, kind].index(kind)


def _by_kind(path: Path) -> tuple[int, str, int]:
  kind, trial = path.parts[-3:-1]
  return _order(kind), kind, int(trial) if trial.isdigit() else 0
