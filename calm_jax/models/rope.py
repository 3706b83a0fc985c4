"""Rotary positions: the scalings of their frequencies, and the rotation.

B batch, L length, N heads, H head width, R = rotary_dim features rotated, of
which feature i < R/2 turns together with feature i + R/2.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.core.errors import InputError, check_choice

Array = jax.Array

KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
  """The rotation of the first features of queries and keys by positions.

  A kind other than "default" scales the frequencies: "linear", "dynamic" (NTK),
  "llama3", "yarn" (arXiv 2309.00071), "longrope" (2402.13753).
  """

  rotary_dim: int  # R; even, at most the head's width
  theta: float = 10_000.0  # base of the frequencies, theta^(-2i/R)
  kind: str = "default"
  factor: float = 1.0  # by which the length was extended
  original_length: int = 0  # tokens that the model was first trained for
  attention_factor: float = 1.0  # multiplies cosines and sines
  # llama3 scales waves longer than original_length / low_freq_factor, and keeps
  # those shorter than original_length / high_freq_factor.
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  # yarn keeps features that turn more often than beta_fast in original_length,
  # and scales wholly those that turn less often than beta_slow; with truncate
  # that range ends at whole features.
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  # longrope has R/2 divisors up to original_length, and as many beyond it.
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()

  def __post_init__(self):
    check_choice("rope_type", self.kind, KINDS)
    if self.rotary_dim < 2 or self.rotary_dim % 2:
      raise InputError(
        f"rotary positions need pairs of features, not {self.rotary_dim} of "
        "them: check head_dim and the fraction of it that is rotated"
      )
    if self.kind == "dynamic" and self.rotary_dim == 2:
      raise InputError("rope_type='dynamic' is not defined for one pair")
    if self.kind not in ("default", "linear") and self.original_length < 1:
      raise InputError(f"rope_type={self.kind!r} needs an original length")
    if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
      raise InputError(
        f"llama3 has high_freq_factor={self.high_freq_factor}, which does not "
        f"exceed low_freq_factor={self.low_freq_factor}"
      )
    counts = len(self.short_factors), len(self.long_factors)
    if self.kind == "longrope" and {*counts} != {self.rotary_dim // 2}:
      raise InputError(
        f"longrope has {counts[0]} short_factors and {counts[1]} long_factors, "
        f"but rotary_dim={self.rotary_dim} needs half as many of each"
      )


def _frequencies(rope: Rope) -> np.ndarray:
  """Radians per position, float64 [R/2], before lengths change them."""
  R = rope.rotary_dim
  plain = rope.theta ** (-np.arange(0, R, 2) / R)
  if rope.kind == "linear":
    return plain / rope.factor
  if rope.kind == "llama3":
    turns = rope.original_length * plain / (2 * np.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / rope.factor)
  if rope.kind == "yarn":

    def feature_that(turns):  # turns so often in the original length
      waves = rope.original_length / (turns * 2 * math.pi)
      return R * math.log(waves) / (2 * math.log(rope.theta))

    low, high = feature_that(rope.beta_fast), feature_that(rope.beta_slow)
    if rope.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    high += 0.001 * (low == high)
    scaled = np.clip((np.arange(R // 2) - low) / (high - low), 0, 1)
    return plain * (1 - scaled + scaled / rope.factor)
  return plain


def tables(
  rope: Rope, positions_BL: Array, dtype, lengths: Array | None = None
) -> tuple[Array, Array]:
  """Computes cosines and sines of the rotary angles.

  "dynamic" and "longrope" turn differently in longer sequences. transformers
  asks the longest row of a batch; here batch-mates change nothing.

  Args:
    rope, positions_BL: the rotation, and each token's position from 0.
    dtype: of the angles and the result, but at least float32.
    lengths: tokens in the whole sequence, [B], or [B, L] where rows are packed;
      by default each row's largest position + 1. In decoding with a cache,
      the length at the end, at every step: so all steps agree with one pass.

  Returns (cos, sin), each [B, L, 1, R/2], times the attention factor.
  """
  dtype = jnp.promote_types(dtype, jnp.float32)
  frequencies = jnp.asarray(_frequencies(rope), dtype)
  if rope.kind in ("dynamic", "longrope"):
    if lengths is None:
      lengths = positions_BL.max(axis=-1) + 1
    lengths = jnp.reshape(lengths, (positions_BL.shape[0], -1, 1, 1))
    if rope.kind == "dynamic":
      # theta grows by g^(R/(R-2)); its power -2i/R is g^(-2i/(R-2)).
      ratio = jnp.maximum(lengths / rope.original_length, 1).astype(dtype)
      growth = rope.factor * ratio - (rope.factor - 1)
      i2 = jnp.arange(0, rope.rotary_dim, 2, dtype=dtype)
      frequencies = frequencies * growth ** (-i2 / (rope.rotary_dim - 2))
    else:
      frequencies = frequencies / jnp.where(
        lengths > rope.original_length,
        jnp.asarray(rope.long_factors, dtype),
        jnp.asarray(rope.short_factors, dtype),
      )
  angles = positions_BL[..., None, None].astype(dtype) * frequencies
  scale = jnp.asarray(rope.attention_factor, dtype)
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
  x_BLNH: Array, rope: tuple[Array, Array], interleaved: bool = False
) -> Array:
  """Rotates pairs (i, i + R/2) of queries or keys by (cos, sin) of `tables`.

  If `interleaved`, the pairs are (2i, 2i + 1), and come back as (i, i + R/2):
  products of queries and keys do not depend on the order of their features.
  Those from R on pass through.
  """
  cos, sin = rope
  half = cos.shape[-1]
  x = x_BLNH.astype(cos.dtype)
  if interleaved:
    R = 2 * half
    x = jnp.concatenate([x[..., :R:2], x[..., 1:R:2], x[..., R:]], axis=-1)
  a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
  return y.astype(x_BLNH.dtype)
