"""The files of a checkpoint: their checksums, and what is wrong with them.

`checksums.json` is written into a step before the rename that makes the step
complete, so that each complete step has one. It holds a checksum of itself.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

_NAME = "checksums.json"
_CHUNK = 1 << 22
# Orbax changes these in or after the step's completion, and needs neither.
_UNCHECKED = ("_CHECKPOINT_METADATA", "commit_success.txt")


def seal(step: epath.Path) -> None:
  """Writes the checksums of all files of a step."""
  files = {
    name: {"bytes": path.stat().length, "sha256": _sha256(path)}
    for name, path in sorted(_walk(step))
  }
  sealed = {"files": files, "sha256": _of_json(files)}
  (step / _NAME).write_text(json.dumps(sealed, indent=1) + "\n")


def problem(step: epath.Path, prefix: str = "") -> str | None:
  """What is wrong with the files of a complete step; None if nothing is.

  Only files whose names, within the step, start with the prefix are read.

  A step without checksums, of an earlier version, is said to be good.
  """
  path = step / _NAME
  if not path.exists():
    return None
  try:
    sealed = json.loads(path.read_text())
    files: Mapping[str, Any] = sealed["files"]
    intact = sealed["sha256"] == _of_json(files)
  except (ValueError, KeyError, TypeError):
    intact = False
  if not intact:
    return f"{path} is damaged"
  for name, want in files.items():
    if not name.startswith(prefix):
      continue
    file = step / name
    try:
      size = file.stat().length
      if size != want["bytes"]:
        return f"{file} has {size} bytes, not {want['bytes']}"
      if _sha256(file) != want["sha256"]:
        return f"{file} is not as it was written"
    except OSError as error:
      return f"{file} cannot be read: {error}"
  return None


def is_sealed(step: epath.Path) -> bool:
  """Whether there are checksums to compare with."""
  return (step / _NAME).exists()


def move_aside(step: epath.Path) -> epath.Path:
  """Renames a step to `<step>.corrupt`, or with a number if that exists."""
  for number in itertools.count(1):
    suffix = ".corrupt" if number == 1 else f".corrupt-{number}"
    aside = step.with_name(step.name + suffix)
    if not aside.exists():
      return step.rename(aside)


def _walk(folder: epath.Path, prefix: str = ""):
  for path in folder.iterdir():
    name = f"{prefix}{path.name}"
    if path.is_dir():
      yield from _walk(path, f"{name}/")
    elif path.name not in _UNCHECKED:
      yield name, path


def _sha256(path: epath.Path) -> str:
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def _of_json(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
