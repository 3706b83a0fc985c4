"""The tensors of a checkpoint as parts of the parameter tree."""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from calm_jax.core import trees
from calm_jax.core.errors import InputError, check_choice
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf.tensor_tables import FAMILIES, TensorTable


class Entry(NamedTuple):
  """A tensor, or a part of one, and the part of a leaf that it holds.

  Attributes:
    shape: the shape of the whole tensor in the file.
    at: indices into the leaf's leading axes: (), (layer,) or (layer, expert).
    view: the tensor's array -> a numpy view of the entry's part, laid out as
      leaf[at], of which it may split axes.
  """

  tensor: str
  shape: tuple[int, ...]
  leaf: str
  at: tuple[int, ...]
  view: Callable[[np.ndarray], np.ndarray]

  def __str__(self) -> str:
    return self.leaf + "".join(f"[{i}]" for i in self.at)


def tensor_table(config_json: Mapping[str, Any]) -> TensorTable:
  """Returns the table of a config.json's family; InputError if unknown."""
  name = config_json.get("model_type")
  check_choice("model_type", name, sorted(FAMILIES))
  return FAMILIES[name]


def entries(table: TensorTable, config: ModelConfig) -> list[Entry]:
  """Lists the tensors of a checkpoint of this config, with their leaves.

  Raises InputError if the family has no tensor for a leaf of the config.
  """
  leaves = trees.flatten(decoder.param_shapes(config))
  found = []
  for pattern, content in table.tensors.items():
    if not set(content.leaves) <= set(leaves):  # no such bias or head here
      continue
    stacked = pattern.count("{}")
    shapes = [leaves[leaf].shape for leaf in content.leaves]
    places = list(itertools.product(*map(range, shapes[0][:stacked])))
    shapes = [shape[stacked:] for shape in shapes]
    shape = (*shapes[0][:-1], sum(s[-1] for s in shapes))
    whole = shape[::-1] if content.transposed else shape
    heads = config.num_heads if content.by_head else 0
    start = 0
    for leaf, part in zip(content.leaves, shapes, strict=True):
      held = slice(start, start + part[-1] // (heads or 1))
      view = functools.partial(_view, content.transposed, heads, held)
      found += [Entry(pattern.format(*p), whole, leaf, p, view) for p in places]
      start = held.stop
  homeless = set(leaves) - {entry.leaf for entry in found}
  if homeless:
    raise InputError(
      f"this family has no tensors for {sorted(homeless)} of the config"
    )
  return found


def entries_by_tensor(
  table: TensorTable, config: ModelConfig
) -> dict[str, list[Entry]]:
  """`entries`, grouped by the name of the tensor."""
  grouped: dict[str, list[Entry]] = {}
  for entry in entries(table, config):
    grouped.setdefault(entry.tensor, []).append(entry)
  return grouped


def canonical(table: TensorTable, tensors: dict[str, Any]) -> dict[str, Any]:
  """Renames tensors as the tables do, whatever version wrote the file.

  Raises InputError if two of them then have the same name.
  """
  renamed: dict[str, Any] = {}
  for name, tensor in tensors.items():
    for pattern, replacement in table.renamed:
      name = re.sub(pattern, replacement, name)
    if name in renamed:
      raise InputError(f"two tensors are {name}: {renamed[name]} and {tensor}")
    renamed[name] = tensor
  return renamed


def ignored(table: TensorTable, name: str) -> bool:
  """Returns whether a tensor holds nothing learnt."""
  patterns = (re.escape(p).replace(r"\{\}", r"\d+") for p in table.ignored)
  return any(re.fullmatch(p, name) for p in patterns)


def absent(table: TensorTable, config: ModelConfig, name: str) -> str:
  """Says why a tensor has no leaf, for a message."""
  pattern = re.sub(r"\.\d+(?=\.)", ".{}", name)
  if pattern not in table.tensors:
    return "is a name that this family does not have"
  leaf = table.tensors[pattern].leaves[0]
  layers = [e for e in entries(table, config) if e.leaf == leaf]
  if not layers:
    return f"would be {leaf}, which a model with this config does not have"
  return f"would be another layer of {leaf}, which has {len(layers)} only"


def _view(transposed: bool, heads: int, part: slice, x: np.ndarray):
  """A part of the last axis, or of each of several heads'."""
  x = x.T if transposed else x
  if heads:
    x = x.reshape(*x.shape[:-1], heads, -1)
  return x[..., part]
