"""Checkpoints in Hugging Face's format: read strictly, written back.

A tensor without a leaf, or a leaf without a tensor, is an error and never a
model that is almost right.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.core.hub import CONFIG, read_json
from calm_jax.models import decoder, quantisation
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families, reading, safetensors, tensors
from calm_jax.models.hf.safetensors import FLOATS, INDEX, WEIGHTS, Tensor
from calm_jax.models.hf.weight_files import open_tensors

DTYPES = ("float32", "bfloat16", "float64")
MAX_SHARD_SIZE = 5 * 10**9
_SHOWN = 8


def load_config(folder: str | os.PathLike) -> ModelConfig:
  """Reads config.json.

  Raises:
    InputError: it is missing, not JSON, or asks for what is not computed here.
  """
  path = pathlib.Path(folder) / CONFIG
  read = read_json(path)
  try:
    return families.from_hf(read)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error


def _raise_all(folder: pathlib.Path, problems: list[str]) -> None:
  if not problems:
    return
  shown = "".join(f"\n  {p}" for p in problems[:_SHOWN])
  more = len(problems) - _SHOWN
  raise InputError(
    f"the tensors of {folder} do not fit its {CONFIG}:{shown}"
    + (f"\n  and {more} more" if more > 0 else "")
  )


def _place(entry: tensors.Entry) -> str:
  return f"{entry} {list(reading.view_shape(entry))}"


def _check(
  folder: pathlib.Path,
  family: tensors.Family,
  config: ModelConfig,
  found: dict[str, Tensor],
  entries: dict[str, list[tensors.Entry]],
) -> None:
  """Raises InputError unless tensors and leaves are one to one."""
  problems = []
  for name, tensor in found.items():
    if name in entries:
      places = " and ".join(map(_place, entries[name]))
      expected = entries[name][0].shape
      if tensor.shape != expected:
        problems.append(
          f"misshapen: {tensor} for {places}, which is {list(expected)} there"
        )
      elif tensor.dtype not in FLOATS:
        problems.append(
          f"not floats: {tensor} for {places} is {tensor.dtype}; "
          "quantized weights are not supported"
        )
    elif not tensors.ignored(family, name):
      problems.append(
        f"unknown: {tensor} {tensors.absent(family, config, name)}"
      )
  for name in sorted(set(entries) - set(found)):
    places = " and ".join(map(_place, entries[name]))
    shape = list(entries[name][0].shape)
    problems.append(f"missing: {name} {shape} for {places}")
  _raise_all(folder, problems)


def _take_tied_head(
  folder: pathlib.Path,
  family: tensors.Family,
  config: ModelConfig,
  found: dict[str, Tensor],
) -> None:
  """Drops the head of a tied model, which may be written out once more."""
  untied = dataclasses.replace(config, tie_embeddings=False)
  names = {
    entry.leaf: entry.tensor for entry in tensors.entries(family, untied)
  }
  head = found.pop(names[tensors.HEAD], None)
  embedding = found.get(names[tensors.EMBEDDING])
  if head is None or embedding is None:
    return
  if not safetensors.same(head, embedding):
    raise InputError(
      f"{folder}: {CONFIG} says that head and embedding are tied, but {head} "
      f"differs from {embedding} ({tensors.EMBEDDING}); set "
      "tie_word_embeddings to false there if the head is a matrix of its own"
    )


def _by_tensor(
  family: tensors.Family, config: ModelConfig
) -> dict[str, list[tensors.Entry]]:
  entries: dict[str, list[tensors.Entry]] = {}
  for entry in tensors.entries(family, config):
    entries.setdefault(entry.tensor, []).append(entry)
  return entries


def _family(read: Mapping[str, Any], path: pathlib.Path) -> tensors.Family:
  name = read.get("model_type")
  if name not in tensors.FAMILIES:
    raise InputError(
      f"{path}: model_type={name!r} is not supported; known: "
      f"{sorted(tensors.FAMILIES)}"
    )
  return tensors.FAMILIES[name]


def _open(folder: pathlib.Path, config: ModelConfig):
  """All tensors by name, and what each leaf is made of; nothing is read."""
  family = _family(read_json(folder / CONFIG), folder / CONFIG)
  entries = _by_tensor(family, config)
  found = tensors.canonical(family, open_tensors(folder))
  if config.tie_embeddings:
    _take_tied_head(folder, family, config, found)
  _check(folder, family, config, found, entries)
  parts: dict[str, list[tensors.Entry]] = {}
  for entry in itertools.chain(*entries.values()):
    parts.setdefault(entry.leaf, []).append(entry)
  return found, parts


def load_params(
  folder: str | os.PathLike,
  config: ModelConfig,
  dtype: str = "float32",
  shardings: Mapping[str, Any] | None = None,
  quantise: str = "",
) -> dict[str, Any]:
  """Reads the weights, piece by piece into the stacked arrays.

  The files are neither mapped nor read whole: what is held is the arrays and
  a few megabytes.

  Args:
    folder: holds config.json and model.safetensors, or its shards and
      model.safetensors.index.json.
    config: what `load_config` read there.
    dtype: of the arrays: "float32", "bfloat16" or "float64".
    shardings: a `jax.sharding.Sharding` for each leaf of
      the result, in a tree of the same structure. Each process then reads only
      what its devices hold, leaf by leaf.
    quantise: one of `quantisation.KINDS`: "" for none, "int8" or "int4".
      Quantised from float32, whatever the dtype, and a few layers at a time.

  Returns:
    The tree of `decoder.param_shapes(config)`, or of what `quantisation.shapes`
    makes of it: numpy arrays, which `jax.device_put` takes over without a copy
    on a CPU; with shardings `jax.Array`s.

  Raises:
    InputError: weights that are missing, pickled, corrupt or quantized; a
      tensor that is unknown, missing, twice there or misshapen; the head of a
      tied model that differs from its embedding; shardings of another tree;
      float64 arrays while JAX has them disabled.
  """
  if dtype not in DTYPES:
    raise InputError(f"dtype={dtype!r} is none of {DTYPES}")
  quantisation.check(quantise)
  found, parts = _open(pathlib.Path(folder), config)
  shapes = trees.flatten(decoder.param_shapes(config))
  kept = trees.flatten(
    quantisation.shapes(decoder.param_shapes(config), quantise)
  )
  if shardings is None:
    leaves = {
      name: safetensors.empty(leaf.shape, dtype)
      for name, leaf in shapes.items()
      if name in kept
    }
    safetensors.read_all(
      read
      for name, leaf in leaves.items()
      for read in reading.reads(found, parts[name], leaf, (0,) * leaf.ndim)
    )
    for name in shapes.keys() - leaves.keys():
      shape = shapes[name].shape
      leaves[name] = reading.quantised(
        found, parts[name], name, shape, quantise
      )
    return trees.unflatten({name: leaves[name] for name in shapes})
  places = trees.flatten(shardings)
  if places.keys() != kept.keys():
    raise InputError(
      "shardings are not of the model's leaves; they differ in "
      f"{sorted(places.keys() ^ kept.keys())[:_SHOWN]}"
    )
  if dtype == "float64" and not jax.config.jax_enable_x64:
    raise InputError("dtype='float64' needs jax_enable_x64")
  leaves = {}
  for name, leaf in shapes.items():
    if name in kept:
      leaves[name] = reading.sharded(
        found, parts[name], leaf.shape, dtype, places[name]
      )
      continue
    place = {
      n.removeprefix(f"{name}/"): p
      for n, p in places.items()
      if n.startswith(f"{name}/")
    }
    # Cut as what is made of it will be.
    [cut] = [p for part, p in place.items() if part != "scale"]
    whole = reading.sharded(found, parts[name], leaf.shape, "float32", cut)
    make = functools.partial(quantisation.of_leaf, name, kind=quantise)
    made = jax.jit(make, out_shardings=place)(whole)
    leaves[name] = jax.block_until_ready(made)
  return trees.unflatten(leaves)


def changed_leaf(
  folder: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any]
) -> str | None:
  """The first leaf that is not what the folder holds, None if there is none.

  One leaf at a time is held besides the parameters. Raises what `load_params`
  raises.
  """
  found, parts = _open(pathlib.Path(folder), config)
  kind, leaves = quantisation.kind_of(params), dict(trees.flatten(params))
  for name, shape in trees.flatten(decoder.param_shapes(config)).items():
    if name in leaves:
      stored = safetensors.empty(shape.shape, leaves[name].dtype)
      reads = reading.reads(found, parts[name], stored, (0,) * stored.ndim)
      safetensors.read_all(reads)
      stored = {name: stored}
    elif not kind:
      return name
    else:
      made = reading.quantised(found, parts[name], name, shape.shape, kind)
      stored = {f"{name}/{part}": x for part, x in made.items()}
    for kept, x in stored.items():
      leaf = leaves.pop(kept, None)
      if leaf is None or x.tobytes() != np.asarray(leaf).tobytes():
        return kept
  return next(iter(leaves), None)


def save_params(
  folder: str | os.PathLike,
  config: ModelConfig,
  params: Mapping[str, Any],
  config_json: Mapping[str, Any] | None = None,
  max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
  """Writes a checkpoint that transformers and `load_params` read.

  Parameters keep their dtype and value, bit for bit. Tensor by tensor: what
  is held besides the parameters is one of them. config.json is written last: a
  folder that has one is complete. Tokenizer files are not written.

  Args:
    folder: is created; must not hold a checkpoint yet.
    config: the architecture; `compute` is not kept.
    params: the tree of `decoder.param_shapes(config)`, of one dtype.
    config_json: the config.json to write, whose family says how the tensors
      are called; a Llama's made from `config` if None.
    max_shard_size: bytes of tensors in one file, unless a single one is
      larger.

  Raises:
    InputError: the folder holds weights already, the tree is not that of
      the config, or config_json describes another model.
  """
  folder = pathlib.Path(folder)
  for name in (CONFIG, WEIGHTS, INDEX):
    if (folder / name).exists():
      raise InputError(
        f"{folder} holds a model already ({name}); give another folder"
      )
  leaves = trees.flatten(params)
  expected = trees.flatten(decoder.param_shapes(config))
  ours = {name: tuple(np.shape(leaf)) for name, leaf in leaves.items()}
  theirs = {name: leaf.shape for name, leaf in expected.items()}
  if ours != theirs:
    raise InputError(
      "the parameters are not those of the config; only in the parameters: "
      f"{sorted(ours.items() - theirs.items())[:_SHOWN]}, only in the config: "
      f"{sorted(theirs.items() - ours.items())[:_SHOWN]}"
    )
  dtypes = {str(leaf.dtype) for leaf in leaves.values()}
  if len(dtypes) != 1 or not dtypes <= set(DTYPES):
    raise InputError(f"parameters must be of one of {DTYPES}, got {dtypes}")
  dtype = dtypes.pop()
  if config_json is None:
    config_json = families.to_hf(config, dtype)
  else:
    _check_same_config(config_json, config)
    key = "dtype" if "dtype" in config_json else "torch_dtype"
    config_json = {**config_json, key: dtype}
  entries = _by_tensor(_family(config_json, folder / CONFIG), config)
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.write(
    folder,
    {name: parts[0].shape for name, parts in entries.items()},
    dtype,
    lambda name: _gather(entries[name], leaves, dtype),
    max_shard_size,
  )
  (folder / CONFIG).write_text(json.dumps(config_json, indent=2) + "\n")


def _check_same_config(
  config_json: Mapping[str, Any], config: ModelConfig
) -> None:
  says = dataclasses.replace(
    families.from_hf(dict(config_json)), compute=config.compute
  )
  if says != config:
    raise InputError(
      f"the {CONFIG} to be written describes another model: {says}, but the "
      f"parameters are those of {config}"
    )


def _gather(entries: list[tensors.Entry], leaves, dtype: str) -> np.ndarray:
  """One tensor of a file, of the parts of leaves that it holds."""
  tensor = np.empty(entries[0].shape, np.dtype(dtype))
  bits = np.dtype(f"u{tensor.itemsize}")
  for entry in entries:
    # A part of a leaf at a time: a whole one that is fetched from a device
    # stays in memory for as long as the leaf lives.
    part = np.asarray(leaves[entry.leaf][entry.at]).view(bits)
    view = entry.view(tensor.view(bits))
    safetensors.copy_strips(part.reshape(view.shape), view)
  return tensor
