"""A live progress bar, or occasional lines where there is no terminal."""

import math
import time
from typing import Self

from rich import progress as rich_progress
from rich.console import Console

_PLAIN_SECONDS = 30


class Progress:
  """A progress bar on a terminal, or else a line every 30 seconds."""

  def __init__(
    self,
    total_steps: int,
    start_step: int = 0,
    description: str = "train",
    *,
    active: bool = True,
    console: Console | None = None,
  ):
    """Makes a bar; nothing is shown before `with`.

    The time left is estimated from what passed since `start_step`. All
    processes but the first are not `active`, and show nothing.
    """
    self._total, self._start = total_steps, start_step
    self._description, self._active = description, active
    self._console = console or Console()
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

  def update(self, step: int, loss: float, tokens_per_second: float) -> None:
    """Shows a step and its metrics."""
    if not self._active:
      return
    values = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
    if self._bar is not None:
      self._bar.update(self._task, completed=step, values=values)
      return
    elapsed = time.monotonic() - self._began
    self._pending = (
      f"{self._description}: step {step}/{self._total}  {values}  "
      f"elapsed {_clock(elapsed)}"
    )
    if step > self._start:
      left = elapsed / (step - self._start) * (self._total - step)
      self._pending += f"  left {_clock(left)}"
    if time.monotonic() - self._printed >= _PLAIN_SECONDS:
      self._print_pending()

  def __exit__(self, *exc_info) -> None:
    if self._bar is not None:
      self._bar.stop()
    self._print_pending()

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
