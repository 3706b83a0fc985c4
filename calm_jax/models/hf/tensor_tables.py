"""The names of each family's tensors, and the leaves that they hold.

`tensors.py` reads these tables; no other file knows Hugging Face's names.
"""

from typing import NamedTuple


class Content(NamedTuple):
  """The leaves that a tensor holds side by side, or in turns head by head.

  It is transposed if it is [out, in], as in torch's Linear.
  """

  leaves: tuple[str, ...]
  transposed: bool = False
  by_head: bool = False


_LAYER = "model.layers.{}"
_BUFFERS = (
  f"{_LAYER}.self_attn.rotary_emb.inv_freq",
  "model.rotary_emb.inv_freq",
)


class TensorTable(NamedTuple):
  """The tensors of one family.

  {} stands for the layer, from 0, and a second one for the expert.

  Attributes:
    tensors: what each tensor holds.
    ignored: tensors that hold nothing learnt: buffers of older versions.
    renamed: (pattern, replacement) for names that other versions wrote.
  """

  tensors: dict[str, Content]
  ignored: tuple[str, ...] = _BUFFERS
  renamed: tuple[tuple[str, str], ...] = ()


def _linears(
  tensor: str, leaf: str, names: dict[str, str], transposed: bool = True
) -> dict:
  """Table entries of matrices, with the biases that some of them have."""
  entries = {}
  for theirs, ours in names.items():
    kernel = Content((f"{leaf}/{ours}/kernel",), transposed)
    entries[f"{tensor}.{theirs}.weight"] = kernel
    entries[f"{tensor}.{theirs}.bias"] = Content((f"{leaf}/{ours}/bias",))
  return entries


def _norms(names: dict[str, str]) -> dict:
  """Table entries of norms, with the biases that some of them have."""
  entries = {}
  for theirs, ours in names.items():
    entries[f"{theirs}.weight"] = Content((f"{ours}/scale",))
    entries[f"{theirs}.bias"] = Content((f"{ours}/bias",))
  return entries


# fmt: off
EMBEDDING, HEAD = "embed/embedding", "head/kernel"
_ATTENTION, _MLP = "layers/attention", "layers/mlp"
_Q_NORMS = {
  f"{_LAYER}.self_attn.q_norm": f"{_ATTENTION}/query_norm",
  f"{_LAYER}.self_attn.k_norm": f"{_ATTENTION}/key_norm",
}
_OUTER = {
  "model.embed_tokens.weight": Content((EMBEDDING,)),
  "lm_head.weight": Content((HEAD,), transposed=True),
}
_SELF_ATTENTION = _linears(f"{_LAYER}.self_attn", _ATTENTION, {
  "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output",
})
_GATED = _linears(f"{_LAYER}.mlp", _MLP, {
  "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
})
_PRE_NORMS = _norms({
  f"{_LAYER}.input_layernorm": "layers/attention_norm",
  f"{_LAYER}.post_attention_layernorm": "layers/mlp_norm",
  "model.norm": "final_norm",
})
_LLAMA = TensorTable(
  _OUTER | _SELF_ATTENTION | _GATED | _PRE_NORMS | _norms(_Q_NORMS)
)
_SANDWICH = TensorTable(
  _OUTER | _SELF_ATTENTION | _GATED | _norms({
    # Where there are post-norms, this one is where its name says.
    f"{_LAYER}.post_attention_layernorm": "layers/attention_post_norm",
    f"{_LAYER}.post_feedforward_layernorm": "layers/mlp_post_norm",
    "model.norm": "final_norm", **_Q_NORMS,
    f"{_LAYER}.input_layernorm": "layers/attention_norm",
    f"{_LAYER}.pre_feedforward_layernorm": "layers/mlp_norm",
  })
)


