"""Finding runs in folders, and grouping those that belong together."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.experiments import variants

RESULTS = "results.json"
ABLATIONS = "ablations"
MODELS = ("augmenting", "anchor", "composed")
# Labels of the columns of tables; `paper` has their keys.
LABELS = {
  "base": "m_A before",
  "augmenting": "m_A",
  "anchor": "m_B",
  "pasted": "m_A's answer in m_B's prompt",
  "ensemble": "m_A and m_B averaged",
} | {name: kind.label for name, kind in variants.KINDS.items()}

# Kinds whose m_A has not been trained on its domain.
_OTHER_MA = ("vanilla", "random")
# results.json has at least one of these.
_SECTIONS = ("table1", "perplexity", "bits_per_byte", "evals")


@dataclasses.dataclass(frozen=True)
class Run:
  """The results.json of a run, or of an alternative last stage of it."""

  folder: Path
  results: Mapping[str, Any]
  prefix: str = ""  # of files of predictions: "<alternative>/" or ""

  @property
  def kind(self) -> str:
    return self.results.get("kind", "composed")

  @property
  def label(self) -> str:
    return LABELS.get(self.kind, self.kind)

  @property
  def config(self) -> Mapping[str, Any]:
    return self.results.get("config", {})

  @property
  def evaluations(self) -> Mapping[str, Any]:
    return self.results.get("evals", {})

  @property
  def root(self) -> Path:
    """The work folder: `folder`, or above it, with the stages of all kinds."""
    folder = self.folder.absolute()
    depth = len(Path(self.config.get("output") or ".").parts)
    return [folder, *folder.parents][depth]

  def path(self, name: str, model: str) -> Path:
    """The file of a model's predictions of a set."""
    return self.folder / "predictions" / f"{self.prefix}{name}.{model}.jsonl"

  @property
  def sides(self) -> list[str]:
    """The models that were joined: "augmenting" or "augmenting/<name>"s first.

    Without any in the results, those of a run of two models.
    """
    counts = self.results.get("parameters", MODELS[:2])
    kinds = [side for side in counts if side.partition("/")[0] in MODELS[:2]]
    return sorted(kinds, key=lambda side: side == "anchor")

  def measures(self, model: str) -> bool:
    """True if the results hold any number of a model."""
    rows = [entry["scores"] for entry in self.evaluations.values()]
    for name in _SECTIONS[:3]:
      rows += self.results.get(name, {}).values()
    return any(model in row for row in rows)


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of tables: a model, in one run or several trials."""

  label: str
  model: str
  runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class RunGroup:
  """Runs of the same questions, and so of the same tables."""

  name: str
  root: Path
  runs: tuple[Run, ...]  # the first describes them
  trials: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  questions: Any = None  # equal in runs that may join; None for trials

  @functools.cached_property
  def columns(self) -> dict[str, Column]:
    """The models in the order of a table, by the paper's keys if it has any."""
    by_kind: dict[str, list[Run]] = {}
    for run in self.runs:
      by_kind.setdefault(run.kind, []).append(run)
    trained = [run for run in self.runs if run.kind not in _OTHER_MA]
    columns = {}
    several = {s: None for run in trained for s in run.sides if "/" in s}
    for key, model, runs in (
      ("base", "augmenting", by_kind.get("vanilla", [])),
      ("augmenting", "augmenting", trained),
      *((side, side, trained) for side in several),
      ("anchor", "anchor", self.runs),
      ("pasted", "pasted", self.runs),
      ("ensemble", "ensemble", self.runs),
    ):
      # The model is the same in all trials: the first that measured it is read.
      if measured := [run for run in runs if run.measures(model)]:
        columns[key] = Column(model_label(key), model, (measured[0],))
    for kind in sorted(by_kind, key=_order):
      first = by_kind[kind][0]
      columns[kind] = Column(first.label, "composed", tuple(by_kind[kind]))
      for name, results in first.results.get("other_runs", {}).items():
        label = f"{first.label}, {name}"
        other = Run(first.folder, results, f"{name}/")
        columns[f"{kind}/{name}"] = Column(label, "composed", (other,))
    return columns

  @functools.cached_property
  def evaluations(self) -> dict[str, Any]:
    """All evaluations by name; of several runs' the last one's entry."""
    return {k: v for run in self.runs for k, v in run.evaluations.items()}

  @property
  def benchmarks(self) -> list[str]:
    """The benchmarks that any run was evaluated on."""
    return list(dict.fromkeys(e["group"] for e in self.evaluations.values()))

  def subsets(self, benchmark: str) -> dict[str, str]:
    """Names of a benchmark's evaluations by subset."""
    return {
      entry["subset"]: name
      for name, entry in self.evaluations.items()
      if entry["group"] == benchmark
    }

  @property
  def slug(self) -> str:
    """The name, as a part of names of files and of links."""
    return re.sub(r"[^\w-]+", "-", self.name).strip("-")

  def first(self, section: str) -> Mapping[str, Any]:
    """A section of the first run that has it; else empty."""
    sections = (run.results.get(section) for run in self.runs)
    return next((found for found in sections if found is not None), {})


