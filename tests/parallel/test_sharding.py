"""Which rule holds for which leaf, and where it then lies."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from calm_jax.core import trees
from calm_jax.core.batch import Batch, plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.models import decoder, lora
from calm_jax.models.config import ModelConfig
from calm_jax.parallel.mesh import AXES
from calm_jax.parallel.rules import SHARDING
from calm_jax.parallel.sharding import Layout
from calm_jax.training import optimizer, step
from calm_jax.training.stage import Stage


def layout(rules=SHARDING, **axes) -> Layout:
  """Of devices that are not there: rules need only their numbers."""
  sizes = dict.fromkeys(AXES, 1) | axes
  return Layout(AbstractMesh(tuple(sizes.values()), tuple(sizes)), rules)


@pytest.mark.parametrize(
  ("name", "shape", "cut"),
  [
    ("layers/attention/query/kernel", (6, 64, 32), (None, "fsdp", "tensor")),
    ("layers/attention/output/kernel", (6, 32, 64), (None, "tensor", "fsdp")),
    (
      "layers/mlp/experts/down/kernel",
      (6, 8, 32, 64),
      (None, None, "tensor", "fsdp"),
    ),
    ("layers/attention_norm/scale", (6, 64), (None, None)),
    ("layers/mlp/up/lora_b", (6, 4, 40), (None, None, "tensor")),
    ("embed/embedding", (60, 32), ("tensor", "fsdp")),
    ("head/kernel", (32, 60), ("fsdp", "tensor")),
    ("layer_1_to_2/projection/kernel", (24, 32), ("fsdp", None)),
    # An odd vocabulary: both axes cut the width.
    ("embed/embedding", (61, 32), (None, ("fsdp", "tensor"))),
    # Neither the input nor the stack of four layers, but the output.
    ("layers/mlp/up/kernel", (4, 30, 40), (None, None, ("tensor", "fsdp"))),
    ("layers/mlp/up/kernel", (4, 31, 39), (None, None, None)),
    # No rule.
    ("matrix", (12, 64), (None, "fsdp")),
    ("layers/vector", (8,), (None,)),
  ],
)
def test_where_leaves_lie(name, shape, cut):
  assert layout(fsdp=4, tensor=2).spec(f"a/{name}", shape) == P(*cut)


def test_axes_of_one_device_cut_nothing():
  made, name, shape = layout(fsdp=4), "a/layers/mlp/up/kernel", (2, 8, 7)
  assert made.spec(name, shape) == P(None, "fsdp", None)
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  assert len(made.describe({name: leaf}).splitlines()) == 2


def test_the_first_rule_holds():
  rules = (("augmenting/.*", ()), *SHARDING)
  made = layout(rules, fsdp=4)
  name = "layers/mlp/up/kernel"
  shape = (2, 8, 8)
  assert made.spec(f"augmenting/kv/{name}", shape) == P(None, None, None)
  assert made.spec(f"anchor/{name}", shape) == P(None, "fsdp", None)


def test_describe_says_what_is_not_cut_as_its_rule_says():
  shapes = {
    "a": {
      "embed": {"embedding": jax.ShapeDtypeStruct((61, 32), jnp.float32)},
      "head": {"kernel": jax.ShapeDtypeStruct((31, 61), jnp.float32)},
      "layers": {
        "mlp": {"up": {"kernel": jax.ShapeDtypeStruct((4, 8, 8), "f4")}}
      },
    }
  }
  lines = layout(fsdp=4, tensor=2).describe(shapes).splitlines()
  assert "8 devices" in lines[0]
  assert lines[1].split()[0] == f"{4 * (61 * 32 + 31 * 61 + 256):,}"
  assert f"{4 * (61 * 4 + 31 * 61 + 32):,} on each" in lines[1]
  assert lines[2:] == [
    "  a/embed/embedding [61, 32]: tensor cut along axis 1",
    "  a/head/kernel [31, 61]: fsdp replicated over it",
    "  a/head/kernel [31, 61]: tensor replicated over it",
  ]


FAMILIES = {
  "plain": {},
  "biased": {
    "norm": "layer", "attention_bias": True, "output_bias": True,
    "mlp_bias": True, "gated_mlp": False, "learned_positions": True,
    "rope": None, "tie_embeddings": True,
  },
  "normed": {"post_norm": True, "qk_norm": "head"},
  "experts": {"num_experts": 4, "experts_per_token": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_leaf_has_a_rule(name):
  made = layout(fsdp=4, tensor=2)
  config = ModelConfig(
    **{
      "vocab_size": 64, "width": 32, "num_layers": 2, "num_heads": 4,
      "num_kv_heads": 2, "head_dim": 8, "mlp_width": 48,
    } | FAMILIES[name]
  )  # fmt: skip
  shapes = {"anchor": decoder.param_shapes(config)}
  if name == "plain":
    key = jax.random.key(0)
    shapes["anchor"] = jax.eval_shape(
      lambda p: lora.add(p, 4, key), shapes["anchor"]
    )
    shapes["composition"] = helpers.theta_shapes(helpers.compose()[0])
  for leaf, shape in trees.flatten(shapes).items():
    assert made.rule(leaf) is not None, leaf
    spec = made.spec(leaf, shape.shape)
    matrix = "norm/" not in leaf and not leaf.endswith("bias")
    assert any(spec) == matrix, leaf


@pytest.mark.parametrize(("kind", "copies"), [("adamw", 3), ("muon", 2)])
def test_optimizer_state_follows_its_parameter(kind, copies):
  made = layout(fsdp=4)
  params = {
    "a": {
      "layers": {"up": {"kernel": jnp.zeros((2, 8, 6))}},
      "final_norm": {"scale": jnp.zeros(8)},
    },
    "b": {"up": {"kernel": jnp.zeros((8, 6))}},
  }
  stage, mask = Stage(optimizer=kind), trees.mask(params, (".*",))
  state = step.initial_state(optimizer.make_optimizer(stage, mask), params)
  places = made.following(state)
  found: dict[str, set] = {}
  for path, place in jax.tree_util.tree_leaves_with_path(places):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for end in ("layers/up/kernel", "b/up/kernel", "scale", "count", "step"):
      if name.endswith(end):
        found.setdefault(end, []).append(place.spec)
  assert found == {
    # The parameter and its moments, of which Muon keeps only the first.
    "layers/up/kernel": [P(None, "fsdp", None)] * copies,
    "b/up/kernel": [P("fsdp", None)] * copies,
    "scale": [P(None)] * 3,
    "count": [P()] * (2 if kind == "adamw" else 3),
    "step": [P()],
  }


# What cannot be.


@pytest.mark.parametrize(
  ("rule", "said"),
  [(("(", ()), "missing"), ((".*", ("model",)), r"axes .'model'.")],
)
def test_a_rule_that_cannot_be(rule, said):
  with pytest.raises(InputError, match=said):
    layout((rule,))


def test_a_batch_that_cannot_be_shared():
  made = layout(data=2, fsdp=4)
  with pytest.raises(InputError, match=r"batch_size=12.*8 devices"):
    made.share(12)
  with pytest.raises(InputError, match="multiple of 32"):
    made.share(16, pieces=4)
  rows = Batch(plain_sequence(np.zeros((8, 6), np.int32)), {}, {})
  with pytest.raises(InputError, match=r"4 devices along sequence.*axis 1"):
    layout(sequence=4).batch(rows, 8)
