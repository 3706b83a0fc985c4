"""The architecture of a decoder, and apart from it the way it is computed."""

import dataclasses
import typing
from typing import Any

from calm_jax.core.errors import InputError, check_choice
from calm_jax.models.rope import Rope

NORMS = ("rms", "rms_plus_one", "layer")
QK_NORMS = (None, "head", "full")
ATTENTIONS = ("xla", "pieces", "cudnn", "splash")
ACTIVATIONS = ("silu", "relu", "relu2", "gelu", "gelu_exact")
REMATS = ("none", "dots", "full")


def _check_scalars(instance: Any) -> None:
  """Raises InputError unless the numbers and bools have their types."""
  for name, hint in typing.get_type_hints(type(instance)).items():
    value, kinds = getattr(instance, name), typing.get_args(hint) or (hint,)
    if not set(kinds) <= {int, float, bool, type(None)}:
      continue
    if float in kinds:
      kinds = (*kinds, int)
    # Python counts a bool among the ints.
    is_bool = isinstance(value, bool)
    fits = bool in kinds if is_bool else isinstance(value, kinds)
    if not fits:
      kind = getattr(hint, "__name__", hint)
      raise InputError(f"{name}={value!r} is no {kind}")


@dataclasses.dataclass(frozen=True)
class Compute:
  """The way a decoder is computed, which is no part of which model it is."""

  dtype: str = "float32"  # norms, softmax and logits are float32 at least
  # Layers compiled out per step of the scan over layers; more is faster for
  # small models on a CPU, and compiles for longer.
  unroll: int = 1
  # The kernel of training and scoring; prompts are always read by "xla".
  attention: str = "xla"
  # Whether a row may hold several segments. If not, it holds one with padding
  # behind it, and "cudnn" is asked for causal attention without a mask array.
  packed: bool = True
  # What the backward pass recomputes of a layer: nothing ("none"), all but its
  # matrix products and attention kernels ("dots"), or all ("full").
  remat: str = "none"
  # Positions of a batch whose logits exist at a time in training, on each
  # device; 0 for all.
  loss_chunk: int = 0
  place: Any = None  # on several devices a `parallel.placement.ModelPlacement`

  def __post_init__(self):
    _check_scalars(self)
    check_choice("attention", self.attention, ATTENTIONS)
    check_choice("remat", self.remat, REMATS)

  @property
  def reads_segments(self) -> bool:
    """Tells whether the kernel reads a `SegmentMask`, not a mask array."""
    # The others take the first query they are given for that of the first key.
    is_whole = self.place is None or self.place.sequence == 1
    if self.attention == "cudnn":
      return is_whole and not self.packed
    return self.attention == "splash" or (
      self.attention == "pieces" and is_whole
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture of a decoder-only language model.

  Families of models differ in these fields only. Layers are counted from 0.
  Values that contradict each other raise InputError.
  """

  vocab_size: int  # V, rows of the embedding table
  width: int  # D, of the residual stream
  num_layers: int
  num_heads: int  # N, of queries
  num_kv_heads: int  # K, of keys and values; divides N
  head_dim: int  # H
  mlp_width: int  # F, hidden width of the MLP, or of each expert
  max_length: int = 2048  # tokens that the model was made for
  activation: str = "silu"  # "gelu" is its tanh approximation
  gated_mlp: bool = True  # down(act(gate(x)) * up(x)), or down(act(up(x)))
  mlp_bias: bool = False
  num_experts: int = 0  # in place of each MLP; 0 for an MLP
  experts_per_token: int = 0
  # Whether the weights of a token's experts sum to one, or are shares among all
  # experts.
  normalise_experts: bool = True
  # "rms_plus_one" scales by 1 + its parameter; "layer" has a mean and a bias.
  norm: str = "rms"
  norm_eps: float = 1e-5  # added to the mean square, or the variance
  pre_norm: bool = True  # of what attention and MLP read
  post_norm: bool = False  # of their outputs, before they are added
  parallel_residual: bool = False  # the MLP reads what the attention reads
  residual_scale: float = 1.0  # factor of the outputs of attention and MLP
  rope: Rope | None = None  # the default one, unless learned_positions
  local_rope: Rope | None = None  # of layers with a window; None for `rope`
  # Whether rope turns features (2i, 2i + 1) together, not those R/2 apart.
  interleaved_rope: bool = False
  nope_layers: tuple[int, ...] = ()  # layers without positions
  # (g, n): the queries at position p grow by 1 + g log(1 + floor(p / n)).
  query_growth: tuple[float, int] | None = None
  # A table of max_length embeddings before the first layer, and no rope.
  learned_positions: bool = False
  window: int | None = None  # latest keys that a query sees, its own too
  full_layers: tuple[int, ...] = ()  # layers without that window
  attention_bias: bool = False  # of q, k and v
  output_bias: bool = False  # of attention's output projection
  # Queries and keys are normed head by head, over their full width, or not.
  qk_norm: str | None = None
  attention_scale: float | None = None  # factor of the scores; H^-1/2 if None
  scale_by_depth: bool = False  # scores are divided by the layer's number + 1
  attention_cap: float | None = None  # c, scores become c tanh(scores / c)
  logit_scale: float = 1.0
  logit_cap: float | None = None  # c, logits become c tanh(logits / c)
  embedding_scale: float = 1.0  # rounded to the dtype
  tie_embeddings: bool = False  # the head is the embedding table, transposed
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

  def with_compute(self, **changes: Any) -> typing.Self:
    """Returns the same model with other fields of `compute`."""
    compute = dataclasses.replace(self.compute, **changes)
    return dataclasses.replace(self, compute=compute)
