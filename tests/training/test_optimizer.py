"""AdamW, Muon, the schedule, the clip and the decay, on small trees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.training import optimizer
from calm_jax.training.stage import Stage

PARAMS = {
  "anchor": {"kernel": jnp.full((5,), 7.0)},
  "composition": {
    "kernel": jnp.arange(1.0, 4.0), "norm": {"scale": jnp.full((2,), 3.0)}
  },
}  # fmt: skip
GRADS = {"kernel": jnp.array([3.0, 0.0, 0.0]), "norm": {"scale": jnp.ones(2)}}


def make(**changes) -> tuple[optimizer.Optimizer, dict]:
  """The optimizer of the composition, and its trainable leaves."""
  mask = trees.mask(PARAMS, ["composition/.*"])
  settings = {"weight_decay": 0.0, "clip": 1e9} | changes
  stage = Stage(schedule="constant", learning_rate=0.5, warmup=0, **settings)
  trainable, _ = trees.partition(PARAMS, mask)
  return optimizer.make_optimizer(stage, mask), trainable


def moments(opt_state) -> dict:
  """The first moments by the end of their names."""
  return {
    path[-1].key: np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    if any(getattr(key, "name", "") == "mu" for key in path)
  }


def test_the_clip_is_of_the_trainable_leaves():
  made, trainable = make(clip=1.0)
  grads = {"composition": GRADS}
  _, state = made.update(grads, made.init(trainable), trainable)
  norm = np.sqrt(9 + 2)
  mu = moments(state)
  np.testing.assert_allclose(mu["kernel"], [0.3 / norm, 0, 0], rtol=1e-6)
  np.testing.assert_allclose(mu["scale"], [0.1 / norm] * 2, rtol=1e-6)
  assert mu.keys() == {"kernel", "scale"}


def test_small_gradients_are_not_clipped():
  made, trainable = make(clip=4.0)
  grads = {"composition": GRADS}
  _, state = made.update(grads, made.init(trainable), trainable)
  np.testing.assert_allclose(moments(state)["kernel"], [0.3, 0, 0], rtol=1e-6)


def test_decay_skips_norms_and_frozen_leaves():
  made, trainable = make(weight_decay=0.1)
  zeros = jax.tree.map(jnp.zeros_like, trainable)
  new, _ = made.update(zeros, made.init(trainable), trainable)
  assert trees.flatten(new).keys() == trees.flatten(trainable).keys()
  theta = new["composition"]
  # Decoupled: learning rate * decay * weight, whatever the gradient.
  np.testing.assert_allclose(
    theta["kernel"], 0.95 * PARAMS["composition"]["kernel"], rtol=1e-6
  )
  np.testing.assert_array_equal(theta["norm"]["scale"], [3.0, 3.0])


def test_update_is_adamw_on_the_trainable_leaves():
  made, trainable = make()
  grads = {"composition": GRADS}
  new, state = made.update(grads, made.init(trainable), trainable)
  new, _ = made.update(grads, state, new)
  adam = optax.adam(0.5, b1=0.9, b2=0.98)
  want, state = trainable, adam.init(trainable)
  for _ in range(2):
    updates, state = adam.update(grads, state)
    want = optax.apply_updates(want, updates)
  assert trees.flatten(new).keys() == trees.flatten(want).keys()
  for name, leaf in trees.flatten(want).items():
    np.testing.assert_allclose(trees.flatten(new)[name], leaf, rtol=1e-6)


# A stack of layers, a tall and a wide matrix, and leaves that are Adam's.
MODEL = {
  "anchor": {
    "embed": {"embedding": (7, 5)},
    "layers": {
      "mlp": {"down": {"kernel": (3, 9, 5)}, "up": {"kernel": (3, 5, 9)}},
      "norm": {"scale": (3, 5)},
    },
    "head": {"kernel": (5, 7), "bias": (7,)},
  },
  "composition": {"query": {"kernel": (6, 4), "lora_a": (6, 2)}},
}
MUON = ["layers/mlp/down/kernel", "layers/mlp/up/kernel", "query/kernel"]


def draw(seed) -> dict:
  """Standard normal leaves of MODEL's shapes."""
  shapes = trees.flatten(MODEL)
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return trees.unflatten(
    {
      name: jax.random.normal(key, shape)
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
  )


def muon_direction(momentum: np.ndarray) -> np.ndarray:
  """Newton-Schulz by its effect on the singular values of each matrix."""
  if momentum.ndim > 2:
    return np.stack([muon_direction(matrix) for matrix in momentum])
  left, values, right = np.linalg.svd(momentum, full_matrices=False)
  values = values / np.linalg.norm(values)
  for _ in range(5):
    values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
  return (left * values) @ right * 0.3 * max(momentum.shape) ** 0.5


def test_muon_is_newton_schulz_of_each_matrix_and_adam_elsewhere():
  stage = Stage(
    schedule="constant", optimizer="muon", learning_rate=0.5, warmup=0,
    weight_decay=0.1, clip=1e9,
  )  # fmt: skip
  params, first, second = draw(0), draw(1), draw(2)
  mask = trees.mask(params, [".*"])
  made = optimizer.make_optimizer(stage, mask)
  new, state = made.update(first, made.init(params), params)
  new, state = made.update(second, state, new)
  adamw = dataclasses.replace(stage, optimizer="adamw")
  other = optimizer.make_optimizer(adamw, mask)
  want, state = other.update(first, other.init(params), params)
  want, _ = other.update(second, state, want)
  g1, g2, old, new, want = (
    trees.flatten(t) for t in (first, second, params, new, want)
  )
  for name, leaf in old.items():
    expected = np.asarray(want[name])
    if name.partition("/")[2] in MUON:
      expected = np.asarray(leaf, np.float64)
      # Nesterov's momentum: a mean of all gradients, the newest once more.
      means = 0.05 * g1[name], 0.05 * (0.95 * g1[name] + g2[name])
      for step, (mean, g) in enumerate(zip(means, (g1, g2), strict=True), 1):
        ahead = 0.95 * mean / (1 - 0.95 ** (step + 1))
        momentum = ahead + 0.05 * g[name] / (1 - 0.95**step)
        direction = muon_direction(np.asarray(momentum, np.float64))
        expected = expected - 0.5 * (direction + 0.1 * expected)
    np.testing.assert_allclose(new[name], expected, rtol=2e-4, atol=2e-4)


def test_muon_has_state_of_trainable_leaves_only():
  params = draw(0)
  mask = trees.mask(params, ["composition/.*"])
  stage = Stage(optimizer="muon", warmup=0, clip=1.0)
  trainable, _ = trees.partition(params, mask)
  made = optimizer.make_optimizer(stage, mask)
  state = made.init(trainable)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  named = {
    tuple(k.key for k in path if hasattr(k, "key"))[1:]
    for path, leaf in leaves
    if leaf.ndim == 2
  }
  query = ("composition", "query")
  assert named == {(*query, "kernel"), (*query, "lora_a")}
  new, _ = made.update(trainable, state, trainable)
  assert trees.flatten(new).keys() == trees.flatten(trainable).keys()


@pytest.mark.parametrize(
  ("kind", "warmup", "values"),
  [
    # Halfway down the cosine lies the mean of the peak and the last rate.
    ("cosine", 10, {0: 0, 5: 1.0, 10: 2.0, 60: 1.1, 110: 0.2}),
    ("cosine", 0, {0: 2.0, 55: 1.1, 110: 0.2}),
    ("constant", 10, {0: 0, 5: 1.0, 10: 2.0, 60: 2.0, 110: 2.0}),
  ],
)
def test_schedule(kind, warmup, values):
  rate = optimizer.schedule(
    Stage(schedule=kind, learning_rate=2.0, steps=110, warmup=warmup, final=0.1)
  )
  for step, value in values.items():
    assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"schedule": "linear"}, "'linear'"),
    ({"optimizer": "sgd"}, "'sgd'"),
    ({"warmup": 10}, "warmup=10.*steps=10"),
    ({"warmup": -1}, "warmup=-1"),
  ],
)
def test_an_optimizer_that_cannot_be(change, said):
  with pytest.raises(InputError, match=said):
    stage = Stage(**{"steps": 10, "warmup": 2} | change)
    optimizer.make_optimizer(stage, trees.mask(PARAMS, [".*"]))
