"""Rotary positions read from a config.json."""

from __future__ import annotations

import math

import pytest

from calm_jax.core.errors import InputError
from calm_jax.models.hf import rope_config
from calm_jax.models.rope import Rope

R, THETA = 10, 313.0
SHORT = (1.0, 1.1, 1.3, 1.7, 2.5)
LONG = (1.2, 2.0, 3.5, 5.5, 9.0)
LENGTHS = {
  "max_position_embeddings": 92,
  "original_max_position_embeddings": 23,
}
LLAMA3 = {"factor": 5, "low_freq_factor": 0.7, "high_freq_factor": 2.9}
LONGROPE = {"short_factor": list(SHORT), "long_factor": list(LONG)}


def scaling(kind, **options):
  return {"rope_scaling": {"rope_type": kind, **options}}


@pytest.mark.parametrize(("hf", "expected"), [
  ({}, Rope(R)),
  ({"rope_theta": 313}, Rope(R, THETA)),
  ({"rope_parameters": {"rope_theta": 313.0, "rope_type": "default"}},
   Rope(R, THETA)),
  ({"rope_theta": 313, "rope_parameters": {"rope_theta": 313.0}},
   Rope(R, THETA)),
  (scaling("linear", type="linear", factor=3), Rope(R, 1e4, "linear", 3.0)),
  ({"rope_scaling": {"type": "linear", "factor": 3}},
   Rope(R, 1e4, "linear", 3.0)),
  # Longer than what it is made for, not than what it was first made for.
  (LENGTHS | scaling("dynamic", factor=2), Rope(R, 1e4, "dynamic", 2.0, 92)),
  (LENGTHS | scaling("llama3", **LLAMA3),
   Rope(R, 1e4, "llama3", 5.0, 23, 1.0, 0.7, 2.9)),
  ({"max_position_embeddings": 92} | scaling("llama3", **LLAMA3),
   Rope(R, 1e4, "llama3", 5.0, 92, 1.0, 0.7, 2.9)),
  (LENGTHS | scaling("yarn", factor=4, original_max_position_embeddings=23),
   Rope(R, 1e4, "yarn", 4.0, 23, 1 + 0.1 * math.log(4))),
  (LENGTHS | scaling("yarn", factor=0.5), Rope(R, 1e4, "yarn", 0.5, 23)),
  (LENGTHS | scaling("yarn", factor=4, mscale=2, mscale_all_dim=0.5,
                     beta_fast=9, beta_slow=2, truncate=False),
   Rope(R, 1e4, "yarn", 4.0, 23,
        (1 + 0.2 * math.log(4)) / (1 + 0.05 * math.log(4)),
        beta_fast=9.0, beta_slow=2.0, truncate=False)),
  (LENGTHS | scaling("yarn", factor=4, mscale=2, mscale_all_dim=0),
   Rope(R, 1e4, "yarn", 4.0, 23, 1 + 0.1 * math.log(4))),
  (LENGTHS | scaling("longrope", **LONGROPE),
   Rope(R, 1e4, "longrope", 4.0, 23,
        math.sqrt(1 + math.log(4) / math.log(23)),
        short_factors=SHORT, long_factors=LONG)),
  (LENGTHS | {"rope_scaling": {"type": "su", "attention_factor": 2, "factor": 3}
              | LONGROPE},
   Rope(R, 1e4, "longrope", 3.0, 23, 2.0,
        short_factors=SHORT, long_factors=LONG)),
  # In both of their places, with equal values.
  ({"rope_theta": 313, "rope_scaling": {"type": "linear", "factor": 2}, "rope_"
    "parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 313.0}},
   Rope(R, THETA, "linear", 2.0)),
  ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 313}},
   Rope(R, THETA)),
])  # fmt: skip
def test_reading(hf, expected):
  assert rope_config.read_rope(hf, R) == expected


