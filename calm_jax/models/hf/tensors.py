"""Hugging Face's parameter names: the only file that knows them.

One table per family says which tensor holds which leaf of
`decoder.param_shapes`, and how it lies there. `models/loading.py` reads and
writes by it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig

T = TypeVar("T")


class Entry(NamedTuple):
  """One tensor, or a part of one, and its place in the parameter tree.

  Attributes:
    tensor: its name in the file.
    shape: of the whole tensor in the file.
    leaf: the leaf that it is a part of.
    at: indices into the leaf's leading axes: (), (layer,) or (layer, expert).
    view: the tensor's array -> a numpy view of the entry's part, in the
      layout of leaf[at], of which it may split axes: read by
      `leaf[at].reshape(view.shape)[...] = view`, write by the reverse.
  """

  tensor: str
  shape: tuple[int, ...]
  leaf: str
  at: tuple[int, ...]
  view: Callable[[np.ndarray], np.ndarray]

  def __str__(self) -> str:
    return self.leaf + "".join(f"[{i}]" for i in self.at)


class Fused(NamedTuple):
  """A tensor that holds several leaves side by side.

  Attributes:
    leaves: in their order in the tensor.
    transposed: whether it is [out, in], as torch's Linear has it.
    by_head: whether they take turns head by head, not one after the other.
  """

  leaves: tuple[str, ...]
  transposed: bool
  by_head: bool = False


class Family(NamedTuple):
  """How one family names its tensors.

  {} stands for the layer, from 0, and a second one for the expert.

  Attributes:
    tensors: {tensor: (leaf, transposed)}; torch's Linear holds [out, in].
    fused: {tensor: the leaves in it}.
    ignored: tensors that hold nothing learnt: buffers of older versions.
    renamed: (pattern, replacement) of names that other versions wrote.
  """

  tensors: dict[str, tuple[str, bool]]
  fused: dict[str, Fused] = {}  # noqa: RUF012
  ignored: tuple[str, ...] = ()
  renamed: tuple[tuple[str, str], ...] = ()


def _linears(tensor: str, leaf: str, names: dict[str, str]) -> dict:
  """Table entries of torch Linears, with the biases some of them have."""
  entries = {}
  for theirs, ours in names.items():
    entries[f"{tensor}.{theirs}.weight"] = (f"{leaf}/{ours}/kernel", True)
    entries[f"{tensor}.{theirs}.bias"] = (f"{leaf}/{ours}/bias", False)
  return entries


def _norms(names: dict[str, str]) -> dict:
  """Table entries of norms, with the biases some of them have."""
  entries = {}
  for theirs, ours in names.items():
    entries[f"{theirs}.weight"] = (f"{ours}/scale", False)
    entries[f"{theirs}.bias"] = (f"{ours}/bias", False)
  return entries


EMBEDDING, HEAD = "embed/embedding", "head/kernel"
_LAYER = "model.layers.{}"
_ATTENTION, _MLP = "layers/attention", "layers/mlp"
_QKV = ("query", "key", "value")
_Q_NORMS = {
  f"{_LAYER}.self_attn.q_norm": f"{_ATTENTION}/query_norm",
  f"{_LAYER}.self_attn.k_norm": f"{_ATTENTION}/key_norm",
}
_OUTER = {
  "model.embed_tokens.weight": (EMBEDDING, False),
  "lm_head.weight": (HEAD, True),
}
_BUFFERS = (
  f"{_LAYER}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"
)  # fmt: skip
_SELF_ATTENTION = _linears(f"{_LAYER}.self_attn", _ATTENTION, {
  "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output",
})  # fmt: skip
_GATED = _linears(f"{_LAYER}.mlp", _MLP, {
  "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
})  # fmt: skip
_PRE_NORMS = _norms({
  f"{_LAYER}.input_layernorm": "layers/attention_norm",
  f"{_LAYER}.post_attention_layernorm": "layers/mlp_norm",
  "model.norm": "final_norm",
})  # fmt: skip
# post_attention_layernorm is where it says where there are post-norms.
_POST_NORMS = {
  f"{_LAYER}.post_attention_layernorm": "layers/attention_post_norm",
  f"{_LAYER}.post_feedforward_layernorm": "layers/mlp_post_norm",
  "model.norm": "final_norm",
}

_LLAMA = Family(
  _OUTER | _SELF_ATTENTION | _GATED | _PRE_NORMS | _norms(_Q_NORMS),
  ignored=_BUFFERS,
)
_SANDWICH = Family(
  _OUTER | _SELF_ATTENTION | _GATED | _norms(_POST_NORMS | _Q_NORMS | {
    f"{_LAYER}.input_layernorm": "layers/attention_norm",
    f"{_LAYER}.pre_feedforward_layernorm": "layers/mlp_norm",
  }),
  ignored=_BUFFERS,
)  # fmt: skip


def _fused_qkv(tensor: str, transposed: bool, by_head: bool = False) -> dict:
  return {
    f"{tensor}.{theirs}": Fused(
      tuple(f"{_ATTENTION}/{n}/{ours}" for n in _QKV), transposed, by_head
    )
    for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
  }


_PHI3 = Family(
  _OUTER | _PRE_NORMS
  | _linears(f"{_LAYER}.self_attn", _ATTENTION, {"o_proj": "output"})
  | _linears(f"{_LAYER}.mlp", _MLP, {"down_proj": "down"}),
  fused=_fused_qkv(f"{_LAYER}.self_attn.qkv_proj", True) | {
    f"{_LAYER}.mlp.gate_up_proj.weight": Fused(
      (f"{_MLP}/gate/kernel", f"{_MLP}/up/kernel"), True
    ),
  },
  ignored=_BUFFERS,
)  # fmt: skip
_STARCODER2 = Family(
  _OUTER | _SELF_ATTENTION | _PRE_NORMS
  | _linears(f"{_LAYER}.mlp", _MLP, {"c_fc": "up", "c_proj": "down"}),
  ignored=_BUFFERS,
)  # fmt: skip
_NEOX_LAYER = "gpt_neox.layers.{}"
_NEOX = Family(
  {
    "gpt_neox.embed_in.weight": (EMBEDDING, False),
    "embed_out.weight": (HEAD, True),
    **_linears(f"{_NEOX_LAYER}.attention", _ATTENTION, {"dense": "output"}),
    **_linears(f"{_NEOX_LAYER}.mlp", _MLP, {
      "dense_h_to_4h": "up", "dense_4h_to_h": "down",
    }),
    **_norms({
      f"{_NEOX_LAYER}.input_layernorm": "layers/attention_norm",
      f"{_NEOX_LAYER}.post_attention_layernorm": "layers/mlp_norm",
      "gpt_neox.final_layer_norm": "final_norm",
    }),
  },
  fused=_fused_qkv(f"{_NEOX_LAYER}.attention.query_key_value", True, True),
  ignored=tuple(f"{_NEOX_LAYER}.attention.{buffer}" for buffer in (
    "bias", "masked_bias", "rotary_emb.inv_freq",
  )),
  renamed=((r"^lm_head\.", "embed_out."),),
)  # fmt: skip
_GPT2_LAYER = "transformer.h.{}"
_GPT2 = Family(
  {
    "transformer.wte.weight": (EMBEDDING, False),
    "transformer.wpe.weight": ("embed/position_embedding", False),
    "lm_head.weight": (HEAD, True),
    # Its Conv1D is a Linear that holds [in, out].
    **{
      name: (leaf, False)
      for theirs, ours in (
        ("attn.c_proj", "attention/output"), ("mlp.c_fc", "mlp/up"),
        ("mlp.c_proj", "mlp/down"),
      )
      for name, leaf in (
        (f"{_GPT2_LAYER}.{theirs}.weight", f"layers/{ours}/kernel"),
        (f"{_GPT2_LAYER}.{theirs}.bias", f"layers/{ours}/bias"),
      )
    },
    **_norms({
      f"{_GPT2_LAYER}.ln_1": "layers/attention_norm",
      f"{_GPT2_LAYER}.ln_2": "layers/mlp_norm",
      "transformer.ln_f": "final_norm",
    }),
  },
  fused=_fused_qkv(f"{_GPT2_LAYER}.attn.c_attn", False),
  ignored=tuple(
    f"{_GPT2_LAYER}.attn.{buffer}" for buffer in ("bias", "masked_bias")
  ),
  # The first release has no prefix.
  renamed=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
)  # fmt: skip


def _mixture(layer: str, gate: str, up: str, down: str) -> Family:
  """A Llama with norms of queries and keys, and experts."""
  names = {gate: "gate", up: "up", down: "down"}
  experts = {
    f"{layer}.experts.{{}}.{theirs}.weight": (
      f"{_MLP}/experts/{ours}/kernel", True
    )
    for theirs, ours in names.items()
  }  # fmt: skip
  router = {f"{layer}.gate.weight": (f"{_MLP}/router/kernel", True)}
  return Family(
    _OUTER | _SELF_ATTENTION | _PRE_NORMS | _norms(_Q_NORMS) | router | experts,
    ignored=_BUFFERS,
  )


_MIXTRAL = _mixture(f"{_LAYER}.block_sparse_moe", "w1", "w3", "w2")
_QWEN3_MOE = _mixture(f"{_LAYER}.mlp", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
  "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
  "gemma": _LLAMA, "gemma2": _SANDWICH, "gemma3_text": _SANDWICH,
  "gpt2": _GPT2, "gpt_neox": _NEOX, "phi3": _PHI3, "olmo2": _SANDWICH,
  "smollm3": _LLAMA, "starcoder2": _STARCODER2, "granite": _LLAMA,
  "mixtral": _MIXTRAL, "qwen3_moe": _QWEN3_MOE,
}  # fmt: skip


def canonical(family: Family, tensors: dict[str, T]) -> dict[str, T]:
  """The same tensors under the tables' names, whatever version wrote them.

  Raises:
    InputError: two of them have the same name then.
  """
  found: dict[str, T] = {}
  for name, tensor in tensors.items():
    for pattern, replacement in family.renamed:
      name = re.sub(pattern, replacement, name)
    if name in found:
      raise InputError(f"two tensors are {name}: {found[name]} and {tensor}")
    found[name] = tensor
  return found


def _view(
  x: np.ndarray, *, transposed: bool, heads: int, start: int, stop: int
) -> np.ndarray:
  """Part start .. stop of the last axis, or of each of several heads'."""
  x = x.T if transposed else x
  if heads:
    x = x.reshape(*x.shape[:-1], heads, -1)
  return x[..., start:stop]


