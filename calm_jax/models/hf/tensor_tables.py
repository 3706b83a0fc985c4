"""The tensors of each family's checkpoints, as parts of the parameter tree.

No other file knows Hugging Face's names of tensors.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from calm_jax.core import trees
from calm_jax.core.errors import InputError, check_choice
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig


class TensorTable(NamedTuple):
  """The modules of one family: {their name: ours, or several in one tensor}.

  A name that begins with a dot is of a layer; ours is then under layers/. {}
  stands for the number of the layer, a second one for that of the expert.
  """

  modules: dict[str, str]
  layer: str = "model.layers.{}"  # their name of a layer
  conv1d: bool = False  # layers' matrices are [in, out], not torch's [out, in]
  by_head: bool = False  # several in one tensor take turns head by head
  # Tensors that hold nothing learnt: buffers of older versions.
  ignored: tuple[str, ...] = (
    ".self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
  )
  # (pattern, replacement) for names that other versions wrote.
  renamed: tuple[tuple[str, str], ...] = ()

  def tensors(self) -> dict[str, list[str]]:
    """Returns the leaves that each tensor holds, whatever a config has."""
    leaves = {}
    for theirs, ours in self.modules.items():
      prefix = "layers/" if theirs.startswith(".") else ""
      modules = [prefix + module for module in ours.split()]
      name = self._full(theirs)
      leaves[f"{name}.weight"] = [_weight(module) for module in modules]
      leaves[f"{name}.bias"] = [f"{module}/bias" for module in modules]
    return leaves

  def is_ignored(self, tensor: str) -> bool:
    """Returns whether a tensor holds nothing learnt."""
    pattern = "|".join(re.escape(self._full(name)) for name in self.ignored)
    return re.fullmatch(pattern.replace(r"\{\}", r"\d+"), tensor) is not None

  def _full(self, name: str) -> str:
    return self.layer + name if name.startswith(".") else name


def _weight(module: str) -> str:
  """The leaf that a module's tensor called weight is."""
  if module.endswith("embedding"):
    return module
  return f"{module}/scale" if module.endswith("norm") else f"{module}/kernel"


# fmt: off
EMBEDDING, HEAD = "embed/embedding", "head/kernel"
_OUTER = {"model.embed_tokens": "embed/embedding", "lm_head": "head"}
_SELF_ATTENTION = {
  ".self_attn.q_proj": "attention/query", ".self_attn.k_proj": "attention/key",
  ".self_attn.v_proj": "attention/value",
  ".self_attn.o_proj": "attention/output",
}
_QKV = "attention/query attention/key attention/value"
_GATED = {
  ".mlp.gate_proj": "mlp/gate", ".mlp.up_proj": "mlp/up",
  ".mlp.down_proj": "mlp/down",
}
_PRE_NORMS = {
  ".input_layernorm": "attention_norm",
  ".post_attention_layernorm": "mlp_norm", "model.norm": "final_norm",
}
_Q_NORMS = {
  ".self_attn.q_norm": "attention/query_norm",
  ".self_attn.k_norm": "attention/key_norm",
}
_LLAMA = TensorTable(
  _OUTER | _SELF_ATTENTION | _GATED | _PRE_NORMS | _Q_NORMS
)
_SANDWICH = TensorTable(_OUTER | _SELF_ATTENTION | _GATED | {
  # Where there are post-norms, this one is where its name says.
  ".post_attention_layernorm": "attention_post_norm",
  ".post_feedforward_layernorm": "mlp_post_norm",
  "model.norm": "final_norm", **_Q_NORMS,
  ".input_layernorm": "attention_norm",
  ".pre_feedforward_layernorm": "mlp_norm",
})
_PHI3 = TensorTable({
  ".self_attn.qkv_proj": _QKV, ".mlp.gate_up_proj": "mlp/gate mlp/up",
  **_OUTER, **_PRE_NORMS,
  ".self_attn.o_proj": "attention/output", ".mlp.down_proj": "mlp/down",
})
_GLM = TensorTable(_OUTER | _SELF_ATTENTION | _PRE_NORMS | {
  ".mlp.gate_up_proj": "mlp/gate mlp/up", ".mlp.down_proj": "mlp/down",
  ".post_self_attn_layernorm": "attention_post_norm",
  ".post_mlp_layernorm": "mlp_post_norm",
})
_STARCODER2 = TensorTable(_OUTER | _SELF_ATTENTION | _PRE_NORMS | {
  ".mlp.c_fc": "mlp/up", ".mlp.c_proj": "mlp/down",
})
_NEOX = TensorTable(
  {
    ".attention.query_key_value": _QKV, "gpt_neox.embed_in": "embed/embedding",
    "embed_out": "head", ".attention.dense": "attention/output",
    ".mlp.dense_h_to_4h": "mlp/up", ".mlp.dense_4h_to_h": "mlp/down",
    ".input_layernorm": "attention_norm",
    ".post_attention_layernorm": "mlp_norm",
    "gpt_neox.final_layer_norm": "final_norm",
  },
  layer="gpt_neox.layers.{}", by_head=True,
  ignored=(
    ".attention.bias", ".attention.masked_bias",
    ".attention.rotary_emb.inv_freq",
  ),
  renamed=((r"^lm_head\.", "embed_out."),),
)
_GPT2 = TensorTable(
  {
    ".attn.c_attn": _QKV, "transformer.wte": "embed/embedding",
    "transformer.wpe": "embed/position_embedding", "lm_head": "head",
    ".attn.c_proj": "attention/output", ".mlp.c_fc": "mlp/up",
    ".mlp.c_proj": "mlp/down", ".ln_1": "attention_norm", ".ln_2": "mlp_norm",
    "transformer.ln_f": "final_norm",
  },
  layer="transformer.h.{}", conv1d=True,
  ignored=(".attn.bias", ".attn.masked_bias"),
  # The first release has no prefix.
  renamed=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
)