def model_label(key: str) -> str:
  """The heading of a column, or of a model."""
  kind, _, name = key.partition("/")
  return f"{LABELS[kind]} {name}".strip()


NO_RUNS = RunGroup("", Path(), ())


def find_groups(folders: Iterable[str | os.PathLike]) -> list[RunGroup]:
  """Finds every run in some folders, and groups them.

  A folder is a run's own or an ablations' one. Runs below it are found too:
  of other kinds in FOLDER/<kind>, of ablations in
  FOLDER/ablations/<kind>/<trial>. Runs of the same experiment and task whose
  work folders lie side by side are one group if their kinds differ. InputError
  if no run is there, or results.json is not what a run writes.
  """
  groups: list[RunGroup] = []
  seen: set[Path] = set()
  for folder in map(Path, folders):
    ablations = folder / ABLATIONS
    if not ablations.is_dir():
      ablations = folder
    trials = sorted(ablations.glob(f"*/[0-9]*/{RESULTS}"), key=_trial_order)
    paths = [*folder.glob(RESULTS), *sorted(folder.glob(f"*/{RESULTS}"))]
    if not paths and not trials:
      raise InputError(
        f"{folder} has no {RESULTS}, and nothing of an ablation: give the "
        "folder that calm_jax.train, .evaluate or .ablations wrote"
      )
    for path in paths:
      if path.resolve() not in seen:
        seen.add(path.resolve())
        _add(groups, read(path.parent))
    if trials and ablations.resolve() not in seen:
      seen.add(ablations.resolve())
      path = ablations / "ablations.json"
      summary = files.read_json(path) if path.exists() else {}
      runs = tuple(read(path.parent) for path in trials)
      groups.append(RunGroup("", ablations, runs, summary))
  return _name(groups)


def read(folder: Path) -> Run:
  """Reads a run; InputError if results.json holds no results."""
  path = folder / RESULTS
  results = files.read_json(path)
  if not results.keys() & set(_SECTIONS):
    raise InputError(f"{path} has none of the sections {sorted(_SECTIONS)}")
  return Run(folder, results)


def _add(groups: list[RunGroup], run: Run) -> None:
  """Adds a run to the first group that it fits, else to a new one."""
  task = json.dumps(run.config.get("task"), sort_keys=True)
  questions = run.config.get("experiment"), task, run.root.parent
  fitting = [
    (group.root != run.root, at)
    for at, group in enumerate(groups)
    if group.questions == questions
    and run.kind not in {other.kind for other in group.runs}
  ]
  if not fitting:
    groups.append(RunGroup("", run.root, (run,), questions=questions))
    return
  # A group that shares its stages comes before one whose folder is beside it.
  _, at = min(fitting)
  runs = sorted([*groups[at].runs, run], key=lambda run: _order(run.kind))
  groups[at] = dataclasses.replace(groups[at], runs=tuple(runs))


def _name(groups: list[RunGroup]) -> list[RunGroup]:
  """Names groups by their folders; those of the same name are numbered."""
  names, named = [], []
  for group in groups:
    folder = group.root.resolve()
    name = folder.name
    if name == ABLATIONS:
      name = f"{folder.parent.name} {ABLATIONS}"
    names.append(name)
    if names.count(name) > 1:
      name = f"{name} ({names.count(name)})"
    named.append(dataclasses.replace(group, name=name))
  return named


def _order(kind: str) -> int:
  return [*variants.KINDS, kind].index(kind)


def _trial_order(path: Path) -> tuple[int, str, int]:
  kind, trial = path.parts[-3:-1]
  return _order(kind), kind, int(trial) if trial.isdigit() else 0
