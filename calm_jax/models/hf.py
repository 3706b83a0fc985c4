"""Hugging Face checkpoints: the only file that knows their parameter names.

One table per family maps names of tensors to leaves of
`decoder.param_shapes`; reading is strict, so that a tensor without a leaf, or a
leaf without a tensor, is an error and never a model that is almost right.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from calm_jax import tree
from calm_jax.errors import InputError
from calm_jax.models import config as configs
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig
from calm_jax.models.folders import (
  CONFIG,
  INDEX,
  WEIGHTS,
  Tensor,
  open_tensors,
  read_json,
  resolve,
)

__all__ = ["load_config", "load_params", "resolve", "save_params"]

DTYPES = ("float32", "bfloat16", "float64")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 8


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
_EMBEDDING, _HEAD = "embed/embedding", "head/kernel"
_LLAMA = Family(
  tensors={
    "model.embed_tokens.weight": (_EMBEDDING, False),
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
    "lm_head.weight": (_HEAD, True),
  },
  ignored=(
    f"{_LAYER}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"
  ),
)  # fmt: skip
FAMILIES = {"llama": _LLAMA}


class _Slot(NamedTuple):
  """Where one tensor goes: a leaf, or one layer of it."""

  leaf: str
  layer: int | None
  transposed: bool
  shape: tuple[int, ...]  # of the tensor in the file

  def __str__(self) -> str:
    layer = "" if self.layer is None else f"[{self.layer}]"
    shape = self.shape[::-1] if self.transposed else self.shape
    return f"{self.leaf}{layer} {list(shape)}"


def _slots(family: Family, config: ModelConfig) -> dict[str, _Slot]:
  """{name of tensor: its slot}, for all leaves of this config."""
  leaves = tree.flatten(decoder.param_shapes(config))
  slots = {}
  for pattern, (leaf, transposed) in family.tensors.items():
    if leaf not in leaves:  # this config has no such bias or head
      continue
    shape = leaves[leaf].shape
    layers: tuple = (None,)
    if "{}" in pattern:
      layers, shape = range(shape[0]), shape[1:]
    for layer in layers:
      slots[pattern.format(layer)] = _Slot(
        leaf, layer, transposed, shape[::-1] if transposed else shape
      )
  return slots


def load_config(folder: str | os.PathLike) -> ModelConfig:
  """Reads config.json.

  Raises:
    InputError: it is missing, not JSON, or asks for what is not computed here.
  """
  path = pathlib.Path(folder) / CONFIG
  read = read_json(path)
  try:
    return configs.from_hf(read)
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


def _absent(family: Family, name: str, slots: dict[str, _Slot]) -> str:
  """Why a tensor has no leaf."""
  pattern = re.sub(r"\.\d+\.", ".{}.", name)
  if pattern not in family.tensors:
    return "is a name that this family does not have"
  leaf = family.tensors[pattern][0]
  layers = [s.layer for s in slots.values() if s.leaf == leaf]
  if not layers:
    return f"would be {leaf}, which a model with this config does not have"
  return f"would be another layer of {leaf}, which has {len(layers)} only"


def _check(
  folder: pathlib.Path,
  family: Family,
  found: dict[str, Tensor],
  slots: dict[str, _Slot],
) -> None:
  """Raises InputError unless tensors and leaves are one to one."""
  ignored = [
    re.compile(re.escape(p).replace(r"\{\}", r"\d+")) for p in family.ignored
  ]
  problems = []
  for name, tensor in found.items():
    if name in slots:
      if tensor.shape() != slots[name].shape:
        problems.append(
          f"misshapen: {tensor} for {slots[name]}, which is "
          f"{list(slots[name].shape)} there"
        )
      elif tensor.dtype() not in _FLOATS:
        problems.append(
          f"not floats: {tensor} for {slots[name]} is {tensor.dtype()}; "
          "quantized weights are not supported"
        )
    elif not any(p.fullmatch(name) for p in ignored):
      problems.append(f"unknown: {tensor} {_absent(family, name, slots)}")
  for name in sorted(set(slots) - set(found)):
    problems.append(
      f"missing: {name} {list(slots[name].shape)} for {slots[name]}"
    )
  _raise_all(folder, problems)


def _take_tied_head(
  folder: pathlib.Path, family: Family, found: dict[str, Tensor]
) -> None:
  """Drops the head of a tied model, which may be written out once more."""
  names = {leaf: name for name, (leaf, _) in family.tensors.items()}
  head = found.pop(names[_HEAD], None)
  embedding = found.get(names[_EMBEDDING])
  if head is None or embedding is None:
    return
  if head.shape() != embedding.shape() or not np.array_equal(
    head.read(), embedding.read()
  ):
    raise InputError(
      f"{folder}: {CONFIG} says that head and embedding are tied, but {head} "
      f"differs from {embedding} ({_EMBEDDING}); set tie_word_embeddings to "
      "false there if the head is a matrix of its own"
    )


def _family(folder: pathlib.Path) -> Family:
  name = read_json(folder / CONFIG).get("model_type")
  if name not in FAMILIES:
    raise InputError(
      f"{folder / CONFIG}: model_type={name!r} is not supported; known: "
      f"{sorted(FAMILIES)}"
    )
  return FAMILIES[name]


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
  slots = _slots(family, config)
  found = open_tensors(folder)
  if config.tie_embeddings:
    _take_tied_head(folder, family, found)
  _check(folder, family, found, slots)
  leaves = {
    name: np.empty(leaf.shape, jnp.dtype(dtype))
    for name, leaf in tree.flatten(decoder.param_shapes(config)).items()
  }
  for name, slot in slots.items():
    value = found[name].read()
    at = ... if slot.layer is None else slot.layer
    leaves[slot.leaf][at] = value.T if slot.transposed else value
  return tree.unflatten(leaves)


def _llama_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
  names = {
    ours: theirs for theirs, ours in reversed(configs.ACTIVATIONS.items())
  }
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_length,
    "hidden_act": names[config.activation],
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "tie_word_embeddings": config.tie_embeddings,
    "attention_bias": config.attention_bias,
    "mlp_bias": config.mlp_bias,
    "torch_dtype": dtype,
    # transformers' defaults are ids of Llama's own vocabulary.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
  }


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
  for name, slot in _slots(_LLAMA, config).items():
    value = leaves[slot.leaf]
    value = value if slot.layer is None else value[slot.layer]
    # safetensors writes an array's buffer, whatever its strides.
    tensors[name] = np.ascontiguousarray(value.T if slot.transposed else value)
  folder.mkdir(parents=True, exist_ok=True)
  part = folder / (WEIGHTS + ".part")
  safetensors.numpy.save_file(tensors, part, metadata={"format": "pt"})
  part.replace(folder / WEIGHTS)
  (folder / CONFIG).write_text(
    json.dumps(_llama_json(config, dtypes.pop()), indent=2) + "\n"
  )
