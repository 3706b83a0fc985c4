"""Models in int8 and int4: sizes, numbers, files, training."""

from __future__ import annotations

import dataclasses
import functools
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import tiny

import calm_jax
from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.composition.model import Model
from calm_jax.core import flops, trees
from calm_jax.core.batch import plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.experiments import quantisation_plan, run_models, sharded_models
from calm_jax.experiments.settings import Bits, Settings
from calm_jax.generation import decode
from calm_jax.models import decoder, lora, quantisation
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import export
from calm_jax.parallel import sharding
from calm_jax.parallel.rules import SHARDING
from calm_jax.training import optimizer
from calm_jax.training import step as step_lib
from calm_jax.training.stage import Stage

KINDS = ("int8", "int4")
# At most, as a share of bfloat16.
SIZES = {"int8": 0.53, "int4": 0.30}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))


def size(params) -> int:
  """Bytes, of what is in float32 as if it were in bfloat16."""
  leaves = jax.tree.leaves(params)
  return sum(x.size * min(x.dtype.itemsize, 2) for x in leaves)


def close(got, want, rtol=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=rtol, atol=rtol * np.abs(b).max()
    ),
    got,
    want,
  )


def sequence():
  return plain_sequence(jnp.asarray(TOKENS))


# One matrix.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["layers/up/kernel", "embed/embedding"])
@pytest.mark.parametrize("shape", [(97, 50), (31, 7)])
def test_a_matrix(kind, name, shape):
  """Widths that no block divides, and odd ones, which no byte is shared by."""
  weight = np.random.default_rng(0).standard_normal(shape).astype("float32")
  made = quantisation.quantise_leaf(name, jnp.asarray(weight), kind)
  packed = kind == "int4" and shape[1] % 2 == 0
  assert made.keys() == {"int4" if packed else "int8", "scale"}
  got = quantisation.dense(made, "float32")
  assert got.shape == shape
  axis = quantisation.input_axis(name, 2)
  # Half a step, one of the largest, and scales of eight bits; a range of four
  # bits may end before the largest.
  most = 0.3 if packed else 1.02 / 255 + 1 / 256
  most = most * np.abs(weight).max(axis, keepdims=True) + 1e-6
  assert (np.abs(got - weight) <= most).all()
  if shape == (97, 50):
    error = jnp.std(got - weight)
    assert error < (0.09 if packed else 0.008)