def test_reading_of_fractions():
  for keys in (
    {"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5},
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
  ):  # fmt: skip
    assert rope_config.read_rope(keys, 20, fraction=0.25) == Rope(10)
    with pytest.raises(InputError, match="whole heads"):
      rope_config.read_rope(keys, 20)
  assert rope_config.read_rope({}, 16, fraction=0.25) == Rope(4)
  assert rope_config.read_rope({"partial_rotary_factor": 1}, 20) == Rope(20)
  assert rope_config.read_rope({"rotary_emb_base": 7}, 20) == Rope(20, 7.0)


@pytest.mark.parametrize(("hf", "named"), [
  (scaling("ntk"), "'ntk'"),
  (scaling("proportional"), "'proportional'"),
  (scaling("linear"), "factor"),
  (scaling("linear", factor=None), "factor"),
  (scaling("linear", factor=True), "factor"),
  (scaling("linear", type="dynamic", factor=2), "rope_type"),
  (scaling("dynamic", factor=2), "max_position_embeddings"),
  (LENGTHS | scaling("llama3", factor=2, low_freq_factor=1),
   "high_freq_factor"),
  (LENGTHS | scaling("llama3", factor=2, low_freq_factor=2, high_freq_factor=2),
   "high_freq_factor=2.0"),
  (LENGTHS | scaling("yarn", factor="4"), "factor='4'"),
  (LENGTHS | scaling("yarn", factor=4, beta_fast=0), "beta_fast=0"),
  (LENGTHS | scaling("yarn", factor=4, truncate="no"), "truncate='no'"),
  ({"max_position_embeddings": 92} | scaling("longrope", **LONGROPE),
   "original_max_position_embeddings"),
  (LENGTHS | scaling("longrope", long_factor=list(LONG)), "short_factor"),
  (LENGTHS | scaling("longrope", short_factor=2, long_factor=list(LONG)),
   "1 short_factors"),
  (LENGTHS | scaling("longrope", short_factor=[1.0], long_factor=list(LONG)),
   "1 short_factors"),
  ({"rope_theta": 3, "rope_parameters": {"rope_theta": 4}}, "rope_theta"),
  ({"rope_theta": -3}, "rope_theta=-3"),
  (scaling("default") | {"rope_parameters": {"rope_theta": 7}},
   "rope_parameters=.* and rope_scaling=.*differ"),
  ({"rope_scaling": ["linear"]}, "no mapping"),
  ({"rope_parameters": {"full_attention": {}}}, "full_attention"),
])  # fmt: skip
def test_reading_names_what_is_wrong(hf, named):
  with pytest.raises(InputError, match=named):
    rope_config.read_rope(hf, R)


@pytest.mark.parametrize(("hf", "named"), [
  (scaling("default", factor=2), "factor"),
  (scaling("linear", factor=2, mrope_section=[1]), "mrope_section"),
  (LENGTHS | scaling("yarn", factor=2, finetuned=True), "finetuned"),
  (LENGTHS | scaling("dynamic", factor=2, alpha=1), "alpha"),
])  # fmt: skip
def test_options_that_a_kind_does_not_read_are_named(hf, named):
  options = {k: v for k, v in hf["rope_scaling"].items() if k != named}
  with pytest.warns(UserWarning, match=f"passed over: {named}"):
    read = rope_config.read_rope(hf, R)
  assert read == rope_config.read_rope(hf | {"rope_scaling": options}, R)


def test_reading_by_layer_type():
  thetas = {"full_attention": 1e6, "sliding_attention": 1e4}

  def read(**hf):
    return tuple(rope_config.read_ropes(hf, R, thetas).values())

  linear = {"rope_type": "linear", "factor": 8}
  scaled, local = Rope(R, 1e6, "linear", 8.0), Rope(R, 1e4)
  assert read() == (Rope(R, 1e6), local)
  assert read(rope_scaling=linear) == (scaled, local)
  assert read(rope_parameters={"full_attention": linear}) == (scaled, local)
  assert read(rope_theta=3, rope_local_base_freq=5) == (Rope(R, 3), Rope(R, 5))
  both = {"sliding_attention": {"rope_theta": 5}, "full_attention": None}
  assert read(rope_parameters=both) == (Rope(R, 1e6), Rope(R, 5))
  # Both forms at once, with equal values.
  given = {"rope_theta": 3}
  assert read(
    rope_parameters=both | {"full_attention": linear | given},
    rope_scaling=linear, rope_local_base_freq=5, **given
  ) == (Rope(R, 3, "linear", 8.0), Rope(R, 5))  # fmt: skip
  for bad in (linear, both | {"chunked_attention": {}}):
    with pytest.raises(InputError, match="full_attention"):
      read(rope_parameters=bad)
  with pytest.raises(InputError, match="linear"):
    read(rope_parameters=both | {"full_attention": given}, rope_scaling=linear)
  with pytest.raises(InputError, match="rope_theta"):
    read(rope_parameters=both, rope_local_base_freq=6)
