"""LoRA: against a dense model with the merged kernels."""

from __future__ import annotations

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.composition import inference
from calm_jax.composition.connections import Composition
from calm_jax.composition.model import Model
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.generation import decode
from calm_jax.models import decoder, lora, masks
from calm_jax.models.hf import export, loading
from calm_jax.models.layers import Linear

RANK = 3
SEQUENCE = helpers.rows(
  [np.arange(9)], [2, np.arange(3, 7), np.arange(9, 12)], length=9
)
MATRICES = {
  "attention": ("query", "key", "value", "output"),
  "mlp": ("gate", "up", "down"),
}


@functools.cache
def adapted():
  """(config, the base's tree, the tree with trained A and B)."""
  config, base = helpers.model(1)
  params = lora.add(base, RANK, jax.random.key(0))
  random = np.random.default_rng(5)
  leaves = {
    name: jnp.asarray(random.normal(0, 0.1, leaf.shape), leaf.dtype)
    if name.endswith("lora_b")
    else leaf
    for name, leaf in trees.flatten(params).items()
  }
  return config, base, trees.unflatten(leaves)


def test_a_linear_layer_is_the_formula():
  random = np.random.default_rng(0)
  x, w, a, b, bias = (
    random.standard_normal(shape).astype(np.float32) / 4
    for shape in ((2, 5, 7), (7, 11), (7, RANK), (RANK, 11), (11,))
  )
  leaves = {"kernel": w, "lora_a": a, "lora_b": b, "bias": bias}
  got = Linear(11, use_bias=True).apply({"params": leaves}, x)
  wide = [z.astype(np.float64) for z in (x, w, a, b, bias)]
  want = wide[0] @ wide[1] + (wide[0] @ wide[2]) @ wide[3] + wide[4]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_it_starts_as_the_base_bit_for_bit():
  config, base, _ = adapted()
  fresh = lora.add(base, RANK, jax.random.key(0))
  np.testing.assert_array_equal(
    helpers.decode_rows(fresh, config, SEQUENCE),
    helpers.decode_rows(base, config, SEQUENCE),
  )
  a = np.concatenate([
    np.ravel(leaf) * leaf.shape[1] ** 0.5
    for name, leaf in trees.flatten(fresh).items()
    if name.endswith("lora_a")
  ])  # fmt: skip
  assert a.mean() == pytest.approx(0, abs=0.05)
  assert a.std() == pytest.approx(1, abs=0.05)


def test_which_leaves_there_are():
  config, base, params = adapted()
  new = {
    f"layers/{part}/{name}/{leaf}"
    for part, names in MATRICES.items()
    for name in names
    for leaf in ("lora_a", "lora_b")
  }
  leaves, old = trees.flatten(params), trees.flatten(base)
  assert leaves.keys() - old.keys() == new
  assert all(leaves[name] is leaf for name, leaf in old.items())
  for name in new:
    kernel = leaves[re.sub("lora_.$", "kernel", name)]
    layers, wide_in, wide_out = kernel.shape
    want = (wide_in, RANK) if name.endswith("a") else (RANK, wide_out)
    assert leaves[name].shape == (layers, *want)
  # Nothing of it where nobody asked.
  assert trees.flatten(decoder.param_shapes(config)).keys() == old.keys()


def test_the_pattern_of_the_configs_is_those_leaves():
  _, base, params = adapted()
  mask = trees.mask({"anchor": params}, ("anchor/.*/lora_.",))
  trainable, frozen = trees.partition({"anchor": params}, mask)
  assert trees.fingerprint(frozen["anchor"]) == trees.fingerprint(base)
  assert len(trees.flatten(trainable)) == 14


def test_merged_kernels_compute_the_same(x64):
  config, base, params = adapted()
  trees.check_same_structure(lora.merge(params), base, "the merged tree")
  config = helpers.retype(Composition(config), dtype="float64").anchor
  params, base = (helpers.in_dtype(p, "float64") for p in (params, base))
  got, dense, old = (
    helpers.decode_rows(p, config, SEQUENCE)
    for p in (params, lora.merge(params), base)
  )
  np.testing.assert_allclose(got, dense, rtol=0, atol=1e-12)
  assert np.abs(got - old).max() > 0.1


def test_a_base_in_bfloat16_keeps_its_dtype():
  _, base, _ = adapted()
  half = lora.add(helpers.in_dtype(base, "bfloat16"), 1, jax.random.key(0))
  dtypes = {name[-6:]: x.dtype for name, x in trees.flatten(half).items()}
  assert dtypes["lora_a"] == dtypes["lora_b"] == jnp.float32
  merged = lora.merge(half)
  assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_in_steps_and_while_generating():
  config, _, params = adapted()
  mask = masks.self_attention_mask(SEQUENCE.segments, SEQUENCE.segments)

  @jax.jit
  def in_steps(params):
    context = masks.make_context(config, SEQUENCE.positions, mask)
    x = decoder.embed(params, config, SEQUENCE.tokens, SEQUENCE.positions)
    for start, stop in ((0, 1), (1, 4)):
      x, _ = decoder.run_layers(params, config, x, context, start, stop)
    return decoder.logits(params, config, x)

  np.testing.assert_array_equal(
    in_steps(params), helpers.decode_rows(params, config, SEQUENCE)
  )
  prompts = [[1, 2, 3], [7], [5, 4]]
  adapted_model = Model(Composition(config), {"anchor": params})
  new = decode.generate(adapted_model, prompts, max_new_tokens=5)
  texts = [np.array(p + n) for p, n in zip(prompts, new, strict=True)]
  rows = helpers.rows(*([t, 9 - len(t)] for t in texts), length=9)
  best = helpers.decode_rows(lora.merge(params), config, rows).argmax(-1)
  for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
    want = best[row, len(prompt) - 1 : len(text) - 1]
    np.testing.assert_array_equal(text[len(prompt) :], want)
  prepared = inference.prepare(Composition(config), {"anchor": params})[1][
    "anchor"
  ]["layers"]
  assert prepared[2]["mlp"]["down"]["lora_a"].shape == (40, RANK)


def test_what_is_not_merged_is_not_exported(tmp_path):
  config, _, params = adapted()
  with pytest.raises(InputError, match="lora_a"):
    export.save_params(tmp_path / "no", config, params)
  merged = lora.merge(params)
  export.save_params(tmp_path / "yes", config, merged)
  again = loading.load_params(tmp_path / "yes", config)
  jax.tree.map(np.testing.assert_array_equal, again, merged)


@pytest.mark.parametrize("target", [1, 5_000, 17_536, 99_999, 312_192])
def test_the_rank_closest_to_a_number_of_parameters(target):
  _, base, params = adapted()
  of_one, rest = divmod(trees.count(params) - trees.count(base), RANK)
  assert rest == 0
  away = {rank: abs(rank * of_one - target) for rank in range(1, 400)}
  chosen = lora.closest_rank(base, target)
  assert away[chosen] == min(away.values())
  adapt = functools.partial(lora.add, base, chosen)
  made = jax.eval_shape(adapt, jax.random.key(0))
  assert trees.count(made) == trees.count(base) + chosen * of_one


def test_what_cannot_be_adapted():
  _, base, _ = adapted()
  with pytest.raises(InputError, match="rank 0"):
    lora.add(base, 0, jax.random.key(0))
  config, _ = helpers.model(1, num_experts=4, experts_per_token=2)
  with pytest.raises(InputError, match="mixture of experts"):
    lora.closest_rank(decoder.param_shapes(config), 100)
