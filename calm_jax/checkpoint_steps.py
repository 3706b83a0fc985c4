"""The steps in a directory of checkpoints, and which of them is good."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

import orbax.checkpoint as ocp
from etils import epath

from calm_jax import checkpoint_files
from calm_jax.errors import InputError, StorageError


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


def newest_good(
  manager: ocp.CheckpointManager, step: int | None
) -> tuple[int | None, dict[int, str]]:
  """A step whose files are as they were written, and what is wrong with others.

  Args:
    manager: of the directory.
    step: the one to look at; None for the newest that is good.
  """
  newest = find_step(manager, step)
  steps = [s for s in sorted(manager.all_steps()) if s <= newest]
  why: dict[int, str] = {}
  for one in reversed(steps) if step is None else [step]:
    path = epath.Path(manager.directory) / str(one)
    found = checkpoint_files.problem(path)
    if found is None:
      if not checkpoint_files.is_sealed(path):
        warn(f"{path} has no checksums: whether it is damaged is not known")
      return one, why
    why[one] = found
  return None, why


def damaged(directory: epath.Path, why: Mapping[int, str]) -> StorageError:
  return StorageError(
    "\n".join(
      [
        f"no good checkpoint in {directory}:",
        *(f"  step {step}: {what}" for step, what in why.items()),
        "bring the files back, or remove the folder above it to start anew",
      ]
    )
  )


def warn(text: str) -> None:
  print(f"warning: {text}", file=sys.stderr, flush=True)


def best(manager: ocp.CheckpointManager, name: str) -> int | None:
  ranked = [
    (finite_or_worst(metrics[name]), -step)
    for step in manager.all_steps()
    if name in (metrics := manager.metrics(step) or {})
  ]
  return -min(ranked)[1] if ranked else None


def finite_or_worst(value: float) -> float:
  # NaN compares false with everything and would make the order arbitrary.
  return value if math.isfinite(value) else math.inf
