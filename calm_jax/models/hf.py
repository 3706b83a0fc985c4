"""Hugging Face's parameter names: the only file that knows them.

One table per family says which tensor holds which leaf of
`decoder.param_shapes`, and how it lies there. `models/loading.py` reads and
writes by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from calm_jax import tree
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig


class Entry(NamedTuple):
  """One tensor, or a part of one, and its place in the parameter tree.

  Attributes:
    tensor: its name in the file.
    shape: of the whole tensor in the file.
    leaf: the leaf that it is a part of.
    at: indices into the leaf's leading axes: (), (layer,) and the like.
    view: the tensor's array -> a numpy view of the entry's part, in the
      layout of leaf[at]. Reading copies out of the view, writing into it.
  """

  tensor: str
  shape: tuple[int, ...]
  leaf: str
  at: tuple[int, ...]
  view: Callable[[np.ndarray], np.ndarray]

  def __str__(self) -> str:
    return self.leaf + "".join(f"[{i}]" for i in self.at)


class Family(NamedTuple):
  """How one family names its tensors; {} stands for the layer, from 0.

  Attributes:
    tensors: {tensor: (leaf, transposed)}; torch's Linear holds [out, in].
    ignored: tensors that hold nothing learnt: buffers of older versions.
  """

  tensors: dict[str, tuple[str, bool]]
  ignored: tuple[str, ...] = ()


def _linears(tensor: str, leaf: str, names: dict[str, str]) -> dict:
  """Table entries of torch Linears, with the biases some of them have."""
  entries = {}
  for theirs, ours in names.items():
    entries[f"{tensor}.{theirs}.weight"] = (f"{leaf}/{ours}/kernel", True)
    entries[f"{tensor}.{theirs}.bias"] = (f"{leaf}/{ours}/bias", False)
  return entries


_LAYER = "model.layers.{}"
EMBEDDING, HEAD = "embed/embedding", "head/kernel"
_LLAMA = Family(
  tensors={
    "model.embed_tokens.weight": (EMBEDDING, False),
    **_linears(f"{_LAYER}.self_attn", "layers/attention", {
      "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output",
    }),
    **_linears(f"{_LAYER}.mlp", "layers/mlp", {
      "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    }),
    f"{_LAYER}.input_layernorm.weight": ("layers/attention_norm/scale", False),
    f"{_LAYER}.post_attention_layernorm.weight": (
      "layers/mlp_norm/scale", False
    ),
    "model.norm.weight": ("final_norm/scale", False),
    "lm_head.weight": (HEAD, True),
  },
  ignored=(
    f"{_LAYER}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"
  ),
)  # fmt: skip
FAMILIES = {"llama": _LLAMA}


def _as_it_is(x: np.ndarray) -> np.ndarray:
  return x


def entries(family: Family, config: ModelConfig) -> list[Entry]:
  """Every tensor that a checkpoint of this config has, and its leaf."""
  leaves = tree.flatten(decoder.param_shapes(config))
  found = []
  for pattern, (leaf, transposed) in family.tensors.items():
    if leaf not in leaves:  # this config has no such bias or head
      continue
    shape = leaves[leaf].shape
    places: list[tuple[int, ...]] = [()]
    if "{}" in pattern:
      places, shape = [(i,) for i in range(shape[0])], shape[1:]
    if transposed:
      shape = shape[::-1]
    view = np.transpose if transposed else _as_it_is
    found += [Entry(pattern.format(*p), shape, leaf, p, view) for p in places]
  return found


def ignored(family: Family, name: str) -> bool:
  """Whether a tensor holds nothing learnt."""
  patterns = (re.escape(p).replace(r"\{\}", r"\d+") for p in family.ignored)
  return any(re.fullmatch(p, name) for p in patterns)


def absent(family: Family, config: ModelConfig, name: str) -> str:
  """Why a tensor has no leaf, for a message."""
  pattern = re.sub(r"\.\d+(?=\.)", ".{}", name)
  if pattern not in family.tensors:
    return "is a name that this family does not have"
  leaf = family.tensors[pattern][0]
  layers = [e for e in entries(family, config) if e.leaf == leaf]
  if not layers:
    return f"would be {leaf}, which a model with this config does not have"
  return f"would be another layer of {leaf}, which has {len(layers)} only"
