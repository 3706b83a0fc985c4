"""What a decoder is: one frozen dataclass, read from a config.json."""

from __future__ import annotations

import dataclasses

from calm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture of one decoder-only language model.

  Families differ in these fields only; `models/decoder.py` has one decoder.

  Attributes:
    vocab_size: V, rows of the embedding table.
    width: D, the width of the residual stream.
    num_layers: number of blocks.
    num_heads: N, query heads.
    num_kv_heads: K, key-value heads; divides N.
    head_dim: H, width of one head.
    mlp_width: F, hidden width of the gated MLP.
    max_length: longest sequence the model was made for, in tokens.
    activation: non-linearity of the MLP's gate: "silu", "relu", or "gelu"
      (its tanh approximation); a name in `jax.nn`.
    norm_eps: added to the mean square inside the RMS norm.
    rope_theta: base of the rotary frequencies.
    tie_embeddings: whether the head is the embedding table, transposed.
    attention_bias: whether q, k, v and the output projection have biases.
    mlp_bias: whether the three matrices of the MLP have biases.
    dtype: dtype of the computation; norms, softmax and logits are float32
      at least.
    unroll: layers compiled out per step of the scan over layers; more is
      faster for small models on a CPU, and compiles for longer.
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
  norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  tie_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  dtype: str = "float32"
  unroll: int = 1

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise InputError(
        f"num_heads={self.num_heads} is not a multiple of "
        f"num_kv_heads={self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise InputError(
        f"head_dim={self.head_dim} is odd: rotary positions need pairs"
      )
