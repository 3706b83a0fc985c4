"""A training step: chunks of logits and remat change memory, not numbers."""

from __future__ import annotations

import dataclasses
import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.composition import forward
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.core import trees
from calm_jax.core.batch import Batch, Sequence
from calm_jax.core.errors import InputError
from calm_jax.models import decoder
from calm_jax.models.config import Compute, ModelConfig
from calm_jax.training import loss as loss_lib
from calm_jax.training import step

THETA, ANCHOR = "composition/.*", "anchor/.*"


def gradients(spec):
  """Jitted (trainable, frozen, batch) to the loss and its gradients."""

  def loss(trainable, frozen, batch):
    return step.summed_loss(trees.merge(trainable, frozen), spec, batch)

  return jax.jit(jax.value_and_grad(loss))


def batch(rows=4, length=9, vocabulary=61):
  random = np.random.default_rng(0)
  tokens, targets = (
    random.integers(0, vocabulary, (rows, length), dtype=np.int32)
    for _ in range(2)
  )
  segments = np.arange(length) // 5 + np.ones((rows, 1), np.int32)
  positions = np.arange(length) % 5 + np.zeros((rows, 1), np.int32)
  weights = random.random((rows, length), np.float32)
  return Batch(
    Sequence(tokens, segments, positions),
    {},
    {},
    prompt_ends=np.zeros((rows, length), np.int32),
    targets=targets,
    weights=weights * (weights > 0.3),
  )


def pair(anchor: dict, connections=((1, 1), (2, 2)), **changes) -> Composition:
  shape = {
    "vocab_size": 64, "width": 16, "num_layers": 2, "num_heads": 2,
    "num_kv_heads": 2, "head_dim": 8, "mlp_width": 32,
  } | changes  # fmt: skip
  pairs = tuple(Connection(*c) for c in connections)
  joined = Augmenting(ModelConfig(**shape), pairs)
  return Composition(ModelConfig(**shape | anchor), (("kv", joined),))


def temporary_bytes(spec, trainable, rows, length) -> int:
  params = {
    "anchor": decoder.param_shapes(spec.anchor),
    "augmenting": {
      n: decoder.param_shapes(a.config) for n, a in spec.augmenting
    },
    "composition": helpers.theta_shapes(spec),
  }
  parts = trees.partition(params, trees.mask(params, [trainable]))
  lowered = gradients(spec).lower(*parts, batch(rows, length))
  return lowered.compile().memory_analysis().temp_size_in_bytes


# Chunks of logits.


@pytest.mark.parametrize("tied", [False, True])
def test_memory_does_not_grow_with_the_vocabulary(tied):
  def peak(vocabulary):
    compute = Compute(loss_chunk=2**20 // vocabulary)
    shape = {"compute": compute, "tie_embeddings": tied}
    spec = pair(shape | {"vocab_size": vocabulary}, ((1, 1),), num_layers=1)
    return temporary_bytes(spec, THETA, rows=1, length=256)

  small, large = peak(2**15), peak(2**18)
  print(f"{small:,} temporary bytes at 32 K, {large:,} at 256 K")
  assert large <= 1.1 * small
  # All logits at once are more.
  assert small < 256 * 2**15 * 4 / 3


HEADS = {
  "own": {"logit_scale": 0.25, "norm": "layer"},
  "tied": {"tie_embeddings": True, "logit_cap": 2.0, "norm": "rms_plus_one"},
}


def assert_same(got, want):
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  got, want = trees.flatten(got[1]), trees.flatten(want[1])
  assert got.keys() == want.keys()
  for name, leaf in want.items():
    np.testing.assert_allclose(
      got[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name
    )


@pytest.mark.parametrize("head", HEADS)
def test_chunks_train_as_all_logits_do(head):
  spec, params = helpers.compose(connections=((2, 2),))
  config, params["anchor"] = helpers.model(1, **HEADS[head])
  spec, data = dataclasses.replace(spec, anchor=config), batch()

  def plain(trainable, frozen, batch):
    params = trees.merge(trainable, frozen)
    logits, _ = forward.forward(params, spec, batch)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], -1)
    losses = jax.nn.logsumexp(logits, -1) - picked[..., 0]
    return (losses * batch.weights).sum()

  parts = trees.partition(params, trees.mask(params, [THETA, ANCHOR]))
  want = jax.jit(jax.value_and_grad(plain))(*parts, data)
  few = helpers.retype(spec, loss_chunk=8)
  assert_same(gradients(few)(*parts, data), want)
  rows = jax.jit(step.row_losses, static_argnums=1)
  losses, weights = rows(params, few, data)
  np.testing.assert_allclose(losses.sum(), want[0], rtol=1e-5)
  np.testing.assert_allclose(weights, data.weights.sum(1), rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_a_vocabulary_that_is_filled_up_trains_the_same(head):
  config, params = helpers.model(1, **HEADS[head])
  weights = decoder.head_weights(params, config)
  x_BLD = np.random.default_rng(0).standard_normal((4, 9, 32), np.float32)
  data = batch()

  def loss(change, size, *weights_and_x):
    def head(weights, x):
      return decoder.logits(change(weights), config, x)

    labels = data.targets, data.weights
    return loss_lib.chunked_sum(head, *weights_and_x, *labels, size)

  def computed(change, size):
    function = jax.value_and_grad(functools.partial(loss, change, size), (0, 1))
    return jax.jit(function)(weights, x_BLD)

  want = computed(lambda weights: weights, 0)
  for size in (0, 8):
    got = computed(decoder.fill_up, size)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
      got[1],
      want[1],
    )


