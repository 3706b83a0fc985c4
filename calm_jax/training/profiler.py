"""Traces of a few steps, for TensorBoard's profile plugin or xprof."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from calm_jax.core.errors import InputError


def parse(profile: str, stage: str, last: int) -> range:
  """Returns the steps that config.profile names: "20:25" are six; "" is none.

  InputError unless it names steps of a stage, whose `last` one is given.
  """
  if not profile:
    return range(0)
  match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", profile)
  first, end = map(int, match.groups()) if match else (1, 0)
  if first > end:
    raise InputError(
      f"config.profile={profile!r} is not FIRST:LAST, two numbers of steps "
      "such as 20:25"
    )
  if end > last:
    raise InputError(
      f"config.profile={profile!r}: stage {stage!r} ends with step {last}"
    )
  return range(first, end + 1)


class Profiler(contextlib.AbstractContextManager):
  """Writes a trace of some steps into a folder; of no steps it does nothing.

  A stage that goes on within these steps traces those that are left.
  """

  def __init__(self, steps: range, folder: Path):
    self._steps, self._folder, self._traces = steps, folder, False

  def run(self, number: int, step: Callable, *arguments: Any) -> Any:
    """Runs a step, and traces it if its number is one of those."""
    if number not in self._steps:
      return step(*arguments)
    if not self._traces:
      # The end of the steps before it is no part of the trace.
      jax.block_until_ready(arguments)
      jax.profiler.start_trace(self._folder)
      self._traces = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      results = step(*arguments)
    if number == self._steps[-1]:
      jax.block_until_ready(results)
      self._stop()
    return results

  def __exit__(self, *exc_info) -> None:
    if self._traces:
      self._stop()

  def _stop(self) -> None:
    self._traces = False
    jax.profiler.stop_trace()
    print(f"a trace is in {self._folder}", flush=True)
