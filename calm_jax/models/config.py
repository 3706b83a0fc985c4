"""What a decoder is: one frozen dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.models.rope import Rope

NORMS = ("rms", "rms_plus_one", "layer")
QK_NORMS = (None, "head", "full")
_KINDS = {"int": int, "float": (int, float), "bool": bool}
ATTENTIONS = ("xla", "cudnn", "splash")
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_exact")
REMATS = ("auto", "none", "dots", "full")
# Fields that say how a model is computed, and not which model it is.
HOW_COMPUTED = (
  "dtype", "unroll", "attention", "remat", "loss_chunk", "place"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture of one decoder-only language model.

  Families differ in these fields only; `models/decoder.py` has one decoder.
  Layers are counted from 0 here.

  Attributes:
    vocab_size: V, rows of the embedding table.
    width: D, the width of the residual stream.
    num_layers: number of blocks.
    num_heads: N, query heads.
    num_kv_heads: K, key-value heads; divides N.
    head_dim: H, width of one head.
    mlp_width: F, hidden width of the MLP.
    max_length: longest sequence the model was made for, in tokens.
    activation: non-linearity of the MLP, one of ACTIVATIONS; "gelu" is its
      tanh approximation.
    gated_mlp: down(act(gate(x)) * up(x)), or else down(act(up(x))).
    mlp_bias: whether the matrices of the MLP have biases.
    num_experts: of a mixture in place of each MLP, each of mlp_width; 0 for an
      ordinary MLP.
    experts_per_token: how many of them a token goes through.
    normalise_experts: whether a token's experts have weights that sum to one,
      or their shares among all experts.
    norm: "rms"; "rms_plus_one", which scales by 1 + its parameter; or "layer",
      which subtracts the mean and has a bias.
    norm_eps: added to the mean square, or the variance, inside the norm.
    pre_norm: whether attention and MLP read normed hidden states.
    post_norm: whether their outputs are normed before they are added.
    parallel_residual: whether the MLP reads the block's input, not the sum of
      that and the attention's output.
    residual_scale: attention's and MLP's outputs are multiplied by it.
    rope: rotary positions; those of whole heads if None, unless
      `learned_positions`.
    local_rope: those of layers with a window; None for `rope` there too.
    nope_layers: layers that know of no positions.
    learned_positions: positions are a table of max_length embeddings, added to
      the tokens' before the first layer, and there is no rope.
    window: a query sees its latest `window` keys, its own among them; all of
      them if None.
    full_layers: layers without that window.
    attention_bias: whether q, k and v have biases.
    output_bias: whether attention's output projection has a bias.
    qk_norm: queries and keys are normed "head" by head, over their "full"
      width, or (None) not at all.
    attention_scale: of the scores; H^-1/2 if None.
    scale_by_depth: scores are divided by the layer's number, from 1, too.
    attention_cap: c, scores become c tanh(scores / c); None for none.
    logit_scale: logits are multiplied by it.
    logit_cap: c, logits become c tanh(logits / c); None for none.
    embedding_scale: embeddings are multiplied by it; rounded to `dtype`.
    tie_embeddings: whether the head is the embedding table, transposed.
    dtype: dtype of the computation; norms, softmax and logits are float32
      at least.
    unroll: layers compiled out per step of the scan over layers; more is
      faster for small models on a CPU, and compiles for longer.
    attention: the kernel of training and scoring, one of ATTENTIONS; see
      `attention.choose`. Decoding is "xla" always.
    remat: what of a layer the backward pass computes again: "none" of it, all
      but its matrix products ("dots"), or the "full" layer; "auto" is "none"
      where all layers run at once, or else "dots".
    loss_chunk: logits that exist at a time in training, on each device; 0 for
      all of them.
    place: says where arrays lie while several devices compute: `weight(name,
      array)` of a layer, `states(array)` [B, L, D] between layers and
      `cache(tree)`, each of which returns what it is given, and how a kernel
      of attention is shared by them. None on one device.

  Raises:
    InputError: values that contradict each other.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  max_length: int = 2048
  activation: str = "silu"
  gated_mlp: bool = True
  mlp_bias: bool = False
  num_experts: int = 0
  experts_per_token: int = 0
  normalise_experts: bool = True
  norm: str = "rms"
  norm_eps: float = 1e-5
  pre_norm: bool = True
  post_norm: bool = False
  parallel_residual: bool = False
  residual_scale: float = 1.0
  rope: Rope | None = None
  local_rope: Rope | None = None
  nope_layers: tuple[int, ...] = ()
  learned_positions: bool = False
  window: int | None = None
  full_layers: tuple[int, ...] = ()
  attention_bias: bool = False
  output_bias: bool = False
  qk_norm: str | None = None
  attention_scale: float | None = None
  scale_by_depth: bool = False
  attention_cap: float | None = None
  logit_scale: float = 1.0
  logit_cap: float | None = None
  embedding_scale: float = 1.0
  tie_embeddings: bool = False
  dtype: str = "float32"
  unroll: int = 1
  # These change no number but its last bits, so they are no part of what a run
  # is told by.
  attention: str = dataclasses.field(default="xla", repr=False)
  remat: str = dataclasses.field(default="auto", repr=False)
  loss_chunk: int = dataclasses.field(default=0, repr=False)
  place: Any = dataclasses.field(default=None, repr=False)

  def __post_init__(self):
    for field in dataclasses.fields(self):
      kind, _, nullable = field.type.partition(" | ")
      value = getattr(self, field.name)
      if kind not in _KINDS or (value is None and nullable):
        continue
      is_bool = isinstance(value, bool)  # which Python takes for an int
      if is_bool != (kind == "bool") or not isinstance(value, _KINDS[kind]):
        raise InputError(f"{field.name}={value!r} is no {field.type}")
    if self.num_heads % self.num_kv_heads:
      raise InputError(
        f"num_heads={self.num_heads} is not a multiple of "
        f"num_kv_heads={self.num_kv_heads}"
      )
    for name, known in (
      ("activation", ACTIVATIONS), ("norm", NORMS), ("qk_norm", QK_NORMS),
      ("attention", ATTENTIONS),
      ("remat", REMATS),
    ):  # fmt: skip
      if getattr(self, name) not in known:
        raise InputError(f"{name}={getattr(self, name)!r} is none of {known}")
    if self.num_experts and (self.mlp_bias or not self.gated_mlp):
      raise InputError("experts are gated MLPs without biases")
    if self.window is not None and self.window < 1:
      raise InputError(f"window={self.window} hides a token from itself")
    if self.rope is None and not self.learned_positions:
      object.__setattr__(self, "rope", Rope(self.head_dim))
    if self.rope is not None and self.learned_positions:
      raise InputError("learned_positions=True goes without a rope")
    for rope in (self.rope, self.local_rope):
      if rope is not None and rope.rotary_dim > self.head_dim:
        raise InputError(
          f"rotary_dim={rope.rotary_dim} exceeds head_dim={self.head_dim}"
        )
