"""The checkpoints of the models that a composition joins.

A saved composition names them and the hashes of their files; they are found
where they are when it is loaded, also after the folder of a run was moved.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax.composition import gguf_files
from calm_jax.core import files, hub
from calm_jax.core.errors import InputError, check_type
from calm_jax.models.hf import weight_files

Location = str | os.PathLike  # a folder, or an id on the hub

_REMEDY = (
  "If it is elsewhere, say where: to a command by --anchor=FOLDER and "
  "--augmenting=FOLDER (of several NAME=FOLDER,NAME=FOLDER), in Python by "
  "load_composed(..., anchor=FOLDER, augmenting=FOLDER)"
)


def name(source: hub.CheckpointRef, folder: pathlib.Path | None) -> str:
  """Returns what a composition in `folder` calls a model: a hub id or a path.

  It is relative to the folder for models beside it or in folders there, so that
  a run can be moved. Without the folder it is the path's last name.
  """
  if source.revision is not None:
    return source.name
  path = pathlib.Path(os.path.abspath(source.folder))
  if folder is None:
    return path.resolve().name
  if path.is_relative_to(pathlib.Path(os.path.abspath(folder)).parent):
    return os.path.relpath(path, folder)
  return str(path.resolve())


def by_name(locations: str, name: str = "[^/=,]+") -> dict[str, str]:
  """Reads "NAME=FOLDER,NAME=FOLDER"; nothing of a text that is not that.

  `name` is a regex of the names.
  """
  start, *given = re.split(rf"(?:^|,)({name})=", locations)
  return {} if start else dict(zip(given[::2], given[1::2], strict=True))


def hashes(folder: pathlib.Path) -> dict[str, str]:
  """Returns the sha256, by name, of the files that make a model's weights."""
  paths = [folder / hub.CONFIG, *weight_files.weight_files(folder)]
  return {path.name: files.sha256(path) for path in paths}


def find(
  folder: pathlib.Path,
  config: dict[str, Any],
  anchor: Location | None,
  augmenting: Location | Mapping[str, Location] | None,
  patterns: Sequence[str] = (),
) -> dict[str, hub.CheckpointRef]:
  """Finds a composition's models: by "anchor" and "augmenting/<name>".

  Downloads what they need, or only files of the patterns; for the other
  arguments see `language_model.load_composed`. InputError names all that are
  not found, and what says where they are.
  """
  locations = _locations(config, anchor, augmenting)
  sources, missing = {}, {}
  for part, saved in config["models"].items():
    location = locations.get(part)
    revision = saved["revision"] if location is None else None
    if location is None:
      location = _place(folder, saved, config.get("folder"))
    try:
      sources[part] = gguf_files.locate(location, revision, patterns)
    except InputError as error:
      missing[part] = error
  if missing:
    lines = [f"\n  {part}: {error}" for part, error in missing.items()]
    raise InputError(
      f"{folder}: the composition's models are not found:{''.join(lines)}\n"
      f"{_REMEDY}"
    )
  return sources


def check(folder: pathlib.Path, part: str, config: dict[str, Any]) -> None:
  """Raises InputError unless a model's files are those of the training."""
  saved = config["models"][part]
  ours, theirs = hashes(folder), saved["sha256"]
  for name in sorted(theirs.keys() | ours.keys()):
    if name not in ours:
      problem = "is missing"
    elif name not in theirs:
      problem = "was not there when the composition was trained"
    elif ours[name] != theirs[name]:
      problem = f"has changed: its sha256 is {ours[name]}, not {theirs[name]}"
    else:
      continue
    revision = f" at {saved['revision']}" if saved["revision"] else ""
    raise InputError(
      f"{folder / name} {problem}. The {part} must be {saved['name']}"
      f"{revision}, to the bit: a composition works with no other. {_REMEDY}"
    )


def _locations(
  config: dict[str, Any],
  anchor: Location | None,
  augmenting: Location | Mapping[str, Location] | None,
) -> dict[str, Location]:
  """The folders or hub ids that the caller gave, by part."""
  names = [joined["name"] for joined in config["augmenting"]]
  if augmenting and isinstance(augmenting, Location):
    known = "|".join(map(re.escape, names))
    if given := by_name(str(augmenting), known):
      augmenting = given
    elif len(names) == 1:
      augmenting = {names[0]: augmenting}
    else:
      example = ",".join(f"{name}=FOLDER" for name in names)
      raise InputError(
        f"say which of {names} is at {augmenting}, by {example} or a dict"
      )
  if augmenting:
    advice = "give a folder, a hub id, or a dict of them by name"
    check_type("augmenting", augmenting, Mapping, advice)
  locations = {"anchor": anchor} if anchor else {}
  named = augmenting if isinstance(augmenting, Mapping) else {}
  for name, location in named.items():
    if name not in names:
      raise InputError(f"no augmenting model {name!r}; there are {names}")
    locations[f"augmenting/{name}"] = location
  return locations


def _place(
  folder: pathlib.Path, saved: dict[str, Any], old_folder: str | None
) -> str:
  """Says where a saved model should be: its hub id, or its folder of now."""
  name = saved["name"]
  if saved["revision"] is not None:
    return name
  # Moved with the run, through a link into it, or alone.
  bases = [os.path.abspath(folder), os.path.realpath(folder), old_folder or ""]
  places = [os.path.normpath(os.path.join(base, name)) for base in bases]
  for place in places:
    if os.path.isdir(place):
      return place
  # An absolute path in a run that was moved, as earlier versions wrote it: the
  # end of it may lie beside the composition. That is a guess, so it is checked.
  parts = pathlib.Path(name).parts
  for start in range(len(parts)):
    place = folder.absolute().parent.joinpath(*parts[start:])
    described = place / hub.CONFIG
    if described.is_file() and (
      files.sha256(described) == saved["sha256"][hub.CONFIG]
    ):
      return str(place)
  return places[0]
