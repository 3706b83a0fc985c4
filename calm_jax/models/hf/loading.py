"""Loads checkpoints in Hugging Face's format: all of a tree, or an error."""

import itertools
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from calm_jax.core import hub, trees
from calm_jax.core.errors import InputError, check_choice
from calm_jax.models import decoder, quantisation
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families, leaves, tensor_reader, tensor_tables
from calm_jax.models.hf.tensor_tables import EMBEDDING, HEAD, Entry, TensorTable
from calm_jax.models.hf.weight_files import FLOATS, Tensor, open_tensors

DTYPES = ("float32", "bfloat16", "float64")
_SHOWN = 8


def load_config(
  folder: str | os.PathLike, ignore: Collection[str] = ()
) -> ModelConfig:
  """Reads config.json as if it had none of the keys in `ignore`.

  Raises InputError if it is missing, no JSON, or no model computed here.
  """
  folder = pathlib.Path(folder)
  config_json = hub.read_config(folder, ignore)
  try:
    return families.from_hf(config_json)
  except InputError as error:
    raise InputError(f"{folder / hub.CONFIG}: {error}") from error


def load_params(
  folder: str | os.PathLike,
  config: ModelConfig,
  dtype: str = "float32",
  shardings: Mapping[str, Any] | None = None,
  quantise: str = "",
) -> dict[str, Any]:
  """Reads the weights, piece by piece into the stacked arrays.

  The files are neither mapped nor read whole: the process holds the arrays and
  a few megabytes.

  Args:
    folder: holds config.json and model.safetensors, or shards and their index.
    config: the result of `load_config`.
    dtype: one of DTYPES.
    shardings: a tree of `jax.sharding.Sharding`s like the result. Each process
      then reads only what its devices hold, leaf by leaf.
    quantise: one of `quantisation.KINDS`. Matrices are quantised from float32,
      whatever the dtype, a few layers at a time.

  Returns:
    The tree of `decoder.param_shapes(config)`, or of what `quantisation.shapes`
    makes of it: numpy arrays, which `jax.device_put` takes over without a copy
    on a CPU; with shardings `jax.Array`s.

  Raises:
    InputError: as `open_model`; shardings of another tree, or of float64 while
      JAX has it disabled.
  """
  check_choice("dtype", dtype, DTYPES)
  quantisation.check(quantise)
  stored = open_model(pathlib.Path(folder), config)
  shapes = decoder.param_shapes(config)
  kept = trees.flatten(quantisation.shapes(shapes, quantise))
  plain = [name for name in stored.shapes if name in kept]
  places, groups = None, [plain]
  if shardings is not None:
    places = trees.flatten(shardings)
    if places.keys() != kept.keys():
      raise InputError(
        "shardings are not of the model's leaves; they differ in "
        f"{sorted(places.keys() ^ kept.keys())[:_SHOWN]}"
      )
    # pyrefly: ignore [missing-attribute]  # JAX defines its options by name.
    if dtype == "float64" and not jax.config.jax_enable_x64:
      raise InputError("dtype='float64' needs jax_enable_x64")
    # Leaf after leaf, each of which is then released on the host.
    groups = [[name] for name in plain]
  arrays: dict[str, leaves.Array] = {}
  for names in groups:
    arrays |= leaves.read(stored, names, dtype, places)
  for name in stored.shapes:
    if name not in kept:
      arrays |= leaves.read_quantised(stored, name, quantise, places)
  return trees.unflatten({name: arrays[name] for name in kept})


def changed_leaf(
  folder: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any]
) -> str | None:
  """Returns the first leaf that differs from the folder's, None if none does.

  One leaf at a time is held besides the parameters. Raises as `load_params`.
  """
  stored = open_model(pathlib.Path(folder), config)
  kind, rest = quantisation.kind_of(params), dict(trees.flatten(params))
  for name in stored.shapes:
    if name in rest:
      arrays = leaves.read(stored, [name], rest[name].dtype)
    elif kind:
      arrays = leaves.read_quantised(stored, name, kind)
    else:
      return name
    for part, array in arrays.items():
      leaf = rest.pop(part, None)
      if leaf is None or array.tobytes() != np.asarray(leaf).tobytes():
        return part
  return next(iter(rest), None)


def open_model(folder: pathlib.Path, config: ModelConfig) -> leaves.StoredModel:
  """Opens a checkpoint whose tensors and leaves are one to one.

  Raises:
    InputError: weights are missing, pickled or corrupt; a tensor is unknown,
      missing, misshapen, not of floats or twice there; or the head of a tied
      model differs from its embedding.
  """
  table = tensor_tables.tensor_table(hub.read_config(folder))
  entries = tensor_tables.entries(table, config)
  tensors = tensor_tables.canonical(table, open_tensors(folder))
  if config.tie_embeddings:
    _drop_tied_head(folder, table, tensors)
  shapes = tensor_tables.leaf_shapes(config)
  problems = _problems(table, tensors, entries, shapes)
  if problems:
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    if len(problems) > _SHOWN:
      shown += f"\n  and {len(problems) - _SHOWN} more"
    raise InputError(
      f"the tensors of {folder} do not fit its {hub.CONFIG}:{shown}"
    )
  by_leaf: dict[str, list[Entry]] = {name: [] for name in shapes}
  for entry in itertools.chain(*entries.values()):
    by_leaf[entry.leaf].append(entry)
  return leaves.StoredModel(tensors, by_leaf, shapes)


def _problems(
  table: TensorTable,
  tensors: Mapping[str, Tensor],
  entries: Mapping[str, list[Entry]],
  shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
  """Why tensors and leaves are not one to one, a line for each tensor."""

  def places(name):
    parts = (f"{e} {list(shapes[e.leaf][len(e.at) :])}" for e in entries[name])
    return " and ".join(dict.fromkeys(parts))

  problems = []
  for name, tensor in tensors.items():
    if name not in entries:
      if not table.is_ignored(name):
        reason = tensor_tables.absent(table, entries, name)
        problems.append(f"unknown: {tensor} {reason}")
    elif tensor.shape != entries[name][0].shape:
      problems.append(
        f"misshapen: {tensor} for {places(name)}, which is "
        f"{list(entries[name][0].shape)} there"
      )
    elif tensor.dtype not in FLOATS:
      kind = f"{tensor.dtype}; quantized weights are not supported"
      problems.append(f"not floats: {tensor} for {places(name)} is {kind}")
  for name in sorted(set(entries) - set(tensors)):
    shape = list(entries[name][0].shape)
    problems.append(f"missing: {name} {shape} for {places(name)}")
  return problems


def _drop_tied_head(
  folder: pathlib.Path, table: TensorTable, tensors: dict[str, Tensor]
) -> None:
  """Drops the head of a tied model, which may be written out once more."""
  names = {leaf: name for name, [leaf, *_] in table.tensors().items()}
  head = tensors.pop(names[HEAD], None)
  embedding = tensors.get(names[EMBEDDING])
  if head is None or embedding is None:
    return
  if not tensor_reader.same(head, embedding):
    raise InputError(
      f"{folder}: {hub.CONFIG} ties the head, but {head} differs from "
      f"{embedding}; if it is a matrix of its own, set tie_word_embeddings to "
      "false there"
    )
