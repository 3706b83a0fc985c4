"""A live progress bar, or occasional lines where there is no terminal."""

from __future__ import annotations

import math
import time
from typing import Self

from rich import progress as rich_progress
from rich.console import Console


class Progress:
  """A progress bar on a terminal, or else a line every `plain_seconds`."""

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
      console: standard output if None.
      plain_seconds: the least time between two lines.
    """
    self._total, self._start = total_steps, start_step
    self._description, self._active = description, active
    self._console, self._plain_seconds = console or Console(), plain_seconds
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
    """Shows a step and its metrics."""
    if not self._active:
      return
    parts = [] if loss is None else [f"loss {float(loss):.4f}"]
    if tokens_per_second is not None:
      parts.append(f"{float(tokens_per_second):,.0f} tokens/s")
    values = "  ".join(parts)
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
    parts = [f"{self._description}: step {step}/{self._total}"]
    parts += [values, f"elapsed {_clock(elapsed)}"]
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


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
