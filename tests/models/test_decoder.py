"""The decoder against the reference's stored logits, and against itself."""

from __future__ import annotations

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases, options

from calm_jax.core.errors import InputError
from calm_jax.models import decoder, masks
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families, loading
from calm_jax.models.masks import window_mask
from calm_jax.models.rope import Rope

LENGTH = sum(cases.LENGTHS)


@pytest.mark.parametrize("case", cases.CASES)
def test_logits_equal_transformers(case, tmp_path):
  folder = cases.write(tmp_path, case)
  config = loading.load_config(folder)
  params = loading.load_params(folder, config)
  a, b = cases.tokens(case)
  expected = dict(zip(cases.LENGTHS, cases.logits(case), strict=True))
  for name, (sequence, places) in helpers.layouts(a, b, LENGTH).items():
    ours = helpers.decode_rows(params, config, sequence)
    for (row, slot), ids in places.items():
      np.testing.assert_allclose(
        ours[row, slot : slot + len(ids)],
        expected[len(ids)],
        rtol=0,
        atol=1e-4,
        err_msg=f"{case}, {name}, row {row}",
      )


@pytest.mark.parametrize("family", options.FAMILIES)
def test_every_family_equals_transformers(family, tmp_path):
  config_json, shapes, expected = options.golden(family)
  folder = options.write(tmp_path, config_json, shapes)
  config = loading.load_config(folder)
  assert config == families.from_hf(options.config_json(family))
  params = loading.load_params(folder, config)
  tokens = options.tokens(len(expected))
  got = helpers.decode_rows(params, config, helpers.rows([tokens], length=9))
  np.testing.assert_allclose(got[0], expected, rtol=0, atol=1e-4)


def test_golden_files_are_small():
  files = [p for p in cases.HERE.iterdir() if p.is_file()]
  assert sum(p.stat().st_size for p in files) < 500_000


@functools.partial(jax.jit, static_argnames="config")
def in_steps(params, config, sequence):
  """Logits, from layers that are run in three parts."""
  mask = masks.self_attention_mask(sequence.segments, sequence.segments)
  context = masks.make_context(config, sequence.positions, mask)
  x = decoder.embed(params, config, sequence.tokens, sequence.positions)
  for start, stop in ((0, 1), (1, 3), (3, 4)):
    x, _ = decoder.run_layers(params, config, x, context, start, stop)
  return decoder.logits(params, config, x)


def test_steps_equal_the_whole():
  config, params = helpers.model(0)
  sequence = helpers.rows([np.arange(9)], length=9)
  whole = helpers.decode_rows(params, config, sequence)
  np.testing.assert_array_equal(in_steps(params, config, sequence), whole)


def test_unroll_changes_nothing():
  config, params = helpers.model(0)
  sequence = helpers.rows([np.arange(9)], length=9)
  rolled = helpers.decode_rows(params, config, sequence)
  unrolled = config.with_compute(unroll=4)
  np.testing.assert_allclose(
    helpers.decode_rows(params, unrolled, sequence), rolled, rtol=0, atol=1e-5
  )


@functools.partial(jax.jit, static_argnames="config")
def _cached(params, config, sequence, segments, cache, index, lengths):
  """One call with a cache; `segments` are those of all slots so far."""
  mask = masks.self_attention_mask(sequence.segments, segments, index)
  context = masks.make_context(config, sequence.positions, mask, index, lengths)
  x = decoder.embed(params, config, sequence.tokens, sequence.positions)
  x, cache = decoder.run_layers(params, config, x, context, cache=cache)
  return decoder.logits(params, config, x), cache


# Windows shorter than a prompt and longer than it; no positions, learned ones,
# and ones that the whole length turns.
CACHED = {
  "llama": ("llama", "base", {}),
  "gemma3": ("gemma3_text", "base", {"window": 3}),
  "gemma2": ("gemma2", "base", {"window": 8}),
  "smollm3": ("smollm3", "windows", {}),
  "gpt2": ("gpt2", "scaled by depth", {}),
  "mixtral": ("mixtral", "window", {}),
  "ministral3": ("ministral3", "window", {"interleaved_rope": True}),
  "dynamic": ("llama", "dynamic", {"rope": Rope(
    8, kind="dynamic", factor=2.0, original_length=10
  )}),
}  # fmt: skip


@pytest.mark.parametrize("case", CACHED)
def test_cached_decoding_equals_the_full_pass(case):
  family, option, changes = CACHED[case]
  config = dataclasses.replace(
    families.from_hf(options.config_json(family, option)), **changes
  )
  params = helpers.random_params(decoder.param_shapes(config), 3)
  random = np.random.default_rng(0)
  L, P = 14, 6
  lengths = np.array([14, 11, 9])
  parts = [[L - n, random.integers(0, 61, n)] for n in lengths.tolist()]
  whole = helpers.rows(*parts, length=L)
  full = helpers.decode_rows(params, config, whole)

  def slots(start, stop):
    return jax.tree.map(lambda x: x[:, start:stop], whole)

  def segments(stop):  # of the slots written so far
    return np.where(np.arange(L) < stop, whole.segments, 0)

  cache = decoder.empty_cache(config, 3, L)
  got, cache = _cached(
    params, config, slots(0, P), segments(P), cache, jnp.int32(0), lengths
  )
  logits = [got]
  for t in range(P, L):
    now = slots(t, t + 1), segments(t + 1), cache, jnp.int32(t), lengths
    got, cache = _cached(params, config, *now)
    logits.append(got)
  real = whole.segments > 0
  cached = np.concatenate(logits, axis=1)
  np.testing.assert_allclose(cached[real], full[real], rtol=0, atol=1e-4)


