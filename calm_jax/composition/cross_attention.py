"""Cross-attention of the anchor to an augmenting model, and its mask (§3.1).

B batch, L anchor length, M augmenting length, D anchor width, E augmenting
width, N heads, H head width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from calm_jax.core.errors import InputError
from calm_jax.models import rope
from calm_jax.models.attention import SegmentMask, attend
from calm_jax.models.cache import blocks
from calm_jax.models.config import ModelConfig
from calm_jax.models.layers import Linear, RMSNorm, at_least_float32

Array = jax.Array


class CrossAttention(nn.Module):
  """f_cross(f_proj(H_A), H_B) of §3.1, in two halves.

  `keys_values` needs the augmenting model only, so that decoding caches its
  result; `attend` gives what is added to the anchor's residual stream.
  """

  anchor: ModelConfig
  norm: bool
  output_init: str
  positions: str = "none"
  folded: bool = False  # f_proj is in W_K and W_V already; see `fold`

  def setup(self):
    width, dtype = self.anchor.width, self.anchor.compute.dtype
    inner = self.anchor.num_heads * (width // self.anchor.num_heads)
    output_init = {
      "zeros": nn.initializers.zeros, "normal": nn.initializers.normal(0.02)
    }[self.output_init]  # fmt: skip
    if not self.folded:
      self.projection = Linear(width, dtype=dtype)
    self.query = Linear(inner, dtype=dtype)
    self.key = Linear(inner, dtype=dtype)
    self.value = Linear(inner, dtype=dtype)
    self.output = Linear(width, dtype=dtype, kernel_init=output_init)
    if self.norm:
      self.projection_norm = RMSNorm(self.anchor.norm_eps)
      self.query_norm = RMSNorm(self.anchor.norm_eps)

  def _heads(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.anchor.num_heads, -1)

  def _turned(self, x_BLNH: Array, positions_BL: Array) -> Array:
    """Queries or keys by their positions, if the composition knows of them."""
    if self.positions == "none":
      return x_BLNH
    tables = rope.tables(
      rope.Rope(x_BLNH.shape[-1]), positions_BL, x_BLNH.dtype
    )
    return rope.rotate(x_BLNH, tables)

  def keys_values(self, h_BME: Array, positions_BM: Array) -> dict[str, Array]:
    """Keys and values, each [B, N, M, H], as a `cache` holds them."""
    if self.norm:
      h_BME = self.projection_norm(h_BME)
    if not self.folded:
      h_BME = self.projection(h_BME)
    return {
      "key": self._turned(self._heads(self.key(h_BME)), positions_BM).swapaxes(
        1, 2
      ),
      "value": self._heads(self.value(h_BME)).swapaxes(1, 2),
    }

  def _query(self, x_BLD: Array, mask_BLM: Array | SegmentMask) -> Array:
    q_BLNH = self._heads(
      self.query(self.query_norm(x_BLD) if self.norm else x_BLD)
    )
    # A position stands where the newest token that it sees does.
    if isinstance(mask_BLM, SegmentMask):
      return self._turned(q_BLNH, mask_BLM.positions)
    return self._turned(q_BLNH, jnp.maximum(mask_BLM.sum(-1) - 1, 0))

  def attend(
    self, x_BLD: Array, keys_values: dict, mask_BLM: Array | SegmentMask
  ) -> Array:
    """What is added to the residual stream, [B, L, D].

    `keys_values` may be a cache of them, of one row. With a `SegmentMask` for a
    mask, both models read the same tokens.
    """
    by_segments = isinstance(mask_BLM, SegmentMask)
    mask = mask_BLM if by_segments else mask_BLM[:, None]
    if keys_values["key"].ndim == 5:
      key_blocks = blocks(keys_values, 0, mask)
    else:
      key_blocks = [(keys_values["key"], keys_values["value"], mask)]
    q_BLNH = self._query(x_BLD, mask_BLM)
    out_BLNH = attend(q_BLNH, key_blocks, place=self.anchor.compute.place)
    if not by_segments:
      # A position that sees nothing gets nothing; the softmax of an empty row
      # would average over what it must not see.
      sees_BL = mask_BLM.any(-1)
      out_BLNH = jnp.where(sees_BL[..., None, None], out_BLNH, 0)
    return self.output(out_BLNH.reshape(*out_BLNH.shape[:2], -1))

  def probabilities(
    self, x_BLD: Array, keys_values: dict, mask_BLM: Array
  ) -> Array:
    """Where each head looks, float32 [B, N, L, M]; for pictures."""
    q_BLNH = self._query(x_BLD, mask_BLM)
    scores = jnp.einsum("blnh,bnmh->bnlm", q_BLNH, keys_values["key"])
    scores = scores.astype(at_least_float32(scores.dtype))
    scores = scores / q_BLNH.shape[-1] ** 0.5
    lowest = jnp.finfo(scores.dtype).min
    return jax.nn.softmax(jnp.where(mask_BLM[:, None], scores, lowest))

  def __call__(self, x_BLD: Array, h_BME: Array, mask_BLM: Array) -> Array:
    """Both halves, of rows that are one sequence each."""
    positions_BM = jnp.broadcast_to(jnp.arange(h_BME.shape[1]), h_BME.shape[:2])
    return self.attend(x_BLD, self.keys_values(h_BME, positions_BM), mask_BLM)


def fold(params: dict) -> dict:
  """The tree with each f_proj multiplied into W_K and W_V, for inference.

  Both are linear, so the composed model stays the same but for rounding; a
  position of the augmenting model then costs 2 D_A D_B instead of
  D_A D_B + 2 D_B^2. Training needs the factors apart.
  """

  def one(connection):
    rest = {k: v for k, v in connection.items() if k != "projection"}
    first = connection["projection"]["kernel"]
    for name in ("key", "value"):
      both = jnp.matmul(first, connection[name]["kernel"], precision="highest")
      rest[name] = {"kernel": both}
    return rest

  if "composition" not in params:
    return params
  return params | {
    "composition": {
      name: {c: one(p) for c, p in connections.items()}
      for name, connections in params["composition"].items()
    }
  }


def visible_tokens(
  visibility: str,
  shape: tuple[int, int],
  prompt_ends_BL: Array | None = None,
  first_slot: Array | int = 0,
) -> Array:
  """How many slots of the augmenting row each anchor position may see.

  For two models on the same tokens; see `Augmenting.visibility`.

  Args:
    visibility: one of VISIBILITIES.
    shape: (B, L) of the anchor's tokens.
    prompt_ends_BL: the slot after the prompt of each token's segment; needed
      for "encoder" only.
    first_slot: the slot of the first token.

  Returns:
    int32 [B, L]: the position may attend to slots s < visible[b, t].
  """
  through_BL = jnp.broadcast_to(first_slot + jnp.arange(1, shape[1] + 1), shape)
  if visibility == "causal":
    return through_BL
  if visibility == "unmasked":
    return jnp.full(shape, jnp.iinfo(jnp.int32).max)
  if prompt_ends_BL is None:
    raise InputError("visibility='encoder' needs to know where prompts end")
  return jnp.minimum(prompt_ends_BL, through_BL)


def limit_visible(
  visibility: str, visible_BL: Array, prompt_ends_BL: Array
) -> Array:
  """What `visible_tokens` says, for an augmenting model with other tokens.

  Args:
    visibility: one of VISIBILITIES.
    visible_BL: how many slots of the augmenting row each position may see if
      causal; see `alignment`.
    prompt_ends_BL: as there.

  Returns:
    int32 [B, L], as there.
  """
  if visibility == "causal":
    return visible_BL
  if visibility == "unmasked":
    return jnp.full_like(visible_BL, jnp.iinfo(jnp.int32).max)
  last_BL = jnp.maximum(prompt_ends_BL - 1, 0)
  at_prompt_BL = jnp.take_along_axis(visible_BL, last_BL, axis=1)
  return jnp.minimum(at_prompt_BL, visible_BL)


def cross_mask(
  visible_BL: Array, query_segments_BL: Array, key_segments_BM: Array
) -> Array:
  """The one mask of composition (design: visibility), bool [B, L, M]."""
  slots_M = jnp.arange(key_segments_BM.shape[1])
  same_BLM = query_segments_BL[:, :, None] == key_segments_BM[:, None, :]
  return (slots_M < visible_BL[:, :, None]) & same_BLM
