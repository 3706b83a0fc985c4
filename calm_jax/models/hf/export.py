"""Writes checkpoints in Hugging Face's format."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from calm_jax.core import files, hub, trees
from calm_jax.core.errors import InputError
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import (
  families,
  tensor_reader,
  tensor_tables,
  weight_files,
)
from calm_jax.models.hf.loading import DTYPES
from calm_jax.models.hf.tensor_tables import Entry

MAX_SHARD_SIZE = 5 * 10**9


class Tensors(NamedTuple):
  """A model as its checkpoint holds it: `value` makes each tensor by name."""

  config_json: dict[str, Any]
  shapes: dict[str, tuple[int, ...]]
  dtype: str
  value: Callable[[str], np.ndarray]
  prefix: str = ""  # of all tensors but those of the head

  def backbone(self) -> Self:
    """The tensors without those of the head, as transformers' `AutoModel`."""
    names = [n for n in self.shapes if n.startswith(self.prefix)]
    shapes = {n.removeprefix(self.prefix): self.shapes[n] for n in names}
    value, prefix = self.value, self.prefix
    return self._replace(shapes=shapes, value=lambda n: value(prefix + n))


def tensors(
  config: ModelConfig,
  params: Mapping[str, Any],
  config_json: Mapping[str, Any] | None = None,
) -> Tensors:
  """Returns a model as a checkpoint's tensors; arguments as `save_params`."""
  dtype = _check_tree(params, config)
  if config_json is None:
    config_json = families.to_hf(config, dtype)
  else:
    described = families.from_hf(dict(config_json))
    if dataclasses.replace(described, compute=config.compute) != config:
      raise InputError(
        f"the {hub.CONFIG} to be written describes another model: {described}, "
        f"but the parameters are those of {config}"
      )
    key = "dtype" if "dtype" in config_json else "torch_dtype"
    config_json = {**config_json, key: dtype}
  table = tensor_tables.tensor_table(config_json)
  entries = tensor_tables.entries(table, config)
  leaves = trees.flatten(params)
  return Tensors(
    config_json,
    {name: parts[0].shape for name, parts in entries.items()},
    dtype,
    lambda name: _gather(entries[name], leaves, dtype),
    table.layer.partition(".")[0] + ".",
  )


def save_params(
  folder: str | os.PathLike,
  config: ModelConfig,
  params: Mapping[str, Any],
  config_json: Mapping[str, Any] | None = None,
  max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
  """Writes a checkpoint that transformers and `load_params` read.

  Parameters keep their bits. Tokenizer files and `config.compute` are not
  written.

  Args:
    folder: is created; must not hold a checkpoint yet.
    params: the tree of `decoder.param_shapes(config)`, of one dtype.
    config_json: the config.json to write, whose family names the tensors; a
      Llama's made from `config` if None.
    max_shard_size: bytes of tensors in one file, unless one alone is larger.

  Raises:
    InputError: the folder holds weights already, or the tree or config_json
      does not fit the config.
  """
  folder = pathlib.Path(folder)
  check_new(folder)
  write(folder, tensors(config, params, config_json), max_shard_size)


def check_new(folder: pathlib.Path) -> None:
  """Raises InputError for a folder that holds a checkpoint."""
  for name in (hub.CONFIG, hub.WEIGHTS, hub.INDEX):
    if (folder / name).exists():
      raise InputError(
        f"{folder} holds a model already ({name}); give another folder"
      )


def write(folder: pathlib.Path, made: Tensors, max_shard_size: int) -> None:
  """Writes tensors, one of which is held at a time, and then their config.json:
  a folder that has one is complete."""
  folder.mkdir(parents=True, exist_ok=True)
  weight_files.write_tensors(
    folder, made.shapes, made.dtype, made.value, max_shard_size
  )
  text = json.dumps(made.config_json, indent=2) + "\n"
  files.write_atomically(folder / hub.CONFIG, text)


def _check_tree(params: Mapping[str, Any], config: ModelConfig) -> str:
  """Returns the dtype of a tree that is one of the config, of one dtype."""
  dtypes = {str(leaf.dtype) for leaf in trees.flatten(params).values()}
  if len(dtypes) != 1 or not dtypes <= set(DTYPES):
    raise InputError(f"parameters must be of one of {DTYPES}, got {dtypes}")
  [dtype] = dtypes
  shapes = tensor_tables.leaf_shapes(config).items()
  leaves = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes}
  what = "the tree of parameters, compared with the config,"
  trees.check_same_structure(params, leaves, what)
  return dtype


def _gather(entries: list[Entry], leaves, dtype: str) -> np.ndarray:
  """Makes a tensor of a file from the parts of leaves that it holds."""
  tensor = np.empty(entries[0].shape, np.dtype(dtype))
  bits = np.dtype(f"u{tensor.itemsize}")
  # A part of a leaf is fetched once, and alone: a whole leaf that is fetched
  # from a device stays in memory for as long as it lives.
  places = {entry.leaf: entry.at for entry in entries}
  parts = {n: np.asarray(leaves[n][at]).view(bits) for n, at in places.items()}
  outputs = tensor.view(bits).T if entries[0].transposed else tensor.view(bits)
  for entry in entries:
    part = parts[entry.leaf][..., entry.columns]
    target = outputs[..., entry.start : entry.start + part.shape[-1]]
    tensor_reader.copy_strips(part, target)
  return tensor