def test_lengths_that_turn_keys_must_be_given_with_a_cache():
  rope = Rope(8, kind="dynamic", factor=2.0, original_length=10)
  config, _ = helpers.model(0, rope=rope)

  def context(slots):
    mask = np.ones((1, 1, slots), bool)
    positions = np.zeros((1, 1), np.int32)
    return masks.make_context(config, positions, mask, jnp.int32(0))

  context(10)  # nothing is turned otherwise in as few slots
  with pytest.raises(InputError, match="lengths"):
    context(11)


def test_a_window_counts_keys_and_not_slots():
  segments = jnp.array([[1, 1, 0, 0, 1, 1, 2]])  # with a gap, as when decoding
  mask = masks.self_attention_mask(segments, segments)
  np.testing.assert_array_equal(
    window_mask(mask, 2)[0],
    [
      [1, 0, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0, 0],
      [0, 0, 1, 0, 0, 0, 0],
      [0, 0, 1, 1, 0, 0, 0],
      [0, 1, 0, 0, 1, 0, 0],
      [0, 0, 0, 0, 1, 1, 0],
      [0, 0, 0, 0, 0, 0, 1],
    ],
  )


def test_layers_of_all_kinds_in_steps():
  # Windows, two ropes and NoPE, which a layer knows by its number.
  config = dataclasses.replace(
    families.from_hf(options.config_json("gemma3_text")), nope_layers=(2,)
  )
  params = helpers.random_params(decoder.param_shapes(config), 0)
  sequence = helpers.rows([np.arange(9)], length=9)
  whole = helpers.decode_rows(params, config, sequence)
  np.testing.assert_allclose(
    in_steps(params, config, sequence), whole, rtol=0, atol=1e-5
  )


def test_learned_positions_end():
  config = families.from_hf(options.config_json("gpt2") | {"n_positions": 8})
  params = helpers.random_params(decoder.param_shapes(config), 0)
  sequence = helpers.rows([np.arange(9)], length=9)
  logits = helpers.decode_rows(params, config, sequence)
  assert np.isnan(logits[0, 8]).all()


def test_causal_within_segments():
  segments = jnp.array([[0, 1, 1, 2, 2]])
  mask = masks.self_attention_mask(segments, segments)[0]
  np.testing.assert_array_equal(
    mask,
    [
      [1, 0, 0, 0, 0],  # padding sees itself: no row is empty
      [0, 1, 0, 0, 0],
      [0, 1, 1, 0, 0],
      [0, 0, 0, 1, 0],
      [0, 0, 0, 1, 1],
    ],
  )


def test_init_has_the_declared_shapes_and_scale():
  config, _ = helpers.model(0, tie_embeddings=True, attention_bias=True)
  params = jax.jit(decoder.init, static_argnums=1)(jax.random.key(0), config)
  shapes = decoder.param_shapes(config)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    lambda s: s.shape, shapes
  )
  assert "head" not in params
  assert np.std(params["layers"]["mlp"]["up"]["kernel"]) == pytest.approx(
    32**-0.5, rel=0.1
  )
  assert not params["layers"]["attention"]["query"]["bias"].any()


def test_full_size_shapes_without_allocating():
  config = families.from_hf(
    {
      "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
      "intermediate_size": 28672, "num_hidden_layers": 80,
      "num_attention_heads": 64, "num_key_value_heads": 8,
    }
  )  # fmt: skip
  leaves = jax.tree.leaves(decoder.param_shapes(config))
  assert sum(leaf.size for leaf in leaves) == 70_553_706_496


def test_float64_path_computes_what_float32_does(x64):
  config, params = helpers.model(0)
  sequence = helpers.rows([np.arange(9)], length=9)
  low = helpers.decode_rows(params, config, sequence)
  high = helpers.decode_rows(
    helpers.in_dtype(params, "float64"),
    config.with_compute(dtype="float64"),
    sequence,
  )
  assert (low.dtype, high.dtype) == (jnp.float32, jnp.float64)
  np.testing.assert_allclose(low, high, rtol=0, atol=1e-5)


def test_bfloat16_computation_gives_float32_logits():
  config, params = helpers.model(0, dtype="bfloat16")
  assert isinstance(config, ModelConfig)
  sequence = helpers.rows([np.arange(9)], length=9)
  logits = helpers.decode_rows(params, config, sequence)
  assert logits.dtype == jnp.float32
  float32 = config.with_compute(dtype="float32")
  np.testing.assert_allclose(
    logits, helpers.decode_rows(params, float32, sequence), rtol=0, atol=0.1
  )
