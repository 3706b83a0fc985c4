"""Progress on a terminal and in a log."""

import io
import math

import pytest
from rich.console import Console

from calm_jax.training.progress import Progress

RATES = {
  "tokens_per_second": 12345.6,
  "step_seconds": 0.08765,
  "utilisation": 0.4321,
}


def test_plain_progress_prints_the_first_and_the_last_step():
  out = io.StringIO()
  with Progress(100, 10, "train kv", console=Console(file=out)) as progress:
    for step in range(11, 101):
      progress.update(step, loss=0.5, **RATES)
  first, last = out.getvalue().splitlines()
  assert first.startswith(
    "train kv: step 11/100  loss 0.5000  12,346 tokens/s  87.7 ms a step  "
    "43.2% utilisation  elapsed"
  )
  assert last.startswith("train kv: step 100/100") and last.endswith("0:00:00")
  assert "\x1b" not in out.getvalue()


def test_plain_progress_shows_the_last_step_of_a_failed_run():
  out = io.StringIO()
  with (
    pytest.raises(RuntimeError),
    Progress(9, console=Console(file=out)) as progress,
  ):
    progress.update(1, loss=1.0, **RATES)
    progress.update(2, loss=math.nan, **RATES)
    raise RuntimeError
  assert "step 2/9  loss nan" in out.getvalue()


def test_progress_on_a_terminal_is_a_bar():
  out = io.StringIO()
  console = Console(file=out, force_terminal=True, width=120)
  with Progress(10, 0, "train [kv]", console=console) as progress:
    progress.update(10, loss=0.5, **RATES)
  shown = out.getvalue()
  assert "train [kv]" in shown and "10/10" in shown
  assert "loss 0.5000" in shown and "43.2% utilisation" in shown
