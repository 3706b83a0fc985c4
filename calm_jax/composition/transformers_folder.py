"""A model as a new folder that transformers loads.

A composition's folder brings its own code in PyTorch, `modeling_calm.py`.
"""

import functools
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from calm_jax.composition import checkpoint, hf_checkpoint
from calm_jax.composition.model import Model
from calm_jax.core import files, hub, trees
from calm_jax.core.errors import InputError, check_folder, check_int
from calm_jax.models.hf import export

MODELING = pathlib.Path(__file__).with_name("modeling_calm.py")
_OPTIONS = ("connections", "visibility", "norm", "positions", "output_scale")
# Keys of a config.json that the composition's own say, or that are of code.
_LEFT_OUT = ("dtype", "torch_dtype", "auto_map", "_name_or_path")


def export_hf(
  model: Model,
  folder: str | os.PathLike,
  max_shard_size: int = export.MAX_SHARD_SIZE,
  *,
  references: bool = False,
) -> None:
  """Writes a model as a new folder that transformers loads.

  A single model keeps the config.json and tokenizer files that it was loaded
  with; one that was not loaded from a checkpoint is written as a Llama. A
  composition has its anchor's, and is loaded by
  `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

  Args:
    folder: must not hold a model yet.
    max_shard_size: bytes of tensors in one file, unless one alone is larger.
    references: write of a composition's frozen models only where they are and
      their hashes, and no tokenizer, so that the folder is as large as Θ_C.

  Raises:
    InputError: the model is quantised, or its parameters are not those of its
      config.json; the folder holds a model; `modeling_calm.py` does not compute
      what the composition does, which is named; or a model to refer to was not
      loaded from a checkpoint.
  """
  if not model.is_composed:
    if references:
      raise InputError("references=True is for compositions")
    return hf_checkpoint.export_hf(model, folder, max_shard_size)
  folder = check_folder("folder", folder)
  max_shard_size = check_int("max_shard_size", max_shard_size, 1)
  export.check_new(folder)
  dtype = _check(model)
  names = ["anchor", *(f"augmenting/{n}" for n, _ in model.spec.augmenting)]
  sources, text_files = [], hf_checkpoint.text_files(model)
  if references:
    described = [checkpoint.describe(model, name, folder) for name in names]
    keys = ("name", "revision", "sha256")
    sources = [{key: source[key] for key in keys} for source in described]
    # A tokenizer's files may be larger than Θ_C.
    text_files = {n: p for n, p in text_files.items() if n == hub.GENERATION}
  anchor, *augmenting = (hf_checkpoint.tensors(model.part(n)) for n in names)
  values = _connection_tensors(model)
  if not references:
    values |= _frozen_tensors(anchor, augmenting)
  folder.mkdir(parents=True, exist_ok=True)
  hf_checkpoint.copy_text_files(model, text_files, folder)
  if model.tokenizer and hub.GENERATION not in text_files:
    stop_ids = list(model.tokenizer.stop_ids)
    files.write_json(folder / hub.GENERATION, {"eos_token_id": stop_ids})
  shutil.copyfile(MODELING, folder / MODELING.name)
  made = export.Tensors(
    _config_json(model, anchor, augmenting) | {"sources": sources},
    {name: shape for name, (shape, _) in values.items()},
    dtype,
    lambda name: values[name][1]().astype(dtype, copy=False),
  )
  export.write(folder, made, max_shard_size)


def _frozen_tensors(
  anchor: export.Tensors, augmenting: list[export.Tensors]
) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
  """The models' tensors by name: (shape, what reads the value)."""
  parts = {"anchor": anchor}
  for number, part in enumerate(augmenting):
    parts[f"augmenting.{number}.model"] = part.backbone()
  return {
    f"{prefix}.{name}": (shape, functools.partial(part.value, name))
    for prefix, part in parts.items()
    for name, shape in part.shapes.items()
  }


def _config_json(
  model: Model, anchor: export.Tensors, augmenting: list[export.Tensors]
) -> dict[str, Any]:
  """Returns the fields of `modeling_calm.CalmConfig`, but for `sources`."""

  def settings(part):
    return {k: v for k, v in part.config_json.items() if k not in _LEFT_OUT}

  joined = []
  for part, (name, one) in zip(augmenting, model.spec.augmenting, strict=True):
    options = {option: getattr(one, option) for option in _OPTIONS}
    joined.append({"name": name, "config": settings(part), **options})
  return {
    "architectures": ["CalmForCausalLM"],
    "model_type": "calm",
    "auto_map": {
      "AutoConfig": "modeling_calm.CalmConfig",
      "AutoModelForCausalLM": "modeling_calm.CalmForCausalLM",
    },
    "dtype": anchor.dtype,
    "anchor": settings(anchor),
    "augmenting": joined,
    "norm_eps": model.spec.anchor.norm_eps,
  }


def _check(model: Model) -> str:
  """Returns the dtype of all models of a composition.

  Raises InputError for what `modeling_calm.py` does not compute.
  """
  dtypes = {model.spec.anchor.compute.dtype}
  for name, joined in model.spec.augmenting:
    dtypes.add(joined.config.compute.dtype)
    problem = ""
    if name in model.tokenizers:
      problem = (
        "has other tokens than the anchor, and transformers gives a model ids "
        "of one tokenizer only"
      )
    elif joined.visibility == "encoder":
      problem = (
        "has visibility='encoder', but transformers does not tell a model "
        "where prompts end"
      )
    elif joined.control != "none":
      problem = f"has control={joined.control!r}, which is for experiments here"
    if problem:
      raise InputError(
        f"augmenting model {name!r} {problem}: this composition runs in "
        "calm_jax only; save() keeps it, and part('anchor').export_hf(FOLDER) "
        "exports one of its models"
      )
  if len(dtypes) > 1:
    raise InputError(
      f"the models are of {sorted(dtypes)}, a folder for transformers is of "
      "one: load them with the same dtype"
    )
  return dtypes.pop()


def _connection_tensors(
  model: Model,
) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
  """Returns Θ_C under the names of `modeling_calm.py`: shapes and values."""
  tensors = {}
  for number, (name, _) in enumerate(model.spec.augmenting):
    for path, leaf in trees.flatten(model.params["composition"][name]).items():
      connection, module, kind = path.split("/")
      array = np.asarray(leaf)
      array = array.T if kind == "kernel" else array
      prefix = f"augmenting.{number}.connections.{connection}"
      value = functools.partial(np.asarray, array)
      tensors[f"{prefix}.{module}.weight"] = array.shape, value
  return tensors
