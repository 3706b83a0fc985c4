"""Cross-attention of the anchor to an augmenting model (§3.1).

B batch, L anchor length, M augmenting length, D anchor width, E augmenting
width, N heads, H head width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.models import rope
from calm_jax.models.attention import SegmentMask, attend
from calm_jax.models.cache import blocks
from calm_jax.models.config import ModelConfig
from calm_jax.models.layers import Linear, Norm, at_least_float32

Array = jax.Array


def kernel_of(anchor: ModelConfig) -> str:
  """Chooses the kernel of an anchor's cross-attentions, without a cache.

  It is the anchor's own, or "pieces" if cuDNN does not take the width of their
  heads. It takes that of the anchor's, or would not have been chosen for it.
  """
  kernel, width = anchor.compute.attention, anchor.width // anchor.num_heads
  fits = width % 8 == 0 and width <= max(anchor.head_dim, 128)
  return "pieces" if kernel == "cudnn" and not fits else kernel


def reads_segments(anchor: ModelConfig) -> bool:
  """Returns whether cross-attention reads a `SegmentMask`, without a cache."""
  kernel = kernel_of(anchor)
  return anchor.with_compute(attention=kernel).compute.reads_segments


class CrossAttention(nn.Module):
  """f_cross(f_proj(H_A), H_B) of §3.1, in two halves.

  `keys_values` needs the augmenting model only, so that decoding caches its
  result; `attend` gives what is added to the anchor's residual stream.
  """

  anchor: ModelConfig
  joined: Augmenting
  folded: bool = False  # f_proj is in W_K and W_V already; see `fold`

  def setup(self):
    width, dtype = self.anchor.width, self.anchor.compute.dtype
    inner = self.anchor.num_heads * (width // self.anchor.num_heads)
    output_init = nn.initializers.zeros
    if self.joined.output_init == "normal":
      output_init = nn.initializers.normal(0.02)
    if not self.folded:
      self.projection = Linear(width, dtype=dtype)
    self.query = Linear(inner, dtype=dtype)
    self.key = Linear(inner, dtype=dtype)
    self.value = Linear(inner, dtype=dtype)
    self.output = Linear(width, dtype=dtype, kernel_init=output_init)
    if self.joined.norm:
      self.projection_norm = Norm(self.anchor.norm_eps)
      self.query_norm = Norm(self.anchor.norm_eps)

  def _heads(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.anchor.num_heads, -1)

  def _rotate(self, x_BLNH: Array, positions_BL: Array) -> Array:
    """Queries or keys, rotated by their positions with positions="rope"."""
    if self.joined.positions == "none":
      return x_BLNH
    rotary = rope.Rope(x_BLNH.shape[-1])
    return rope.rotate(x_BLNH, rope.tables(rotary, positions_BL, x_BLNH.dtype))

  def keys_values(self, h_BME: Array, positions_BM: Array) -> dict[str, Array]:
    """Keys and values, each [B, N, M, H], as a `cache` holds them."""
    if self.joined.norm:
      h_BME = self.projection_norm(h_BME)
    if not self.folded:
      h_BME = self.projection(h_BME)
    key_BMNH = self._rotate(self._heads(self.key(h_BME)), positions_BM)
    key_BNMH = key_BMNH.swapaxes(1, 2)
    value_BNMH = self._heads(self.value(h_BME)).swapaxes(1, 2)
    return {"key": key_BNMH, "value": value_BNMH}

  def _query(self, x_BLD: Array, mask_BLM: Array | SegmentMask) -> Array:
    if self.joined.norm:
      x_BLD = self.query_norm(x_BLD)
    q_BLNH = self._heads(self.query(x_BLD))
    # A query's position is that of the newest key it may attend to.
    if isinstance(mask_BLM, SegmentMask):
      return self._rotate(q_BLNH, mask_BLM.positions)
    return self._rotate(q_BLNH, jnp.maximum(mask_BLM.sum(-1) - 1, 0))

  def attend(
    self, x_BLD: Array, keys_values: dict, mask_BLM: Array | SegmentMask
  ) -> Array:
    """The contribution to the anchor's residual stream, [B, L, D].

    `keys_values` may be a cache. The mask says which keys each position may
    attend to: a `SegmentMask`, if `reads_segments` and tokens are the same.
    """
    by_segments = isinstance(mask_BLM, SegmentMask)
    mask = mask_BLM if by_segments else mask_BLM[:, None]
    if keys_values["key"].ndim == 5:
      kernel, key_blocks = "xla", blocks(keys_values, 0, mask)
    else:
      kernel = kernel_of(self.anchor)
      if kernel == "splash" and not by_segments:
        kernel = "pieces"
      key_blocks = [(keys_values["key"], keys_values["value"], mask)]
    q_BLNH = self._query(x_BLD, mask_BLM)
    place = self.anchor.compute.place
    out_BLNH = attend(q_BLNH, key_blocks, kernel=kernel, place=place)
    if not by_segments:
      # A position that sees nothing gets nothing; the softmax of an empty row
      # would average over what it must not see.
      sees_BL = mask_BLM.any(-1)
      out_BLNH = jnp.where(sees_BL[..., None, None], out_BLNH, 0)
    out_BLD = self.output(out_BLNH.reshape(*out_BLNH.shape[:2], -1))
    if self.joined.output_scale == "none":
      return out_BLD
    wide_BLD = x_BLD.astype(at_least_float32(x_BLD.dtype))
    size_BL1 = jnp.mean(jnp.abs(wide_BLD), axis=-1, keepdims=True)
    return out_BLD * size_BL1.astype(out_BLD.dtype)

  def probabilities(
    self, x_BLD: Array, keys_values: dict, mask_BLM: Any
  ) -> Array:
    """Attention weights of each head, float32 [B, N, L, M], for pictures."""
    q_BLNH = self._query(x_BLD, mask_BLM)
    scores = jnp.einsum("blnh,bnmh->bnlm", q_BLNH, keys_values["key"])
    scores = scores.astype(at_least_float32(scores.dtype))
    scores /= q_BLNH.shape[-1] ** 0.5
    lowest = jnp.finfo(scores.dtype).min
    return jax.nn.softmax(jnp.where(mask_BLM[:, None], scores, lowest))

  def __call__(self, x_BLD: Array, h_BME: Array, mask_BLM: Array) -> Array:
    """Both halves, for rows of one segment each."""
    positions_BM = jnp.broadcast_to(jnp.arange(h_BME.shape[1]), h_BME.shape[:2])
    return self.attend(x_BLD, self.keys_values(h_BME, positions_BM), mask_BLM)


def init(rng: Array, spec: Composition) -> dict:
  """Fresh float32 parameters, {augmenting name: {connection: {...}}}."""
  params: dict = {}
  for name, joined in spec.augmenting:
    params[name] = {}
    for connection in joined.connections:
      rng, key = jax.random.split(rng)
      variables = CrossAttention(spec.anchor, joined).init(
        key,
        jnp.zeros((1, 1, spec.anchor.width)),
        jnp.zeros((1, 1, joined.config.width)),
        jnp.ones((1, 1, 1), bool),
      )
      params[name][connection.name] = variables["params"]
  return params


def param_shapes(spec: Composition) -> dict:
  """The tree of `init` as `jax.ShapeDtypeStruct`s, without computing it."""
  return jax.eval_shape(lambda: init(jax.random.key(0), spec))


def bound(
  params: dict, spec: Composition, name: str, connection: Connection
) -> CrossAttention:
  """The cross-attention of a connection with its parameters."""
  weights = params["composition"][name][connection.name]
  joined = dict(spec.augmenting)[name]
  folded = "projection" not in weights
  cross = CrossAttention(spec.anchor, joined, folded)
  return cross.bind({"params": weights})


def fold(params: dict) -> dict:
  """The tree with each f_proj multiplied into W_K and W_V, for inference.

  Both are linear, so the composed model stays the same but for rounding; a
  position of the augmenting model then costs 2 D_A D_B instead of
  D_A D_B + 2 D_B^2. Training needs the factors apart.
  """
  if "composition" not in params:
    return params

  def folded(connection):
    new = {k: v for k, v in connection.items() if k != "projection"}
    projection = connection["projection"]["kernel"]
    for name in ("key", "value"):
      kernel = connection[name]["kernel"]
      product = jnp.matmul(projection, kernel, precision="highest")
      new[name] = {"kernel": product}
    return new

  composition = {
    name: {c: folded(p) for c, p in connections.items()}
    for name, connections in params["composition"].items()
  }
  return params | {"composition": composition}