def _mixture(module: str, gate: str, up: str, down: str) -> TensorTable:
  """A Llama with norms of queries and keys, and experts."""
  return TensorTable(_OUTER | _SELF_ATTENTION | _PRE_NORMS | _Q_NORMS | {
    f"{module}.gate": "mlp/router",
    f"{module}.experts.{{}}.{gate}": "mlp/experts/gate",
    f"{module}.experts.{{}}.{up}": "mlp/experts/up",
    f"{module}.experts.{{}}.{down}": "mlp/experts/down",
  })


_MIXTRAL = _mixture(".block_sparse_moe", "w1", "w3", "w2")
_QWEN3_MOE = _mixture(".mlp", "gate_proj", "up_proj", "down_proj")
_LLAMAS = (
  "arcee", "ernie4_5", "gemma", "granite", "helium", "llama", "ministral",
  "ministral3", "mistral", "qwen2", "qwen3", "seed_oss", "smollm3",
)
_SANDWICHES = "exaone4", "gemma2", "gemma3_text", "olmo2", "olmo3"
FAMILIES = {
  **dict.fromkeys(_LLAMAS, _LLAMA),
  **dict.fromkeys(_SANDWICHES, _SANDWICH),
  "glm": _GLM, "glm4": _GLM, "gpt2": _GPT2, "gpt_neox": _NEOX,
  "phi3": _PHI3, "starcoder2": _STARCODER2,
  "mixtral": _MIXTRAL, "qwen3_moe": _QWEN3_MOE,
}
# fmt: on


class Entry(NamedTuple):
  """A tensor, or a part of one, and the part of a leaf that it holds.

  The `columns` of leaf[at], by its last axis, are those of the tensor from
  `start` on, after it is transposed if `transposed`.
  """

  tensor: str
  shape: tuple[int, ...]  # of the whole tensor in the file
  leaf: str
  at: tuple[int, ...]  # (), (layer,) or (layer, expert)
  columns: slice
  start: int
  transposed: bool

  def __str__(self) -> str:
    return self.leaf + "".join(f"[{i}]" for i in self.at)


def tensor_table(config_json: Mapping[str, Any]) -> TensorTable:
  """Returns the table of a config.json's family; InputError if unknown."""
  name = config_json.get("model_type")
  check_choice("model_type", name, sorted(FAMILIES))
  return FAMILIES[str(name)]


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each leaf of a model with this config."""
  leaves = trees.flatten(decoder.param_shapes(config))
  return {name: leaf.shape for name, leaf in leaves.items()}


def entries(table: TensorTable, config: ModelConfig) -> dict[str, list[Entry]]:
  """Lists the parts of each tensor in a checkpoint of this config.

  Raises InputError if the family has no tensor for a leaf of the config.
  """
  shapes, found = leaf_shapes(config), {}
  homeless = set(shapes)
  for pattern, leaves in table.tensors().items():
    if not set(leaves) <= set(shapes):  # no such bias or head here
      continue
    homeless -= set(leaves)
    stacked = pattern.count("{}")
    turns = config.num_heads if table.by_head and len(leaves) > 1 else 1
    parts, start = [], 0
    for turn in range(turns):
      for leaf in leaves:
        width = shapes[leaf][-1] // turns
        columns = slice(turn * width, (turn + 1) * width)
        parts.append((leaf, columns, start))
        start += width
    shape = (*shapes[leaves[0]][stacked:-1], start)
    conv1d = table.conv1d and stacked
    transposed = leaves[0].endswith("kernel") and not conv1d
    shape = shape[::-1] if transposed else shape
    for at in np.ndindex(shapes[leaves[0]][:stacked]):
      name = pattern.format(*at)
      found[name] = [
        Entry(name, shape, leaf, at, columns, start, transposed)
        for leaf, columns, start in parts
      ]
  if homeless:
    raise InputError(
      f"this family has no tensors for {sorted(homeless)} of the config"
    )
  return found


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


def absent(
  table: TensorTable, entries: Mapping[str, list[Entry]], name: str
) -> str:
  """Says why a tensor has no leaf, for a message."""
  leaves = table.tensors().get(re.sub(r"\.\d+(?=\.)", ".{}", name))
  if leaves is None:
    return "is a name that this family does not have"
  count = sum(parts[0].leaf == leaves[0] for parts in entries.values())
  if not count:
    return f"would be {leaves[0]}, which a model with this config does not have"
  return f"would be another layer of {leaves[0]}, which has {count} only"
