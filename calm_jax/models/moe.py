"""Mixtures of experts in place of the MLP: Mixtral's and Qwen3-MoE's.

T tokens, D width, F hidden width of one expert, X experts, k experts per
token, R = T k rows of work: one for each token at each of its experts.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from calm_jax.models.config import ModelConfig
from calm_jax.models.layers import activation, at_least_float32
from calm_jax.models.quantisation import matmul

Array = jax.Array


class MoE(nn.Module):
  """Gated MLPs, of which each token goes through the k best.

  y = sum over the token's experts e of w_e down_e(act(gate_e(x)) * up_e(x)).
  There is no capacity, and no token changes another.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: Array, layer: Array | int | None = None) -> Array:
    """Computes the experts' weighted sum, [B, L, D] in x's dtype.

    The experts may be those of all layers in one stack, and `layer` says which:
    to slice a layer from it would copy all, where a step of decoding needs few.
    """
    c = self.config
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    wide = at_least_float32(c.compute.dtype)
    router_DX = Kernel((x_TD.shape[-1], c.num_experts), name="router")()
    # Default precisions of some devices round enough to choose other experts.
    logits_TX = jnp.matmul(
      x_TD.astype(wide), router_DX.astype(wide), precision="highest"
    )
    best_Tk, expert_Tk = jax.lax.top_k(logits_TX, c.experts_per_token)
    among = best_Tk if c.normalise_experts else logits_TX
    total = jax.nn.logsumexp(among, axis=-1, keepdims=True)
    y_TkD = Experts(c, name="experts")(x_TD, expert_Tk, layer)
    y_TD = jnp.einsum("tk,tkd->td", jnp.exp(best_Tk - total), y_TkD)
    return y_TD.reshape(x_BLD.shape).astype(x_BLD.dtype)


class Kernel(nn.Module):
  """A kernel [in, out], or the kernels of all experts [X, in, out]."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self) -> Array:
    if self.has_variable("params", "kernel"):  # of one layer, or stacked
      return self.get_variable("params", "kernel")
    return self.param("kernel", nn.initializers.lecun_normal(), self.shape)


class Experts(nn.Module):
  """The gated MLPs of all experts, each on the tokens sent to it.

  `jax.lax.ragged_dot` on a CPU multiplies all rows with all experts; so rows
  are sorted into blocks of one expert each, computed one after the other.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_TD: Array, expert_Tk: Array, layer=None) -> Array:
    c, D = self.config, x_TD.shape[-1]
    X, F, act = c.num_experts, c.mlp_width, activation(c.activation)
    gate_XDF = Kernel((X, D, F), name="gate")()
    up_XDF = Kernel((X, D, F), name="up")()
    down_XFD = Kernel((X, F, D), name="down")()
    index = (layer,) if jax.tree.leaves(gate_XDF)[0].ndim == 4 else ()
    expert_N, token_NS, slot_Tk = blocks(
      expert_Tk, X, block_size(expert_Tk.size, X)
    )

    def run_block(block):
      expert, x_SD = block
      gate, up, down = jax.tree.map(
        lambda p: p[*index, expert], (gate_XDF, up_XDF, down_XFD)
      )
      return matmul(act(matmul(x_SD, gate)) * matmul(x_SD, up), down)

    # Or else each block's matrices are kept for the backward pass.
    policy = jax.checkpoint_policies.dots_saveable
    run_block = jax.checkpoint(run_block, policy=policy, prevent_cse=False)
    x_TD = x_TD.astype(c.compute.dtype)
    x_NSD = x_TD.at[token_NS].get(mode="fill", fill_value=0)
    y_NSD = jax.lax.map(run_block, (expert_N, x_NSD))
    return y_NSD.reshape(-1, D)[slot_Tk]


def block_size(rows: int, num_experts: int) -> int:
  """Chooses the slots of a block: so that few are empty, but at most 512."""
  return 2 ** min(9, max(0, math.floor(math.log2(rows / num_experts / 2))))


def blocks(
  expert_Tk: Array, num_experts: int, size: int
) -> tuple[Array, Array, Array]:
  """Sorts rows into N blocks of S = `size` slots, each of one expert.

  Returns expert_N, the expert of each block; token_NS, the token in each slot
  (T if it is empty); slot_Tk, the slot of each row, through all blocks.
  """
  (T, k), R = expert_Tk.shape, expert_Tk.size
  busy = min(num_experts, R)
  N = busy + (R - busy) // size
  order_R = jnp.argsort(expert_Tk.reshape(-1))
  expert_R = expert_Tk.reshape(-1)[order_R]
  rows_X = jnp.bincount(expert_R, length=num_experts)
  blocks_X = -(-rows_X // size)
  last_X = jnp.cumsum(blocks_X)
  skipped_X = size * (last_X - blocks_X) - (jnp.cumsum(rows_X) - rows_X)
  slot_R = jnp.arange(R) + skipped_X[expert_R]
  token_NS = jnp.full(N * size, T).at[slot_R].set(order_R // k)
  slot_Tk = jnp.zeros(R, slot_R.dtype).at[order_R].set(slot_R)
  expert_N = jnp.searchsorted(last_X, jnp.arange(N), side="right")
  expert_N = jnp.minimum(expert_N, num_experts - 1)
  return expert_N, token_NS.reshape(N, size), slot_Tk.reshape(T, k)
