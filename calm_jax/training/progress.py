"""A live progress bar, or occasional lines where there is no terminal."""

import contextlib
import datetime
import math
import time
from typing import Self

from rich import progress as rich_progress
from rich.console import Console

_PLAIN_SECONDS = 30


class Progress(contextlib.AbstractContextManager):
  """A progress bar on a terminal, or else a line every 30 seconds.

  The time left is estimated from what passed since `start_step`.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    description: str = "train",
    console: Console | None = None,
  ):
    self._total, self._start = total_steps, start_step
    self._description = description
    self._console = console or Console()
    self._began, self._printed, self._line = time.monotonic(), -math.inf, ""
    self._bar = rich_progress.Progress(
      rich_progress.TextColumn("{task.description}", markup=False),
      rich_progress.BarColumn(),
      rich_progress.MofNCompleteColumn(),
      rich_progress.TextColumn("{task.fields[values]}", markup=False),
      rich_progress.TimeElapsedColumn(),
      rich_progress.TimeRemainingColumn(),
      console=self._console,
      disable=not (self._console.is_terminal or self._console.is_jupyter),
    )
    self._task = self._bar.add_task(
      description, total=total_steps, completed=start_step, values=""
    )

  def __enter__(self) -> Self:
    self._bar.start()
    return self

  def update(
    self,
    step: int,
    loss: float,
    tokens_per_second: float,
    step_seconds: float,
    utilisation: float,
  ) -> None:
    """Shows a step and its metrics; see `utilisation.Meter` for the rates."""
    values = (
      f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
      f"{1000 * step_seconds:,.1f} ms a step  {utilisation:.1%} utilisation"
    )
    self._bar.update(self._task, completed=step, values=values)
    if not self._bar.disable:
      return
    elapsed = time.monotonic() - self._began
    self._line = (
      f"{self._description}: step {step}/{self._total}  {values}  "
      f"elapsed {_clock(elapsed)}"
    )
    if step > self._start:
      left = elapsed / (step - self._start) * (self._total - step)
      self._line += f"  left {_clock(left)}"
    if time.monotonic() - self._printed >= _PLAIN_SECONDS:
      self._print_line()

  def __exit__(self, *exc_info) -> None:
    if not self._bar.disable:  # Else rich before 15 prints an empty line.
      self._bar.stop()
    self._print_line()

  def _print_line(self) -> None:
    if self._line:
      # The file itself: rich would wrap long lines at 80 columns in a log.
      print(self._line, file=self._console.file, flush=True)
      self._line, self._printed = "", time.monotonic()


def _clock(seconds: float) -> datetime.timedelta:
  return datetime.timedelta(seconds=round(seconds))
