"""Checkpoints in Hugging Face's format: read strictly, written back.

A tensor without a leaf, or a leaf without a tensor, is an error and never a
model that is almost right.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from calm_jax import tree
from calm_jax.errors import InputError
from calm_jax.models import decoder, families, hf
from calm_jax.models.config import ModelConfig
from calm_jax.models.folders import (
  CONFIG,
  INDEX,
  WEIGHTS,
  Tensor,
  open_tensors,
  read_json,
)

DTYPES = ("float32", "bfloat16", "float64")
_FLOATS = ("F64", "F32", "F16", "BF16")
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


def _check(
  folder: pathlib.Path,
  family: hf.Family,
  config: ModelConfig,
  found: dict[str, Tensor],
  entries: dict[str, list[hf.Entry]],
) -> None:
  """Raises InputError unless tensors and leaves are one to one."""
  problems = []
  for name, tensor in found.items():
    if name in entries:
      places = " and ".join(map(str, entries[name]))
      expected = entries[name][0].shape
      if tensor.shape() != expected:
        problems.append(
          f"misshapen: {tensor} for {places}, which is {list(expected)} there"
        )
      elif tensor.dtype() not in _FLOATS:
        problems.append(
          f"not floats: {tensor} for {places} is {tensor.dtype()}; "
          "quantized weights are not supported"
        )
    elif not hf.ignored(family, name):
      problems.append(f"unknown: {tensor} {hf.absent(family, config, name)}")
  for name in sorted(set(entries) - set(found)):
    places = " and ".join(map(str, entries[name]))
    shape = list(entries[name][0].shape)
    problems.append(f"missing: {name} {shape} for {places}")
  _raise_all(folder, problems)


def _take_tied_head(
  folder: pathlib.Path, family: hf.Family, found: dict[str, Tensor]
) -> None:
  """Drops the head of a tied model, which may be written out once more."""
  names = {leaf: name for name, (leaf, _) in family.tensors.items()}
  head = found.pop(names[hf.HEAD], None)
  embedding = found.get(names[hf.EMBEDDING])
  if head is None or embedding is None:
    return
  if head.shape() != embedding.shape() or not np.array_equal(
    head.read(), embedding.read()
  ):
    raise InputError(
      f"{folder}: {CONFIG} says that head and embedding are tied, but {head} "
      f"differs from {embedding} ({hf.EMBEDDING}); set tie_word_embeddings to "
      "false there if the head is a matrix of its own"
    )


def _by_tensor(
  family: hf.Family, config: ModelConfig
) -> dict[str, list[hf.Entry]]:
  entries: dict[str, list[hf.Entry]] = {}
  for entry in hf.entries(family, config):
    entries.setdefault(entry.tensor, []).append(entry)
  return entries


def _family(folder: pathlib.Path) -> hf.Family:
  name = read_json(folder / CONFIG).get("model_type")
  if name not in hf.FAMILIES:
    raise InputError(
      f"{folder / CONFIG}: model_type={name!r} is not supported; known: "
      f"{sorted(hf.FAMILIES)}"
    )
  return hf.FAMILIES[name]


def load_params(
  folder: str | os.PathLike, config: ModelConfig, dtype: str = "float32"
) -> dict[str, Any]:
  """Reads the weights, tensor by tensor into the stacked arrays.

  Args:
    folder: holds config.json and model.safetensors, or its shards and
      model.safetensors.index.json.
    config: what `load_config` read there.
    dtype: of the arrays: "float32", "bfloat16" or "float64".

  Returns:
    The tree of `decoder.param_shapes(config)`, as numpy arrays.

  Raises:
    InputError: weights that are missing, pickled, corrupt or quantized; a
      tensor that is unknown, missing, twice there or misshapen; the head of a
      tied model that differs from its embedding.
  """
  if dtype not in DTYPES:
    raise InputError(f"dtype={dtype!r} is none of {DTYPES}")
  folder = pathlib.Path(folder)
  family = _family(folder)
  entries = _by_tensor(family, config)
  found = hf.canonical(family, open_tensors(folder))
  if config.tie_embeddings:
    _take_tied_head(folder, family, found)
  _check(folder, family, config, found, entries)
  leaves = {
    name: np.empty(leaf.shape, jnp.dtype(dtype))
    for name, leaf in tree.flatten(decoder.param_shapes(config)).items()
  }
  for name, parts in entries.items():
    value = found[name].read()
    for entry in parts:
      part = entry.view(value)
      leaves[entry.leaf][entry.at].reshape(part.shape)[...] = part
  return tree.unflatten(leaves)


def save_params(
  folder: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any]
) -> None:
  """Writes a checkpoint that transformers and `load_params` read.

  Parameters keep their dtype and value, bit for bit. config.json is written
  last: a folder that has one is complete. Tokenizer files are not written.

  Args:
    folder: is created; must not hold a checkpoint yet.
    config: the architecture; `dtype` and `unroll` are not kept.
    params: the tree of `decoder.param_shapes(config)`, of one dtype.

  Raises:
    InputError: the folder holds weights already, or the tree is not that of
      the config.
  """
  folder = pathlib.Path(folder)
  for name in (CONFIG, WEIGHTS, INDEX):
    if (folder / name).exists():
      raise InputError(
        f"{folder} holds a model already ({name}); give another folder"
      )
  leaves = tree.flatten(params)
  expected = tree.flatten(decoder.param_shapes(config))
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
  leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
  tensors = {}
  dtype = dtypes.pop()
  for name, parts in _by_tensor(hf.FAMILIES["llama"], config).items():
    tensors[name] = np.empty(parts[0].shape, jnp.dtype(dtype))
    for entry in parts:
      part = entry.view(tensors[name])
      part[...] = leaves[entry.leaf][entry.at].reshape(part.shape)
  folder.mkdir(parents=True, exist_ok=True)
  part = folder / (WEIGHTS + ".part")
  safetensors.numpy.save_file(tensors, part, metadata={"format": "pt"})
  part.replace(folder / WEIGHTS)
  (folder / CONFIG).write_text(
    json.dumps(families.to_hf(config, dtype), indent=2) + "\n"
  )
