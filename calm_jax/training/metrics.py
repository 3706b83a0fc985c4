"""Metrics on disk (JSON lines and TensorBoard) and a live progress line."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rich import progress as rich_progress
from rich.console import Console
from tensorboardX import SummaryWriter

from calm_jax.core import files

FILE_NAME = "metrics.jsonl"


class MetricWriter:
  """Appends scalars to metrics.jsonl and to TensorBoard event files."""

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    resume_step: int | None = None,
    active: bool = True,
  ):
    """Opens the files, and forgets what a resumed run will do again.

    Args:
      directory: a local folder; made if absent.
      resume_step: the step of the restored checkpoint: lines of later steps
        are dropped. None means a run that starts anew: all are dropped.
      active: False makes every call a no-op, for all processes but the first.

    Raises:
      InputError: see `read_metrics`.
    """
    self._active = active
    if not active:
      return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kept = -1 if resume_step is None else resume_step
    path = directory / FILE_NAME
    if path.exists():
      _drop_after(path, kept)
    self._file = path.open("a", encoding="utf-8")
    # A purge step tells TensorBoard to ignore the events of the earlier
    # process from there on.
    self._board = SummaryWriter(str(directory), purge_step=kept + 1)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one line and one TensorBoard scalar per value; flushes both.

    Args:
      step: the training step.
      values: name to number, or array of one element. A value that is not
        finite is written as the string "NaN", "Infinity" or "-Infinity",
        which JSON has no number for; `float` reads all three.

    Raises:
      ValueError: a value is called "step".
    """
    if not self._active:
      return
    if "step" in values:
      raise ValueError('a metric may not be called "step"')
    scalars = {name: _scalar(value) for name, value in values.items()}
    line = files.to_json({"step": int(step), **scalars})
    # A single write, so that a kill can cut the line but not interleave it.
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, int(step))
    self._board.flush()

  def close(self) -> None:
    """Closes the files."""
    if self._active:
      self._file.close()
      self._board.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()


def read_metrics(directory: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads metrics.jsonl: one dict per line, non-finite values as floats.

  Raises:
    InputError: the directory has no metrics.jsonl, or a line other than a last
      one cut short is not what `MetricWriter` writes.
  """
  return [
    {name: files.number_from_json(value) for name, value in record.items()}
    for record in _records(Path(directory) / FILE_NAME)
  ]


class Progress:
  """A live progress bar, or plain occasional lines when not on a terminal.

  Used as `with Progress(total_steps, start_step, "train") as p: p.update(...)`.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    description: str = "train",
    *,
    active: bool = True,
    console: Console | None = None,
    plain_seconds: float = 30.0,
  ):
    """Makes a bar; nothing is shown before `with`.

    Args:
      total_steps: the step at which the run ends.
      start_step: the step it starts from; time left is estimated from there.
      description: shown at the left.
      active: False shows nothing, for all processes but the first.
      console: where to write; standard output if None.
      plain_seconds: the least time between two plain lines.
    """
    self._total = total_steps
    self._start = start_step
    self._description = description
    self._active = active
    self._console = console or Console()
    self._plain_seconds = plain_seconds
    self._bar: rich_progress.Progress | None = None
    self._pending: str | None = None

  def __enter__(self) -> Self:
    self._began = time.monotonic()
    self._printed = -math.inf
    if self._active and (self._console.is_terminal or self._console.is_jupyter):
      self._bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[values]}", markup=False),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=self._console,
      )
      self._task = self._bar.add_task(
        self._description, total=self._total, completed=self._start, values=""
      )
      self._bar.start()
    return self

  def update(
    self,
    step: int,
    *,
    loss: float | None = None,
    tokens_per_second: float | None = None,
  ) -> None:
    """Shows the step and what is known about it."""
    if not self._active:
      return
    values = _describe(loss, tokens_per_second)
    if self._bar is not None:
      self._bar.update(self._task, completed=step, values=values)
      return
    self._pending = self._plain_line(step, values)
    if time.monotonic() - self._printed >= self._plain_seconds:
      self._print_pending()

  def __exit__(self, *exc_info) -> None:
    if self._bar is not None:
      self._bar.stop()
    self._print_pending()

  def _plain_line(self, step: int, values: str) -> str:
    elapsed = time.monotonic() - self._began
    parts = [f"{self._description}: step {step}/{self._total}", values]
    parts.append(f"elapsed {_clock(elapsed)}")
    if step > self._start:
      left = elapsed / (step - self._start) * (self._total - step)
      parts.append(f"left {_clock(left)}")
    return "  ".join(part for part in parts if part)

  def _print_pending(self) -> None:
    if self._pending is not None:
      # The file itself: rich would wrap long lines at 80 columns in a log.
      print(self._pending, file=self._console.file, flush=True)
      self._pending = None
      self._printed = time.monotonic()


def _drop_after(path: Path, step: int) -> None:
  kept = [record for record in _records(path) if record["step"] <= step]
  files.write_json_lines(path, kept)


def _records(path: Path) -> list[dict[str, Any]]:
  lines = files.read_json_lines(path, ["step"], drop_unfinished=True)
  return [record for _, record in lines]


def _scalar(value: Any) -> int | float:
  value = value.item() if hasattr(value, "item") else value
  return value if isinstance(value, int) else float(value)


def _describe(loss: float | None, tokens_per_second: float | None) -> str:
  parts = []
  if loss is not None:
    parts.append(f"loss {float(loss):.4f}")
  if tokens_per_second is not None:
    parts.append(f"{float(tokens_per_second):,.0f} tokens/s")
  return "  ".join(parts)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
