"""Damaged checkpoints: checksums of each step, and the newest intact step.

`checksums.json` is written into a step before the rename that makes the step
complete, so that each complete step has one. It holds a checksum of itself.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from calm_jax.core import files
from calm_jax.core.errors import InputError, StorageError

_NAME = "checksums.json"
# Orbax changes these in or after the step's completion, and needs neither.
_UNCHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt")


def seal(step: Path) -> None:
  """Writes the checksums of all files of a step."""
  checksums = {
    str(path.relative_to(step)): {
      "bytes": path.stat().st_size,
      "sha256": files.sha256(path),
    }
    for path in sorted(step.rglob("*"))
    if path.is_file() and path.name not in _UNCHECKED
  }
  sealed = {"files": checksums, "sha256": _sha256_of_json(checksums)}
  (step / _NAME).write_text(json.dumps(sealed, indent=1) + "\n")


def recover(directory: Path) -> None:
  """Renames damaged steps to `<step>.corrupt`; StorageError if none is intact.

  All processes call this together, and the first one does it. Of steps before
  the newest intact one only the metrics are verified, which Orbax reads.
  """
  error = None
  if jax.process_index() == 0 and directory.exists():
    try:
      _move_damaged(directory)
    except StorageError as no_good_step:
      error = no_good_step
  if not multihost_utils.broadcast_one_to_all(np.int32(error is None)):
    raise error or StorageError(f"no good checkpoint in {directory}")


def intact_step(directory: Path, step: int | None) -> int:
  """The step that is asked for, or if None the newest intact one.

  Raises InputError if there is none, StorageError if it or each is damaged.
  """
  steps = ocp.utils.checkpoint_steps(directory) if directory.exists() else []
  if not steps:
    raise InputError(f"no complete checkpoint in {directory}")
  if step is not None and step not in steps:
    raise InputError(
      f"no checkpoint of step {step} in {directory}; there are {sorted(steps)}"
    )
  intact, damage = _newest_intact(directory, steps if step is None else [step])
  for what in damage.values():
    warn(f"{what}; step {intact} is used")
  return intact


def warn(text: str) -> None:
  """Prints a warning to standard error."""
  print(f"warning: {text}", file=sys.stderr, flush=True)


def _newest_intact(
  directory: Path, steps: Sequence[int]
) -> tuple[int, dict[int, str]]:
  """The newest intact step, and the damage of each after it.

  A step without checksums, of an early version, counts as intact. StorageError
  if there is none.
  """
  damage: dict[int, str] = {}
  for step in sorted(steps, reverse=True):
    path = directory / str(step)
    if what := _damage(path):
      damage[step] = what
      continue
    if not (path / _NAME).exists():
      warn(f"{path} has no checksums: whether it is damaged is not known")
    return step, damage
  raise StorageError(
    "\n  ".join([f"no good checkpoint in {directory}:", *damage.values()])
    + "\nbring the files back, or remove the folder above it to start anew"
  )


def _move_damaged(directory: Path) -> None:
  if not (steps := ocp.utils.checkpoint_steps(directory)):
    return
  intact, damage = _newest_intact(directory, steps)
  for step in sorted(set(steps) - damage.keys()):
    if what := _damage(directory / str(step), "metrics/"):
      damage[step] = what
  for step, what in damage.items():
    moved = _move_aside(directory / str(step))
    used = f", and step {intact} is used" if step > intact else ""
    warn(f"{what}; the step is now in {moved}{used}")


def _move_aside(step: Path) -> Path:
  aside, number = step.with_name(f"{step.name}.corrupt"), 2
  while aside.exists():
    aside, number = step.with_name(f"{step.name}.corrupt-{number}"), number + 1
  return step.rename(aside)


def _damage(step: Path, prefix: str = "") -> str | None:
  """Says what is damaged, of a step's files whose names begin with prefix."""
  path = step / _NAME
  if not path.exists():
    return None
  try:
    sealed = json.loads(path.read_text())
    if sealed["sha256"] != _sha256_of_json(sealed["files"]):
      return f"{path} is damaged"
  except (ValueError, KeyError, TypeError):
    return f"{path} is damaged"
  for name, want in sealed["files"].items():
    if not name.startswith(prefix):
      continue
    file = step / name
    try:
      if (size := file.stat().st_size) != want["bytes"]:
        return f"{file} has {size} bytes, not {want['bytes']}"
      if files.sha256(file) != want["sha256"]:
        return f"{file} is not as it was written"
    except OSError as error:
      return f"{file} cannot be read: {error}"
  return None


def _sha256_of_json(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