def _qkv(tensor: str, transposed: bool = True, by_head: bool = False) -> dict:
  """Table entries of one matrix for queries, keys and values."""
  entries = {}
  for theirs, ours in (("weight", "kernel"), ("bias", "bias")):
    qkv = tuple(f"{_ATTENTION}/{n}/{ours}" for n in ("query", "key", "value"))
    entries[f"{tensor}.{theirs}"] = Content(qkv, transposed, by_head)
  return entries


_PHI3 = TensorTable(
  _qkv(f"{_LAYER}.self_attn.qkv_proj")
  | {f"{_LAYER}.mlp.gate_up_proj.weight": Content(
    (f"{_MLP}/gate/kernel", f"{_MLP}/up/kernel"), transposed=True)}
  | _OUTER | _PRE_NORMS
  | _linears(f"{_LAYER}.self_attn", _ATTENTION, {"o_proj": "output"})
  | _linears(f"{_LAYER}.mlp", _MLP, {"down_proj": "down"})
)
_STARCODER2 = TensorTable(
  _OUTER | _SELF_ATTENTION | _PRE_NORMS
  | _linears(f"{_LAYER}.mlp", _MLP, {"c_fc": "up", "c_proj": "down"})
)
_NEOX_LAYER = "gpt_neox.layers.{}"
_NEOX = TensorTable(
  {
    **_qkv(f"{_NEOX_LAYER}.attention.query_key_value", by_head=True),
    "gpt_neox.embed_in.weight": Content((EMBEDDING,)),
    "embed_out.weight": Content((HEAD,), transposed=True),
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
  ignored=tuple(f"{_NEOX_LAYER}.attention.{buffer}" for buffer in (
    "bias", "masked_bias", "rotary_emb.inv_freq",
  )),
  renamed=((r"^lm_head\.", "embed_out."),),
)
_GPT2_LAYER = "transformer.h.{}"
_GPT2 = TensorTable(
  {
    # Its Conv1D is a Linear that holds [in, out].
    **_qkv(f"{_GPT2_LAYER}.attn.c_attn", transposed=False),
    "transformer.wte.weight": Content((EMBEDDING,)),
    "transformer.wpe.weight": Content(("embed/position_embedding",)),
    "lm_head.weight": Content((HEAD,), transposed=True),
    **_linears(_GPT2_LAYER, "layers", {
      "attn.c_proj": "attention/output", "mlp.c_fc": "mlp/up",
      "mlp.c_proj": "mlp/down",
    }, transposed=False),
    **_norms({
      f"{_GPT2_LAYER}.ln_1": "layers/attention_norm",
      f"{_GPT2_LAYER}.ln_2": "layers/mlp_norm",
      "transformer.ln_f": "final_norm",
    }),
  },
  ignored=(f"{_GPT2_LAYER}.attn.bias", f"{_GPT2_LAYER}.attn.masked_bias"),
  # The first release has no prefix.
  renamed=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
)


def _mixture(layer: str, gate: str, up: str, down: str) -> TensorTable:
  """A Llama with norms of queries and keys, and experts."""
  names = {
    "gate": "router", f"experts.{{}}.{gate}": "experts/gate",
    f"experts.{{}}.{up}": "experts/up", f"experts.{{}}.{down}": "experts/down",
  }
  return TensorTable(
    _OUTER | _SELF_ATTENTION | _PRE_NORMS | _norms(_Q_NORMS)
    | _linears(layer, _MLP, names)
  )


_MIXTRAL = _mixture(f"{_LAYER}.block_sparse_moe", "w1", "w3", "w2")
_QWEN3_MOE = _mixture(f"{_LAYER}.mlp", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
  "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
  "gemma": _LLAMA, "gemma2": _SANDWICH, "gemma3_text": _SANDWICH,
  "gpt2": _GPT2, "gpt_neox": _NEOX, "phi3": _PHI3, "olmo2": _SANDWICH,
  "smollm3": _LLAMA, "starcoder2": _STARCODER2, "granite": _LLAMA,
  "mixtral": _MIXTRAL, "qwen3_moe": _QWEN3_MOE,
}
# fmt: on
