"""Checkpoints and compositions, on disk or on the hub, as models."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy

from calm_jax.composition import checkpoint, composing, joining
from calm_jax.composition.connections import Composition
from calm_jax.core import files, hub, trees
from calm_jax.core.errors import InputError
from calm_jax.language_model import LanguageModel
from calm_jax.models import decoder, quantisation
from calm_jax.models.hf import loading
from calm_jax.text.tokenizer import find_tokenizer


def load_model(
  path_or_hub_id: str,
  dtype: str = "float32",
  *,
  revision: str | None = None,
  shardings: Callable[[dict], dict] | None = None,
  quantise: str = "",
) -> LanguageModel:
  """Loads a Hugging Face checkpoint: safetensors only, never pickle.

  Args:
    path_or_hub_id: a folder, or an id on the Hugging Face hub.
    dtype: of the parameters and the computation.
    revision: a branch, tag or commit on the hub; its main branch if None.
    shardings: the model's tree of shapes to a tree of `jax.sharding.Sharding`:
      each process then reads what its devices hold. None for one device.
    quantise: "int8" or "int4" for matrices in few bits (docs/quantisation.md).

  Raises:
    InputError: a missing folder, a family or option that is not supported, or
      tensors that are unknown, missing, duplicate, misshapen or truncated.
  """
  source = hub.locate(path_or_hub_id, revision)
  return from_source(source, dtype, shardings, quantise)


def from_source(
  source: hub.Source,
  dtype: str,
  shardings: Callable[[dict], dict] | None = None,
  quantise: str = "",
) -> LanguageModel:
  """`load_model` of a checkpoint that was located."""
  folder = source.folder
  config = loading.load_config(folder).with_compute(dtype=dtype)
  quantisation.check(quantise)
  places = shardings and shardings(
    quantisation.shapes(decoder.param_shapes(config), quantise)
  )
  params = loading.load_params(folder, config, dtype, places, quantise)
  source = source._replace(config=hub.read_json(folder / hub.CONFIG))
  return LanguageModel(
    Composition(config),
    # Unlike jnp.asarray, it takes aligned memory over without a copy.
    jax.tree.map(jax.device_put, params),
    find_tokenizer(folder),
    source.name,
    sources={"anchor": source},
  )


def load_any(
  path_or_hub_id: str | os.PathLike,
  dtype: str | None = None,
  quantise: str | None = None,
  *,
  shardings: Callable[[str], Callable] | None = None,
) -> LanguageModel:
  """`load_composed` or `load_model`, whichever the folder or id is for."""
  if checkpoint.describes_composition(path_or_hub_id):
    return load_composed(
      path_or_hub_id, dtype=dtype, quantise=quantise, shardings=shardings
    )
  return load_model(
    path_or_hub_id,
    dtype or "float32",
    quantise=quantise or "",
    shardings=shardings and shardings("anchor"),
  )


def load_composed(
  path_or_hub_id: str | os.PathLike,
  anchor: str | os.PathLike | None = None,
  augmenting: str | os.PathLike | dict[str, str] | None = None,
  *,
  dtype: str | None = None,
  revision: str | None = None,
  quantise: str | None = None,
  shardings: Callable[[str], Callable] | None = None,
) -> LanguageModel:
  """Loads what `LanguageModel.save` wrote, and the models that it joins.

  Args:
    path_or_hub_id: the composition's folder, or its id on the hub.
    anchor: where the anchor is, if not where it was: a folder or hub id.
    augmenting: the same of the augmenting model, or of some by name.
    dtype: of the frozen models and the computation; as saved if None. Θ_C
      keeps the dtype that it was saved in.
    revision: of the composition on the hub.
    quantise: the frozen models, to "int8" or "int4", or ("") not at all; as
      they were when the composition was saved if None.
    shardings: from "anchor" or "augmenting/<name>" to what `load_model` takes.

  Raises:
    InputError: a folder without a composition, a frozen model that is not
      found, or files that are not those that the composition was trained
      with, named.
  """
  folder = hub.locate(
    path_or_hub_id,
    revision,
    (checkpoint.WEIGHTS, checkpoint.CONFIG, checkpoint.CARD),
  ).folder
  config = checkpoint.read_config(folder)
  places = _places(config, anchor, augmenting)
  loaded = {
    part: _load_part(
      folder,
      part,
      saved,
      places.get(part),
      dtype,
      quantise,
      shardings and shardings(part),
    )
    for part, saved in config["models"].items()
  }
  composed = joining.join_compositions(
    [
      composing.untrained(
        loaded["anchor"],
        {joined["name"]: loaded[f"augmenting/{joined['name']}"]},
        **{k: v for k, v in joined.items() if k != "name"},
      )
      for joined in config["augmenting"]
    ]
  )
  theta = _read_theta(folder, config, composed.params["composition"])
  return dataclasses.replace(
    composed,
    params=composed.params | {"composition": theta},
    origin=str(path_or_hub_id),
  )


def _places(config, anchor, augmenting) -> dict[str, str]:
  """The places that the caller gave, by part."""
  names = [joined["name"] for joined in config["augmenting"]]
  if augmenting is None:
    augmenting = {}
  elif isinstance(augmenting, str | os.PathLike):
    if len(names) != 1:
      raise InputError(f"say which of {names} is at {augmenting}: give a dict")
    augmenting = {names[0]: augmenting}
  if unknown := sorted(augmenting.keys() - set(names)):
    raise InputError(f"no augmenting model {unknown}; there are {names}")
  places = {f"augmenting/{name}": p for name, p in augmenting.items()}
  return places if anchor is None else places | {"anchor": anchor}


def _load_part(
  folder: pathlib.Path,
  part: str,
  saved: dict,
  place,
  dtype: str | None,
  quantise: str | None,
  shardings: Callable | None,
) -> LanguageModel:
  kind, _, name = part.partition("/")
  option = f"{kind}={{{name!r}: FOLDER}}" if name else f"{kind}=FOLDER"
  try:
    if place is None:
      source = hub.locate(saved["name"], saved["revision"])
    else:
      source = hub.locate(place)
  except InputError as error:
    raise InputError(
      f"{folder}: the {part} is not found: {error}\nIf it is elsewhere, say "
      f"where: load_composed(..., {option})"
    ) from error
  _check_hashes(part, saved, source.folder)
  if quantise is None:
    quantise = saved.get("quantise", "")  # Older compositions do not say.
  model = from_source(source, dtype or saved["dtype"], shardings, quantise)
  ours = model.tokenizer and model.tokenizer.fingerprint
  theirs = saved["tokenizer"] and saved["tokenizer"]["fingerprint"]
  if ours != theirs:
    raise InputError(
      f"{source.folder}: the tokenizer is not that of the {part} that the "
      f"composition was trained with (fingerprint {ours}, then {theirs})"
    )
  return model


def _check_hashes(part: str, saved: dict, folder: pathlib.Path) -> None:
  found, expected = checkpoint.hashes(folder), saved["sha256"]
  for name in sorted(expected.keys() | found.keys()):
    if found.get(name) == expected.get(name):
      continue
    if name not in found:
      problem = "is missing"
    elif name not in expected:
      problem = "was not there when the composition was trained"
    else:
      problem = (
        f"has changed: its sha256 is {found[name]}, it was {expected[name]}"
      )
    raise InputError(
      f"{folder / name} {problem}. The {part} must be {saved['name']}"
      + (f" at {saved['revision']}" if saved["revision"] else "")
      + ", to the bit: a composition works with no other"
    )


def _read_theta(folder: pathlib.Path, config, fresh) -> dict[str, Any]:
  path = folder / checkpoint.WEIGHTS
  if not path.exists():
    raise InputError(f"{path} is missing")
  if files.sha256(path) != config["sha256"]:
    raise InputError(
      f"{path} is not what {checkpoint.CONFIG} describes: its sha256 is not "
      f"{config['sha256']}; copy the composition again"
    )
  leaves = safetensors.numpy.load_file(path)
  want = {
    name: jax.ShapeDtypeStruct(
      leaf.shape, leaves[name].dtype if name in leaves else leaf.dtype
    )
    for name, leaf in trees.flatten({"composition": fresh}).items()
  }
  read = trees.unflatten(leaves)
  trees.check_same_structure(read, trees.unflatten(want), str(path))
  return jax.tree.map(jnp.asarray, read["composition"])
