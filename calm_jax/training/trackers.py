"""Trackers: what a run tells the tools in which people watch it.

A run starts its trackers with its config, logs the numbers of each stage by
step, at its end tables, figures and artefacts, and finishes them. Another
tracker is a class with the methods of `Tracker`, and its name in `TRACKERS`.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from calm_jax.core import files
from calm_jax.core.errors import InputError, check_choice
from calm_jax.core.extras import import_extra
from calm_jax.training.metrics import FILE_NAME, read_records

# Logs the numbers of a step of a stage, by name.
Log = Callable[[int, Mapping[str, float]], None]
# A column's text or number, or None where it has none.
Value = str | float | None


class Tracker(Protocol):
  """Keeps what one run measures, or sends it elsewhere.

  It is started by its constructor. Names are the same in all trackers.
  """

  shows_figures: bool  # if none does, figures are not drawn

  def stage(
    self, name: str, folder: Path, resume_step: int
  ) -> AbstractContextManager[Log]:
    """Begins a stage, or goes on with it after the step of a checkpoint.

    What was logged of later steps is replaced, for they are made again.
    """

  def table(
    self, name: str, header: Sequence[str], rows: Sequence[Sequence[Value]]
  ) -> None:
    """Logs a table; the first column names the row."""

  def figure(self, name: str, path: Path) -> None:
    """Logs a PNG file."""

  def artefact(self, name: str, path: Path) -> None:
    """Logs a file or a folder that the run has written."""

  def finish(self, failed: bool) -> None:
    """Writes what is left; nothing is logged after it."""


class JsonLines:
  """Writes metrics.jsonl of each stage; all else into run.jsonl."""

  shows_figures = False

  def __init__(self, folder: Path, config: Mapping[str, Any], stages):
    del stages
    self._folder, self._path = folder, folder / "run.jsonl"
    self._path.unlink(missing_ok=True)
    self._write({"config": config})

  def _write(self, line: Mapping[str, Any]) -> None:
    with self._path.open("a", encoding="utf-8") as file:
      _write_line(file, line)

  @contextlib.contextmanager
  def stage(self, name: str, folder: Path, resume_step: int) -> Iterator[Log]:
    """Drops the lines after `resume_step`; raises as `read_metrics`."""
    path = folder / FILE_NAME
    if path.exists():
      kept = [x for x in read_records(path) if x["step"] <= resume_step]
      files.write_json_lines(path, kept)
    with path.open("a", encoding="utf-8") as file:
      yield lambda step, values: _write_line(file, {"step": step, **values})

  def table(self, name, header, rows) -> None:
    self._write({"table": name, "header": header, "rows": rows})

  def figure(self, name: str, path: Path) -> None:
    self._write({"figure": name, "path": os.path.relpath(path, self._folder)})

  def artefact(self, name: str, path: Path) -> None:
    self._write({"artefact": name, "path": os.path.relpath(path, self._folder)})

  def finish(self, failed: bool) -> None:
    self._write({"failed": failed})


class TensorBoard:
  """Writes the events of each stage into its folder; all else into the run's.

  It has numbers in float32, tables as Markdown, and paths of artefacts.
  """

  shows_figures = True

  def __init__(self, folder: Path, config: Mapping[str, Any], stages):
    del stages
    self._board = SummaryWriter(str(folder))
    text = json.dumps(files.to_json(config), indent=2, default=str)
    self._text("config", "".join(f"    {x}\n" for x in text.splitlines()))

  def _text(self, name: str, text: str) -> None:
    self._board.add_text(name, text)
    self._board.flush()

  @contextlib.contextmanager
  def stage(self, name: str, folder: Path, resume_step: int) -> Iterator[Log]:
    # It ignores an earlier process's events from the purge step on.
    with SummaryWriter(str(folder), purge_step=resume_step + 1) as board:

      def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
          board.add_scalar(name, value, step)
        board.flush()

      yield log

  def table(self, name, header, rows) -> None:
    lines = [header, ["---"] * len(header), *rows]
    cells = [["" if x is None else f"{x}" for x in line] for line in lines]
    self._text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells))

  def figure(self, name: str, path: Path) -> None:
    import numpy as np
    from PIL import Image  # which matplotlib needs too

    with Image.open(path) as image:
      pixels = np.asarray(image.convert("RGB"))
    self._board.add_image(name, pixels, dataformats="HWC")

  def artefact(self, name: str, path: Path) -> None:
    self._text(name, f"`{path}`")

  def finish(self, failed: bool) -> None:
    self._board.close()


class WeightsAndBiases:
  """Logs to one run of Weights & Biases, which a restart goes on with.

  Names have their stage in front, such as "compose/loss", and their x axis is
  "compose/step". W&B takes no step twice, and keeps what it has of those that a
  resumed stage makes again.

  Args:
    stages: steps of each stage, in the order in which they run.
  """

  shows_figures = True

  def __init__(
    self, folder: Path, config: Mapping[str, Any], stages: Mapping[str, int]
  ):
    wandb = _import_wandb()
    self._wandb, self._first, first = wandb, {}, 0
    for name, steps in stages.items():
      self._first[name], first = first, first + steps
    identity = folder / "wandb_id"
    if not identity.exists():
      files.write_atomically(identity, os.urandom(8).hex())
    try:
      self._run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "calm_jax"),
        name=os.environ.get("WANDB_NAME", str(folder)),
        id=identity.read_text(),
        resume="allow",
        reinit="create_new",  # whatever runs this process has besides
        dir=folder,
        config=files.to_json(config),
      )
    except wandb.Error as error:
      raise InputError(
        f"config.trackers: wandb cannot start: {error}. Log in by `wandb login`"
        " or WANDB_API_KEY, or set WANDB_MODE=offline and send the run later by"
        " `wandb sync`"
      ) from error
    for name in stages:
      self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")

  @contextlib.contextmanager
  def stage(self, name: str, folder: Path, resume_step: int) -> Iterator[Log]:
    del folder, resume_step

    def log(step: int, values: Mapping[str, float]) -> None:
      named = {f"{name}/{key}": value for key, value in values.items()}
      self._run.log(
        named | {f"{name}/step": step}, step=self._first[name] + step
      )

    yield log

  def table(self, name, header, rows) -> None:
    made = self._wandb.Table(list(header), [list(row) for row in rows])
    self._run.log({name: made})
    # For tables and charts of several runs.
    for label, *values in rows:
      for column, value in zip(header[1:], values, strict=True):
        if isinstance(value, float):
          self._run.summary[f"{name}/{label}/{column}"] = value

  def figure(self, name: str, path: Path) -> None:
    self._run.log({name: self._wandb.Image(str(path))})

  def artefact(self, name: str, path: Path) -> None:
    made = self._wandb.Artifact(name, type=name)
    add = made.add_dir if path.is_dir() else made.add_file
    add(str(path))
    self._run.log_artifact(made)

  def finish(self, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[..., Tracker]] = {
  "jsonl": JsonLines,
  "tensorboard": TensorBoard,
  "wandb": WeightsAndBiases,
}


class Trackers(contextlib.AbstractContextManager):
  """The trackers of a run, which finishes them at its end.

  They start when something is logged first: by then a run has found all that
  its config asks for.
  """

  def __init__(
    self,
    names: str = "",
    folder: Path = Path(),
    config: Mapping[str, Any] | None = None,
    stages: Mapping[str, int] | None = None,
  ):
    """Takes names, with commas, keys of `TRACKERS`; the rest is for them.

    Args:
      folder: of the run's results; a stage has its own.
      stages: steps of each stage, in the order in which they run.

    Raises as `check`; when they start, InputError if one of them cannot.
    """
    self._makes = [TRACKERS[name] for name in check(names)]
    self._given = folder, config or {}, stages or {}
    self._started: list[Tracker] | None = None

  def started(self) -> list[Tracker]:
    """Returns all trackers, and starts them if it is the first time."""
    if self._started is None:
      if self._makes:
        self._given[0].mkdir(parents=True, exist_ok=True)
      self._started = [make(*self._given) for make in self._makes]
    return self._started

  @contextlib.contextmanager
  def stage(self, name: str, folder: Path, resume_step: int) -> Iterator[Log]:
    """Begins a stage in its folder, or goes on with it after a step."""
    with contextlib.ExitStack() as stack:
      logs = []
      for each in self.started():
        folder.mkdir(parents=True, exist_ok=True)
        logs.append(stack.enter_context(each.stage(name, folder, resume_step)))

      def log(step: int, values: Mapping[str, float]) -> None:
        for each in logs:
          each(step, values)

      yield log

  def __exit__(self, kind, *_) -> None:
    for each in self._started or ():
      each.finish(kind is not None)


def check(names: str) -> list[str]:
  """Returns the names of config.trackers.

  Raises InputError for an unknown one, and for one whose package is missing.
  """
  found = [name.strip() for name in names.split(",") if name.strip()]
  for name in found:
    check_choice("config.trackers", name, list(TRACKERS))
  if "wandb" in found:
    _import_wandb()
  return found


def _import_wandb() -> ModuleType:
  return import_extra("config.trackers", "wandb", "wandb")


def _write_line(file, values: Mapping[str, Any]) -> None:
  # A single write, so that a kill can cut the line but not interleave it.
  line = json.dumps(files.to_json(values), allow_nan=False, default=str)
  file.write(line + "\n")
  file.flush()
