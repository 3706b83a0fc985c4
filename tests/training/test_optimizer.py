"""The schedule, the clip and the decay, on trees of two leaves."""

from __future__ import annotations

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
    ({"warmup": 10}, "warmup=10.*steps=10"),
    ({"warmup": -1}, "warmup=-1"),
  ],
)
def test_a_schedule_that_cannot_be(change, said):
  with pytest.raises(InputError, match=said):
    optimizer.schedule(Stage(**{"steps": 10, "warmup": 2} | change))
