"""The steps in a directory of checkpoints, and which of them is good."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from calm_jax.core.errors import InputError, StorageError
from calm_jax.training import checkpoint_files


def manager(directory: epath.Path, **options) -> ocp.CheckpointManager:
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  arrays = ocp.handlers.PyTreeCheckpointHandler()
  registry.add("state", ocp.args.PyTreeSave, arrays)
  registry.add("state", ocp.args.PyTreeRestore, arrays)
  for item in ("data", "meta"):
    handler = ocp.handlers.JsonCheckpointHandler()
    registry.add(item, ocp.args.JsonSave, handler)
    registry.add(item, ocp.args.JsonRestore, handler)
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(**options),
    handler_registry=registry,
  )


def find_step(manager: ocp.CheckpointManager, step: int | None) -> int:
  steps = sorted(manager.all_steps())
  if not steps:
    raise InputError(f"no complete checkpoint in {manager.directory}")
  if step is None:
    return steps[-1]
  if step not in steps:
    raise InputError(
      f"no complete checkpoint of step {step} in {manager.directory}; there"
      f" are {steps}"
    )
  return step


def recover(directory: epath.Path) -> None:
  """Moves aside damaged steps, if there is a good one to go on from.

  All processes call this together, and the first one does it.

  Raises:
    StorageError: there are steps and none is good.
  """
  error = None
  if jax.process_index() == 0 and directory.exists():
    try:
      _move_damaged(directory)
    except StorageError as none:
      error = none
  if jax.process_count() > 1:
    good = multihost_utils.broadcast_one_to_all(np.int32(error is None))
    if not int(good) and error is None:
      error = StorageError(f"no good checkpoint in {directory}")
  if error:
    raise error


def _move_damaged(directory: epath.Path) -> None:
  steps = sorted(ocp.utils.checkpoint_steps(directory))
  good, why = newest_good(directory, steps)
  for step in steps:
    # Orbax reads the metrics of all steps.
    if step not in why and (
      what := checkpoint_files.problem(directory / str(step), "metrics/")
    ):
      why[step] = what
  for step, what in why.items():
    aside = checkpoint_files.move_aside(directory / str(step))
    used = f", and step {good} is used" if step > good else ""
    _warn(f"{what}; the step is now in {aside}{used}")


def good_step(manager: ocp.CheckpointManager, step: int | None) -> int:
  """A step to read; the newest that is good if None.

  Raises:
    InputError: there is no such step.
    StorageError: it is damaged, or each is.
  """
  newest = find_step(manager, step)
  steps = sorted(manager.all_steps()) if step is None else [newest]
  good, why = newest_good(epath.Path(manager.directory), steps)
  for what in why.values():
    _warn(f"{what}; step {good} is used")
  return good


def newest_good(
  directory: epath.Path, steps: Sequence[int]
) -> tuple[int | None, dict[int, str]]:
  """The last of the steps that is good, and what is wrong with those after it.

  None if there are no steps.

  Raises:
    StorageError: none is good.
  """
  why: dict[int, str] = {}
  for step in reversed(steps):
    path = directory / str(step)
    found = checkpoint_files.problem(path)
    if found is None:
      if not checkpoint_files.is_sealed(path):
        _warn(f"{path} has no checksums: whether it is damaged is not known")
      return step, why
    why[step] = found
  if not steps:
    return None, why
  raise StorageError(
    "\n  ".join([f"no good checkpoint in {directory}:", *why.values()])
    + "\nbring the files back, or remove the folder above it to start anew"
  )


def _warn(text: str) -> None:
  print(f"warning: {text}", file=sys.stderr, flush=True)


def best(manager: ocp.CheckpointManager, name: str) -> int | None:
  try:
    ranked = [
      (finite_or_worst(metrics[name]), -step)
      for step in manager.all_steps()
      if name in (metrics := manager.metrics(step) or {})
    ]
  except ValueError as error:
    raise StorageError(
      f"the metrics of a step in {manager.directory} are damaged: {error}"
    ) from error
  return -min(ranked)[1] if ranked else None


def finite_or_worst(value: float) -> float:
  # NaN compares false with everything and would make the order arbitrary.
  return value if math.isfinite(value) else math.inf
