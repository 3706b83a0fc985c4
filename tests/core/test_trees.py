import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from calm_jax.core import trees
from calm_jax.core.errors import InputError


def example():
  return {
    "anchor": {"layers": {"w": jnp.ones((2, 3)), "b": jnp.zeros((3,))}},
    "composition": {"kv": {"proj": jnp.ones((4, 2), jnp.bfloat16)}},
  }


def test_flatten_and_back():
  leaves = trees.flatten(example())
  assert list(leaves) == [
    "anchor/layers/w",
    "anchor/layers/b",
    "composition/kv/proj",
  ]
  back = trees.unflatten(leaves)
  assert jax.tree.structure(back) == jax.tree.structure(example())


def test_unflatten_refuses_a_leaf_that_is_also_a_parent():
  with pytest.raises(ValueError, match="'a' is a leaf and the parent"):
    trees.unflatten({"a/b": 1, "a": 2})


def test_mask_matches_whole_names():
  selected = trees.mask(example(), ["composition/.*", "anchor/layers/b"])
  assert trees.flatten(selected) == {
    "anchor/layers/w": False,
    "anchor/layers/b": True,
    "composition/kv/proj": True,
  }
  assert not any(trees.flatten(trees.mask(example(), [])).values())


@pytest.mark.parametrize("pattern", ["composition", "anchors/.*"])
def test_mask_names_a_pattern_that_matches_nothing(pattern):
  with pytest.raises(InputError) as error:
    trees.mask(example(), [".*proj", pattern])
  assert repr(pattern) in str(error.value)
  assert "anchor/layers/w" in str(error.value)


def test_mask_refuses_bad_patterns():
  with pytest.raises(InputError, match="bad pattern"):
    trees.mask(example(), ["("])
  with pytest.raises(InputError, match="list of patterns"):
    trees.mask(example(), "composition/.*")


def test_partition_prunes_and_merge_restores():
  whole = example()
  selected, rest = trees.partition(whole, trees.mask(whole, ["composition/.*"]))
  assert list(selected) == ["composition"]
  assert list(rest) == ["anchor"]
  merged = trees.merge(selected, rest)
  assert trees.fingerprint(merged) == trees.fingerprint(whole)


def test_partition_refuses_another_structure():
  with pytest.raises(ValueError, match="composition/kv/proj"):
    trees.partition(example(), {"anchor": {"layers": {"w": True, "b": True}}})


def test_partition_and_merge_are_differentiable():
  whole = {"a": {"w": jnp.float32(2.0)}, "b": {"w": jnp.float32(3.0)}}
  selected, rest = trees.partition(whole, trees.mask(whole, ["a/.*"]))

  def loss(selected):
    params = trees.merge(selected, rest)
    return params["a"]["w"] * params["b"]["w"]

  assert jax.jit(jax.grad(loss))(selected) == {"a": {"w": 3.0}}


def test_merge_refuses_overlap():
  with pytest.raises(ValueError, match="a/w"):
    trees.merge({"a": {"w": 1, "b": 2}}, {"a": {"w": 3}})
  with pytest.raises(ValueError, match="parent of"):
    trees.merge({"a": 1}, {"a": {"w": 3}})


def test_count_reads_shapes_only():
  assert trees.count(example()) == 6 + 3 + 8
  shapes = jax.eval_shape(example)
  assert trees.count(shapes) == 17
  assert trees.count({"scalar": np.float32(1)}) == 1


def test_fingerprint_is_the_same_for_numpy_and_jax_and_any_order():
  arrays = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((3,), ml_dtypes.bfloat16),
    "c": np.int32(3),
    "d": np.zeros((0, 2), np.float32),
  }
  want = trees.fingerprint(arrays)
  assert trees.fingerprint(jax.tree.map(jnp.asarray, arrays)) == want
  assert trees.fingerprint(dict(reversed(arrays.items()))) == want
  strided = arrays | {"a": np.asfortranarray(arrays["a"])}
  assert trees.fingerprint(strided) == want


@pytest.mark.parametrize(
  "changed",
  [
    {"b": np.zeros((2, 3), np.float32)},
    {"a": np.zeros((3, 2), np.float32)},
    {"a": np.zeros((2, 3), np.int32)},
    {"a": np.full((2, 3), -0.0, np.float32)},
  ],
)
def test_fingerprint_sees_name_shape_dtype_and_bits(changed):
  original = {"a": np.zeros((2, 3), np.float32)}
  assert trees.fingerprint(original) != trees.fingerprint(changed)


def test_check_same_structure_lists_both_sides():
  got = {"a": np.zeros((2,)), "b": np.zeros((3,)), "old": np.zeros((1,))}
  want = {
    "a": np.zeros((2,)),
    "b": np.zeros((4,), np.float32),
    "new": np.zeros((5,)),
  }
  trees.check_same_structure(got, dict(got), "the file")
  with pytest.raises(InputError) as error:
    trees.check_same_structure(got, want, "the file")
  message = str(error.value)
  assert message.startswith("the file does not match")
  assert "missing (wanted, not found):\n  new: float64[5]" in message
  assert "unexpected (found, not wanted):\n  old: float64[1]" in message
  assert "b: found float64[3], wanted float32[4]" in message
