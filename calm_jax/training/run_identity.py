"""What a run is, so that no other run goes on where it stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from calm_jax.composition import forward
from calm_jax.core import files, trees
from calm_jax.core.errors import InputError
from calm_jax.models.config import Compute
from calm_jax.parallel import processes


def describe(stage, spec, params, frozen, origins, seed, source) -> dict:
  """What a checkpoint depends on besides the saved leaves; JSON."""
  part, _ = forward.alone(spec, params, stage.model)
  # A run may be resumed with another kernel, remat, loss chunk or mesh, but not
  # in another dtype or with another number of unrolled layers.
  default = Compute()
  resumable = ("attention", "remat", "loss_chunk", "place")
  part = part.with_compute(
    lambda _: {name: getattr(default, name) for name in resumable}
  )
  settings = dataclasses.asdict(stage) | {
    "seed": seed, "source": source.fingerprint, "spec": repr(part)
  }  # fmt: skip
  # How often something is written changes no weight, and what
  # augmenting_length changes is in the source.
  for key in (
    "log_every", "checkpoint_every", "eval_every", "keep_last", "keep_best",
    "augmenting_length",
  ):  # fmt: skip
    del settings[key]
  models = {}
  for name in ["anchor", *(f"augmenting/{n}" for n in params["augmenting"])]:
    leaves = {
      leaf: x
      for leaf, x in trees.flatten(frozen).items()
      if leaf.startswith(f"{name}/")
    }
    if leaves and stage.model in ("composed", name):
      models[name] = {
        "origin": origins.get(name, "trained by this run"),
        "sha256": trees.fingerprint(leaves, processes.fetch),
      }
  return {"frozen": models, "settings": settings}


def check(saved: dict, current: dict, directory: Path) -> None:
  """Raises InputError unless a directory holds the run that is asked for."""
  # JSON has no tuples.
  old, new = (trees.flatten(files.to_json(x), ".") for x in (saved, current))
  odd = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
  if odd:
    lines = [f"  {k}: was {old.get(k)}, is {new.get(k)}" for k in odd]
    raise InputError(
      f"{directory} holds a run that differs in\n"
      + "\n".join(lines)
      + "\nchoose another --config.workdir, or remove that folder"
    )
