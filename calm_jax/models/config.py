"""The architecture of a decoder, and apart from it the way it is computed."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from calm_jax.core.errors import InputError, check_choice
from calm_jax.models.rope import Rope

NORMS = ("rms", "rms_plus_one", "layer")
QK_NORMS = (None, "head", "full")
ATTENTIONS = ("xla", "cudnn", "splash")
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_exact")
REMATS = ("auto", "none", "dots", "full")


def _check_scalars(instance: Any) -> None:
  """Raises InputError unless the numbers and bools have their types."""
  for name, hint in typing.get_type_hints(type(instance)).items():
    value, kinds = getattr(instance, name), typing.get_args(hint) or (hint,)
    if not set(kinds) <= {int, float, bool, type(None)}:
      continue
    if isinstance(value, bool):  # which Python counts among the ints
      fits = bool in kinds
    else:
      is_real = float in kinds and isinstance(value, int)
      fits = is_real or isinstance(value, kinds)
    if not fits:
      kind = getattr(hint, "__name__", hint)
      raise InputError(f"{name}={value!r} is no {kind}")


class Placement(typing.Protocol):
  """Places a model's arrays while several devices compute it.

  Each method returns the array that it is given, with a sharding constraint.

  Attributes:
    sequence: the number of pieces that the queries of an attention kernel are
      cut into along their length.
  """

  sequence: int

  def weight(self, name: str, weight: Any) -> Any:
    """One layer's leaf, by its name in the model's tree."""

  def states(self, x_BLD: Any) -> Any:
    """Hidden states between two layers."""

  def cache(self, cache: Any) -> Any:
    """The KV cache."""

  def attention(self, function: Callable, kernel: Any, *arrays: Any) -> Any:
    """Calls an attention kernel on each device's rows and heads."""


@dataclasses.dataclass(frozen=True)
class Compute:
  """The way a decoder is computed, which is no part of which model it is.

  Attributes:
    dtype: dtype of the computation; norms, softmax and logits are float32
      at least.
    unroll: layers compiled out per step of the scan over layers; more is
      faster for small models on a CPU, and compiles for longer.
    attention: the kernel of training and scoring, one of ATTENTIONS; see
      `attention.choose`. Decoding always uses "xla".
    remat: what the backward pass recomputes of a layer: nothing ("none"), all
      but its matrix products ("dots"), or the whole layer ("full"); "auto" is
      "none" where all layers run at once, or else "dots".
    loss_chunk: logits that exist at a time in training, on each device; 0 for
      all of them.
    place: where the arrays lie on several devices; None on one device.

  Raises:
    InputError: an attention kernel or a remat that does not exist.
  """

  dtype: str = "float32"
  unroll: int = 1
  attention: str = "xla"
  remat: str = "auto"
  loss_chunk: int = 0
  place: Placement | None = None

  def __post_init__(self):
    _check_scalars(self)
    check_choice("attention", self.attention, ATTENTIONS)
    check_choice("remat", self.remat, REMATS)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture of a decoder-only language model.

  Families of models differ in these fields only. Layers are counted from 0.

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
    num_experts: experts of mlp_width in place of each MLP; 0 for an MLP.
    experts_per_token: experts that a token goes through.
    normalise_experts: whether the weights of a token's experts sum to one; if
      not, they are shares among all experts.
    norm: "rms"; "rms_plus_one", which scales by 1 + its parameter; or "layer",
      which subtracts the mean and has a bias.
    norm_eps: added to the mean square, or the variance, inside the norm.
    pre_norm: whether attention and MLP read normed hidden states.
    post_norm: whether their outputs are normed before they are added.
    parallel_residual: whether the MLP reads the block's input, not the sum of
      that and the attention's output.
    residual_scale: factor of the outputs of attention and MLP.
    rope: rotary positions; None for the default ones, or `learned_positions`.
    local_rope: rotary positions of layers with a window; None for `rope`.
    nope_layers: layers without positions.
    learned_positions: whether a table of max_length embeddings is added before
      the first layer, in place of a rope.
    window: keys that a query sees, its own the latest; None for all of them.
    full_layers: layers without that window.
    attention_bias: whether q, k and v have biases.
    output_bias: whether attention's output projection has a bias.
    qk_norm: queries and keys are normed "head" by head, over their "full"
      width, or (None) not at all.
    attention_scale: factor of the scores; H^-1/2 if None.
    scale_by_depth: scores are divided by the layer's number, from 1, too.
    attention_cap: c, scores become c tanh(scores / c); None for none.
    logit_scale: factor of the logits.
    logit_cap: c, logits become c tanh(logits / c); None for none.
    embedding_scale: factor of the embeddings, rounded to the dtype.
    tie_embeddings: whether the head is the embedding table, transposed.
    compute: the way the model is computed.

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
  compute: Compute = Compute()

  def __post_init__(self):
    _check_scalars(self)
    check_choice("activation", self.activation, ACTIVATIONS)
    check_choice("norm", self.norm, NORMS)
    check_choice("qk_norm", self.qk_norm, QK_NORMS)
    if self.num_heads % self.num_kv_heads:
      raise InputError(
        f"num_heads={self.num_heads} is not a multiple of "
        f"num_kv_heads={self.num_kv_heads}"
      )
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

  def with_compute(self, **changes: Any) -> ModelConfig:
    """Returns the same model with other fields of `compute`."""
    compute = dataclasses.replace(self.compute, **changes)
    return dataclasses.replace(self, compute=compute)
