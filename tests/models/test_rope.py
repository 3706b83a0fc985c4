"""Rotary positions against the formulas, spelled out in float64."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.core.errors import InputError
from calm_jax.models import rope
from calm_jax.models.rope import Rope

R, THETA, ORIGINAL = 10, 313.0, 23
SHORT = (1.0, 1.1, 1.3, 1.7, 2.5)
LONG = (1.2, 2.0, 3.5, 5.5, 9.0)
KINDS = {
  "default": {},
  "linear": {"factor": 3.5},
  "dynamic": {"factor": 2.5, "original_length": ORIGINAL},
  "llama3": {
    "factor": 5.0, "original_length": ORIGINAL, "low_freq_factor": 0.7,
    "high_freq_factor": 2.9,
  },
  "yarn": {
    "factor": 4.0, "original_length": ORIGINAL, "beta_fast": 3.0,
    "beta_slow": 0.4, "truncate": False, "attention_factor": 1.23,
  },
  "longrope": {
    "original_length": ORIGINAL, "short_factors": SHORT, "long_factors": LONG,
    "attention_factor": 0.8,
  },
}  # fmt: skip


def make(kind: str, **changes) -> Rope:
  return Rope(**{"rotary_dim": R, "theta": THETA, "kind": kind}
              | KINDS[kind] | changes)  # fmt: skip


def turn(r: Rope, i: int, length: int) -> float:
  """Radians per position of pair i in a sequence so long: the papers."""
  base, plain = r.theta, r.theta ** (-2 * i / r.rotary_dim)
  if r.kind == "linear":
    return plain / r.factor
  if r.kind == "dynamic":
    if length > r.original_length:
      growth = r.factor * length / r.original_length - (r.factor - 1)
      base = base * growth ** (r.rotary_dim / (r.rotary_dim - 2))
    return 1 / base ** (2 * i / r.rotary_dim)
  if r.kind == "llama3":
    wave = 2 * math.pi / plain
    if wave < r.original_length / r.high_freq_factor:
      return plain
    if wave > r.original_length / r.low_freq_factor:
      return plain / r.factor
    smooth = (r.original_length / wave - r.low_freq_factor) / (
      r.high_freq_factor - r.low_freq_factor
    )
    return (1 - smooth) * plain / r.factor + smooth * plain
  if r.kind == "yarn":

    def bound(turns):
      return (
        r.rotary_dim
        * math.log(r.original_length / (turns * 2 * math.pi))
        / (2 * math.log(base))
      )

    low, high = bound(r.beta_fast), bound(r.beta_slow)
    if r.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r.rotary_dim - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return plain / r.factor * ramp + plain * (1 - ramp)
  if r.kind == "longrope":
    beyond = length > r.original_length
    return plain / (r.long_factors if beyond else r.short_factors)[i]
  return plain


def spelled(r: Rope, positions, lengths):
  """cos, sin [B, L, 1, R/2]; lengths [B, L]."""
  cos = np.zeros((*positions.shape, 1, r.rotary_dim // 2))
  sin = np.zeros_like(cos)
  for (b, slot), position in np.ndenumerate(positions):
    for i in range(r.rotary_dim // 2):
      angle = position * turn(r, i, lengths[b, slot])
      cos[b, slot, 0, i] = r.attention_factor * math.cos(angle)
      sin[b, slot, 0, i] = r.attention_factor * math.sin(angle)
  return cos, sin


# Rows within the original length, at its end, just beyond, far beyond.
POSITIONS = np.stack([np.arange(7) + shift for shift in (0, 16, 17, 90)])


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_formulas(kind, x64):
  lengths = POSITIONS.max(axis=-1, keepdims=True) + 1 + 0 * POSITIONS
  got = rope.tables(make(kind), jnp.asarray(POSITIONS), "float64")
  for a, b in zip(got, spelled(make(kind), POSITIONS, lengths), strict=True):
    assert a.dtype == jnp.float64
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
  for dtype in ("bfloat16", "float32"):
    low = rope.tables(make(kind), jnp.asarray(POSITIONS), dtype)
    for a, b in zip(low, got, strict=True):
      assert a.dtype == jnp.float32
      np.testing.assert_allclose(a, b, rtol=0, atol=3e-5)


@pytest.mark.parametrize("changes", [
  {"truncate": True},
  {"truncate": True, "beta_fast": 32.0, "beta_slow": 1.0},  # low is below 0
  {"theta": 2.0},  # high is above R - 1
])  # fmt: skip
def test_range_of_yarn(changes, x64):
  r = make("yarn", **changes)
  lengths = 0 * POSITIONS
  got = rope.tables(r, jnp.asarray(POSITIONS), "float64")
  for a, b in zip(got, spelled(r, POSITIONS, lengths), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_lengths(kind):
  r, everything = make(kind), jnp.arange(40)[None]
  whole = rope.tables(r, everything, "float32")
  # In steps, as with a cache, if each knows the length at the end.
  for start, stop in ((0, 9), (9, 10), (10, 40)):
    step = rope.tables(r, everything[:, start:stop], "float32", jnp.array([40]))
    for a, b in zip(step, whole, strict=True):
      np.testing.assert_array_equal(a, b[:, start:stop])
  short = rope.tables(r, everything[:, :9], "float32")
  assert np.abs(short[1] - whole[1][:, :9]).max() > 1e-3
  # Batch-mates and packed neighbours change nothing.
  two = jnp.concatenate([everything, jnp.arange(40)[None] % 9])
  np.testing.assert_array_equal(
    rope.tables(r, two, "float32")[1][1, :9], short[1][0]
  )
  packed = jnp.concatenate([everything, jnp.arange(9)[None]], axis=1)
  lengths = jnp.where(jnp.arange(49) < 40, 40, 9)[None]
  got = rope.tables(r, packed, "float32", lengths)
  for a, b, c in zip(got, whole, short, strict=True):
    np.testing.assert_array_equal(a, np.concatenate([b, c], axis=1))


@pytest.mark.parametrize("head_dim", [R, R + 3])
def test_rotation(head_dim, x64):
  x = np.random.default_rng(0).standard_normal((4, 7, 3, head_dim))
  cos, sin = rope.tables(make("yarn"), jnp.asarray(POSITIONS), "float64")
  got = rope.rotate(jnp.asarray(x), (cos, sin))
  expected = x.copy()
  for i in range(R // 2):
    c, s = cos[..., i], sin[..., i]
    expected[..., i] = x[..., i] * c - x[..., i + R // 2] * s
    expected[..., i + R // 2] = x[..., i + R // 2] * c + x[..., i] * s
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)
  low = rope.rotate(jnp.asarray(x, "bfloat16"), (cos, sin))
  assert low.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    low[..., R:], jnp.asarray(x, "bfloat16")[..., R:]
  )


def test_hashable_and_strict():
  assert len({make(k) for k in KINDS} | {make("yarn")}) == len(KINDS)
  for bad in (
    {"kind": "ntk"}, {"rotary_dim": 5}, {"rotary_dim": 0},
    {"kind": "dynamic", "rotary_dim": 2}, {"original_length": 0},
    {"short_factors": SHORT[:-1]}, {"long_factors": (*LONG, 2.0)},
  ):  # fmt: skip
    with pytest.raises(InputError):
      dataclasses.replace(make("longrope"), **bad)
