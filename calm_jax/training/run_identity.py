"""Run identity: refuses to resume a run of other settings, data or models.

It is saved with each checkpoint, and in `complete.json` of a finished stage.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from calm_jax.composition import forward
from calm_jax.composition.connections import Composition
from calm_jax.core import files, trees
from calm_jax.core.errors import InputError, StorageError
from calm_jax.parallel import processes
from calm_jax.training.stage import Stage

_FORMAT = 2  # Changes when runs of earlier versions cannot be resumed.
# How often something is written changes no weight, and what augmenting_length
# changes is in the fingerprint of the data.
_NOT_IDENTITY = (
  "log_every", "checkpoint_every", "eval_every", "keep_last", "keep_best",
  "augmenting_length",
)  # fmt: skip


def describe(
  stage: Stage,
  spec: Composition,
  params: dict,
  frozen: trees.Tree,
  origins: Mapping[str, str],
  seed: int,
  fingerprint: str,
) -> dict[str, Any]:
  """Everything that the trained leaves depend on, as JSON.

  Each model's leaves in `frozen`, those of `params` that are not trained, are
  hashed; `origins` says where a model came from, by "anchor" or
  "augmenting/<name>". The fingerprint is the data's.
  """
  settings = dataclasses.asdict(stage)
  for name in _NOT_IDENTITY:
    del settings[name]
  # Runs of earlier versions do not name it, and can be resumed.
  if stage.optimizer == Stage.optimizer:
    del settings["optimizer"]
  part, _ = forward.submodel(spec, params, stage.model)
  all_leaves, models = trees.flatten(frozen).items(), {}
  for name in ["anchor", *(f"augmenting/{n}" for n in params["augmenting"])]:
    leaves = {n: x for n, x in all_leaves if n.startswith(f"{name}/")}
    if leaves and stage.model in ("composed", name):
      models[name] = {
        "origin": origins.get(name, "trained by this run"),
        "sha256": trees.fingerprint(leaves, processes.fetch),
      }
  settings |= {"seed": seed, "source": fingerprint, "spec": _architecture(part)}
  return files.to_json(
    {"format": _FORMAT, "frozen": models, "settings": settings}
  )


def check(saved: dict, current: dict, directory: Path) -> None:
  """Raises InputError unless a directory's identity is the run's."""
  if saved.get("format") != _FORMAT:
    raise InputError(
      f"{directory} holds a run of another version of calm_jax, which this "
      "version cannot resume: choose another --config.workdir, remove that "
      "folder, or end the run with the version that began it"
    )
  old, new = (trees.flatten(identity, ".") for identity in (saved, current))
  lines = [
    f"\n  {key}: was {old.get(key)}, is {new.get(key)}"
    for key in sorted(old | new)
    if old.get(key) != new.get(key)
  ]
  if lines:
    raise InputError(
      f"{directory} holds a run that differs in{''.join(lines)}\nchoose "
      "another --config.workdir, or remove that folder"
    )


def mark_complete(directory: Path, **mark: Any) -> None:
  """Marks a stage as finished: step, seconds and identity, once it is saved."""
  if jax.process_index() == 0:
    files.write_json(directory / "complete.json", mark)


def remove_mark(directory: Path) -> None:
  """Undoes `mark_complete`."""
  if jax.process_index() == 0:
    (directory / "complete.json").unlink(missing_ok=True)


def completion(directory: Path) -> dict[str, Any] | None:
  """Reads what `mark_complete` wrote; None for a stage that is not finished."""
  path = directory / "complete.json"
  if not path.exists():
    return None
  try:
    return files.read_json(path)
  except InputError as error:
    raise StorageError(
      f"{path} is damaged ({error}); remove it, and the stage goes on from its "
      "newest checkpoint"
    ) from error


def _architecture(spec: Composition) -> dict[str, Any]:
  """The fields of all configs; of how they are computed the dtype only."""
  # `asdict` would copy a mesh.
  spec = spec.with_compute(lambda part: {"place": None})
  fields: dict[str, Any] = dataclasses.asdict(spec)
  joined = fields["augmenting"] = dict(fields["augmenting"])
  for config in (fields["anchor"], *(x["config"] for x in joined.values())):
    config["compute"] = {"dtype": config["compute"]["dtype"]}
  return fields