@pytest.mark.parametrize("tied", [False, True])
def test_an_odd_vocabulary_is_filled_up_in_half_precision(tied):
  """So no array of logits has 61 columns, and the loss is as accurate."""

  def widths(vocabulary, dtype):
    shape = {"vocab_size": vocabulary, "tie_embeddings": tied, "dtype": dtype}
    config, params = helpers.model(1, **shape)
    spec, data = Composition(config), batch(vocabulary=vocabulary)

    def losses(params):
      return step.summed_loss({"anchor": params}, spec, data)

    found, _ = jax.jit(jax.value_and_grad(losses))(params)
    text = jax.jit(jax.grad(losses)).lower(params).as_text()
    return set(re.findall(r"tensor<36x(\d+)x", text)), found

  odd, exact = widths(61, "float32")
  assert "61" in odd and "128" not in odd
  filled, found = widths(61, "bfloat16")
  assert "128" in filled and "61" not in filled
  np.testing.assert_allclose(found, exact, rtol=0.01)
  assert "64" in widths(64, "bfloat16")[0]


# Remat.


@pytest.mark.parametrize("trainable", [THETA, ANCHOR])
def test_what_is_computed_again_needs_no_memory(trainable):
  def peak(remat):
    compute = Compute(remat=remat, loss_chunk=64)
    anchor = {"num_layers": 17, "compute": compute}
    spec = pair(anchor, ((1, 1),))
    if trainable == ANCHOR:  # all layers at once
      spec = Composition(spec.anchor)
    return temporary_bytes(spec, trainable, rows=2, length=64)

  none, dots, full = map(peak, ("none", "dots", "full"))
  print(f"{none:,} bytes without remat, {dots:,} of dots, {full:,} in full")
  assert full < 0.7 * dots < 0.7 * 0.9 * none


@pytest.mark.parametrize("trainable", [THETA, ANCHOR])
def test_remat_changes_no_number(trainable):
  spec, params = helpers.compose(connections=((1, 1),))
  if trainable == ANCHOR:
    spec, params = Composition(spec.anchor), {"anchor": params["anchor"]}
  parts = trees.partition(params, trees.mask(params, [trainable]))
  none, dots, full = (
    gradients(helpers.retype(spec, remat=remat))(*parts, batch())
    for remat in ("none", "dots", "full")
  )
  assert_same(dots, none)
  assert_same(full, none)


def test_there_is_no_other_remat():
  with pytest.raises(InputError, match="remat='some' is none of"):
    Compute(remat="some")