def test_it_is_what_qwix_makes_of_it():
  weight = jax.random.normal(jax.random.key(0), (128, 10))
  for kind, tile in quantisation.BLOCKS.items():
    made = quantisation.quantise_leaf("head/kernel", weight, kind)
    quantise = functools.partial(
      qwix.quantize, qtype=kind, channelwise_axes=[1], tiled_axes={0: tile},
      scale_dtype=jnp.bfloat16,
    )  # fmt: skip
    # Compiled, as ours is: older XLA then rounds the scale later.
    want = jax.jit(quantise)(weight)
    wide = dataclasses.replace(want, scale=want.scale.astype("float32"))
    plain = qwix.dequantize(wide)
    got = quantisation.dense(made, "float32")
    if kind == "int8":
      np.testing.assert_array_equal(made["scale"], want.scale)
      np.testing.assert_array_equal(got, plain)
    else:
      assert jnp.std(got - weight) < 0.97 * jnp.std(plain - weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_product(kind, transposed):
  weight = jax.random.normal(jax.random.key(0), (33, 20))
  made = quantisation.quantise_leaf("head/kernel", weight, kind)
  x = jax.random.normal(jax.random.key(1), (5, 20 if transposed else 33))
  for weights in (made, quantisation.dense(made, "float32")):
    loss = lambda x, w=weights: jnp.sum(  # noqa: E731
      quantisation.matmul(x, w, transposed) ** 2
    )
    value, grad = jax.value_and_grad(loss)(x)
    if weights is made:
      found = value, grad
  close(found, (value, grad))


@pytest.mark.parametrize(("inputs", "outputs"), [(60, 33), (192, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_of_a_row_that_gpus_compute(kind, inputs, outputs):
  weight = jax.random.normal(jax.random.key(0), (outputs, inputs))
  made = quantisation.quantise_leaf("embed/embedding", weight, kind)
  x = jax.random.normal(jax.random.key(1), (1, inputs))
  got = quantisation.row_product(x, made)
  close(got, quantisation.matmul(x, made, transposed=True))


# A model.


@functools.cache
def model(kind: str = "", **changes):
  config, params = helpers.model(3, **changes)
  return config, quantisation.quantise(params, kind)


@pytest.mark.parametrize(
  ("kind", "changes"),
  [
    ("int4", {}),
    (
      "int8",
      {"tie_embeddings": True, "num_experts": 4, "experts_per_token": 2},
    ),
  ],
)
def test_a_model_computes_with_what_its_weights_stand_for(kind, changes):
  config, params = model(kind, **changes)
  dense = quantisation.dequantise(params)
  close(
    helpers.decode_rows(params, config, sequence()),
    helpers.decode_rows(dense, config, sequence()),
  )
  assert quantisation.kind_of(params) == kind
  names = {n for n in trees.flatten(params) if n.endswith("/scale")}
  kept = {n for n in trees.flatten(dense) if n in trees.flatten(params)}
  assert all("norm" in n or "bias" in n or "router" in n for n in kept)
  assert len(names) > 8


def test_decoding_says_what_the_whole_pass_does():
  config, params = model("int4")
  quantised = Model(Composition(config), {"anchor": params})
  [new] = decode.generate(quantised, [[1, 2, 3]], max_new_tokens=6)
  row = plain_sequence(jnp.array([[1, 2, 3, *new]]))
  best = helpers.decode_rows(params, config, row).argmax(-1)[0]
  np.testing.assert_array_equal(new, best[2:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_model_of_half_a_billion(kind):
  qwen = ModelConfig(
    vocab_size=151_936, width=896, num_layers=24, num_heads=14, num_kv_heads=2,
    head_dim=64, mlp_width=4864, attention_bias=True, tie_embeddings=True,
  )  # fmt: skip
  shapes = decoder.param_shapes(qwen)
  made = quantisation.shapes(shapes, kind)
  assert size(made) <= SIZES[kind] * size(shapes)
  again = jax.eval_shape(quantisation.dequantise, made)
  assert trees.count(again) == trees.count(shapes)


def step_of(spec, params):
  """(step, state, frozen) of training Θ_C."""
  mask = trees.mask(params, ("composition/.*",))
  trained, frozen = trees.partition(params, mask)
  stage = Stage(schedule="constant", warmup=0)
  made = optimizer.make_optimizer(stage, mask)
  # A copy, which the step donates.
  state = step_lib.initial_state(made, jax.tree.map(jnp.copy, trained))
  return step_lib.make_step(spec, stage, made), state, frozen


def few_bits(params: dict, kind: str) -> dict:
  """A whole tree with its frozen models quantised."""
  return params | {
    "anchor": quantisation.quantise(params["anchor"], kind),
    "augmenting": {
      n: quantisation.quantise(p, kind) for n, p in params["augmenting"].items()
    },
  }


def test_a_step_of_training():
  spec, params = tiny.compose()
  made = few_bits(params, "int4")
  batch = tiny.Source()[0]
  found, counted = {}, {}
  for name, tree_ in (("bits", made), ("dense", quantisation.dequantise(made))):
    step, state, frozen = step_of(spec, tree_)
    counted[name] = flops.count(step, state, frozen, batch)
    found[name] = step(state, frozen, batch)[0]["trainable"]
  assert counted["bits"] == counted["dense"]
  close(found["bits"], found["dense"], 1e-4)


def test_a_step_never_holds_the_dequantised_stack():
  """Temporaries of a layer or two, not of 24."""
  config = ModelConfig(
    vocab_size=64, width=128, num_layers=24, num_heads=2, num_kv_heads=2,
    head_dim=64, mlp_width=512,
  )  # fmt: skip
  spec, params = tiny.compose()
  joined = Augmenting(spec.anchor, (Connection(2, 8),))
  spec = Composition(config, (("kv", joined),))
  shapes = jax.eval_shape(
    lambda: {
      "anchor": decoder.init(jax.random.key(0), config),
      "augmenting": params["augmenting"],
      "composition": cross_attention.init(jax.random.key(0), spec),
    }
  )
  layers = size(shapes["anchor"]["layers"]) * 2
  made = jax.eval_shape(functools.partial(few_bits, kind="int8"), shapes)
  mask = trees.mask(made, ("composition/.*",))
  trained, frozen = trees.partition(made, mask)
  batch = jax.eval_shape(lambda: tiny.Source(batch_size=1)[0])

  def loss(trained, frozen, batch):
    params = trees.merge(trained, frozen)
    return step_lib.row_losses(params, spec, batch)[0].sum()

  compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, batch).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < layers / 6


# LoRA, names, places.


def test_lora_on_few_bits():
  config, params = model("int8")
  _, before = model()
  assert lora.closest_rank(params, 5000) == lora.closest_rank(before, 5000)
  adapted = lora.add(params, 2, jax.random.key(0))
  adapted = jax.tree.map(
    lambda x: x + 0.1 if x.shape[-2:-1] == (2,) else x, adapted
  )
  merged = lora.merge(adapted)
  assert quantisation.kind_of(merged) == ""
  trees.check_same_structure(merged, before, "the merged tree")
  close(
    helpers.decode_rows(adapted, config, sequence()),
    helpers.decode_rows(merged, config, sequence()),
    1e-4,
  )


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_has_a_place(kind):
  made = sharding.Layout(_one(), SHARDING)
  config, _ = helpers.model(3, num_experts=4, experts_per_token=2)
  shapes = quantisation.shapes(decoder.param_shapes(config), kind)
  for name in trees.flatten({"anchor": shapes}):
    assert made.rule(name) is not None, name


def _one():
  return jax.sharding.Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1, 1, 1),
    ("data", "fsdp", "tensor", "sequence"),
  )


def test_what_cannot_be_done():
  _, params = model("int8")
  with pytest.raises(InputError, match="int8 already"):
    quantisation.quantise(params, "int4")
  with pytest.raises(InputError, match="'int3' is none of"):
    quantisation.quantise(params, "int3")


# Files.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  path = tmp_path_factory.mktemp("models")
  for name, seed, changes in (
    ("anchor", 1, {"tie_embeddings": True}), ("kv", 2, {"width": 24})
  ):  # fmt: skip
    export.save_params(path / name, *helpers.model(seed, **changes))
  return path


@pytest.mark.parametrize(
  ("kind", "dtype"), [("int8", "float32"), ("int4", "bfloat16")]
)
def test_loading_quantises(folders, kind, dtype, monkeypatch):
  monkeypatch.setattr("calm_jax.models.hf.leaves._AT_ONCE", 300)
  loaded = calm_jax.load_model(str(folders / "anchor"), dtype, quantise=kind)
  whole = calm_jax.load_model(str(folders / "anchor"))
  want = quantisation.quantise(whole.params["anchor"], kind)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)),
    loaded.params["anchor"],
    want,
  )
  assert loaded.num_params == whole.num_params
  layout = sharding.Layout(_one(), SHARDING)
  placed = calm_jax.load_model(
    str(folders / "anchor"),
    dtype,
    shardings=sharded_models.shardings(layout, "anchor"),
    quantise=kind,
  )
  jax.tree.map(np.testing.assert_array_equal, placed.params, loaded.params)
  with pytest.raises(InputError, match=f"in {kind}"):
    loaded.export_hf(folders / "no")