def entries(family: Family, config: ModelConfig) -> list[Entry]:
  """Every tensor that a checkpoint of this config has, and its leaf.

  Raises:
    InputError: the family has no tensor for a leaf of the config.
  """
  leaves = trees.flatten(decoder.param_shapes(config))
  tensors = family.fused | {
    name: Fused((leaf,), transposed)
    for name, (leaf, transposed) in family.tensors.items()
  }
  found = []
  for pattern, fused in tensors.items():
    if not set(fused.leaves) <= set(leaves):  # no such bias or head here
      continue
    stacked = pattern.count("{}")
    shapes = [leaves[leaf].shape for leaf in fused.leaves]
    places = list(itertools.product(*map(range, shapes[0][:stacked])))
    shapes = [shape[stacked:] for shape in shapes]
    shape = (*shapes[0][:-1], sum(s[-1] for s in shapes))
    heads = config.num_heads if fused.by_head else 0
    start = 0
    for leaf, part in zip(fused.leaves, shapes, strict=True):
      stop = start + part[-1] // (heads or 1)
      view = functools.partial(
        _view, transposed=fused.transposed, heads=heads, start=start, stop=stop
      )
      whole = shape[::-1] if fused.transposed else shape
      found += [Entry(pattern.format(*p), whole, leaf, p, view) for p in places]
      start = stop
  homeless = set(leaves) - {entry.leaf for entry in found}
  if homeless:
    raise InputError(
      f"this family has no tensors for {sorted(homeless)}, which a model with "
      "this config has"
    )
  return found


def ignored(family: Family, name: str) -> bool:
  """Whether a tensor holds nothing learnt."""
  patterns = (re.escape(p).replace(r"\{\}", r"\d+") for p in family.ignored)
  return any(re.fullmatch(p, name) for p in patterns)


def absent(family: Family, config: ModelConfig, name: str) -> str:
  """Why a tensor has no leaf, for a message."""
  pattern = re.sub(r"\.\d+(?=\.)", ".{}", name)
  if pattern in family.tensors:
    leaf = family.tensors[pattern][0]
  elif pattern in family.fused:
    leaf = family.fused[pattern].leaves[0]
  else:
    return "is a name that this family does not have"
  layers = [e for e in entries(family, config) if e.leaf == leaf]
  if not layers:
    return f"would be {leaf}, which a model with this config does not have"
  return f"would be another layer of {leaf}, which has {len(layers)} only"