def test_a_composition_remembers_its_bits(folders, tmp_path):
  kinds = {"anchor": "int8", "kv": "int4"}
  models = {
    name: calm_jax.load_model(str(folders / name), quantise=kind)
    for name, kind in kinds.items()
  }
  composed = calm_jax.compose(models["anchor"], {"kv": models["kv"]})
  composed.save(tmp_path / "saved")
  again = calm_jax.load_composed(tmp_path / "saved")
  jax.tree.map(np.testing.assert_array_equal, again.params, composed.params)
  saved = json.loads((tmp_path / "saved" / "calm_config.json").read_text())
  assert saved["models"]["anchor"]["quantise"] == "int8"
  whole = calm_jax.load_composed(tmp_path / "saved", quantise="")
  assert quantisation.kind_of(whole.params) == ""
  # A bit that changed since is noticed.
  leaf = composed.params["anchor"]["layers"]["mlp"]["up"]["kernel"]
  leaf["int8"] = leaf["int8"].at[0, 0, 0].add(1)
  with pytest.raises(InputError, match="up/kernel/int8 differs"):
    composed.save(tmp_path / "other")


# Runs.


def test_a_run_quantises_what_it_has_trained(folders):
  trains_anchor = Stage(model="anchor", trainable=("anchor/.*",))
  asked = Settings(
    "text",
    None,
    recipe=("anchor", "compose"),
    stages={"anchor": trains_anchor, "compose": Stage()},
    anchor=str(folders / "anchor"),
    augmenting=str(folders / "kv"),
    augmenting_name="kv",
    quantise=Bits("int8", "int4"),
  )
  loaded = run_models.load(asked, None)
  kinds = [quantisation.kind_of(m.params) for m in loaded.values()]
  assert kinds == ["", "int4"]
  params = {
    "anchor": loaded["anchor"].params["anchor"],
    "augmenting": {"kv": loaded["augmenting"].params["anchor"]},
  }
  quantisation_plan.check(asked, params)
  made = quantisation_plan.quantise(asked, params)
  exact = quantisation_plan.exact_leaves(params, made)
  jax.tree.map(
    np.testing.assert_array_equal,
    made["anchor"],
    quantisation.quantise(params["anchor"], "int8"),
  )
  jax.tree.map(
    np.testing.assert_array_equal, quantisation_plan.undo(made, exact), params
  )
  with pytest.raises(InputError, match="stage 'anchor' trains it"):
    quantisation_plan.check(
      dataclasses.replace(asked, recipe=("compose", "anchor")), params
    )
