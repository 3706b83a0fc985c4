import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from calm_jax import tree
from calm_jax.errors import InputError


def example():
  return {
    "anchor": {"layers": {"w": jnp.ones((2, 3)), "b": jnp.zeros((3,))}},
    "composition": {"kv": {"proj": jnp.ones((4, 2), jnp.bfloat16)}},
  }


def test_flatten_and_back():
  leaves = tree.flatten(example())
  assert list(leaves) == [
    "anchor/layers/w",
    "anchor/layers/b",
    "composition/kv/proj",
  ]
  back = tree.unflatten(leaves)
  assert jax.tree.structure(back) == jax.tree.structure(example())


def test_unflatten_refuses_a_leaf_that_is_also_a_parent():
  with pytest.raises(ValueError, match="'a' is a leaf and the parent"):
    tree.unflatten({"a/b": 1, "a": 2})


def test_mask_matches_whole_names():
  selected = tree.mask(example(), ["composition/.*", "anchor/layers/b"])
  assert tree.flatten(selected) == {
    "anchor/layers/w": False,
    "anchor/layers/b": True,
    "composition/kv/proj": True,
  }
  assert not any(tree.flatten(tree.mask(example(), [])).values())


@pytest.mark.parametrize("pattern", ["composition", "anchors/.*"])
def test_mask_names_a_pattern_that_matches_nothing(pattern):
  with pytest.raises(InputError) as error:
    tree.mask(example(), [".*proj", pattern])
  assert repr(pattern) in str(error.value)
  assert "anchor/layers/w" in str(error.value)


def test_mask_refuses_bad_patterns():
  with pytest.raises(InputError, match="bad pattern"):
    tree.mask(example(), ["("])
  with pytest.raises(InputError, match="list of patterns"):
    tree.mask(example(), "composition/.*")


def test_partition_prunes_and_merge_restores():
  whole = example()
  selected, rest = tree.partition(whole, tree.mask(whole, ["composition/.*"]))
  assert list(selected) == ["composition"]
  assert list(rest) == ["anchor"]
  merged = tree.merge(selected, rest)
  assert tree.fingerprint(merged) == tree.fingerprint(whole)


def test_partition_refuses_another_structure():
  with pytest.raises(ValueError, match="composition/kv/proj"):
    tree.partition(example(), {"anchor": {"layers": {"w": True, "b": True}}})


def test_partition_and_merge_are_differentiable():
  whole = {"a": {"w": jnp.float32(2.0)}, "b": {"w": jnp.float32(3.0)}}
  selected, rest = tree.partition(whole, tree.mask(whole, ["a/.*"]))

  def loss(selected):
    params = tree.merge(selected, rest)
    return params["a"]["w"] * params["b"]["w"]

  assert jax.jit(jax.grad(loss))(selected) == {"a": {"w": 3.0}}


def test_merge_refuses_overlap():
  with pytest.raises(ValueError, match="a/w"):
    tree.merge({"a": {"w": 1, "b": 2}}, {"a": {"w": 3}})
  with pytest.raises(ValueError, match="parent of"):
    tree.merge({"a": 1}, {"a": {"w": 3}})


def test_count_reads_shapes_only():
  assert tree.count(example()) == 6 + 3 + 8
  shapes = jax.eval_shape(example)
  assert tree.count(shapes) == 17
  assert tree.count({"scalar": np.float32(1)}) == 1


def test_fingerprint_is_the_same_for_numpy_and_jax_and_any_order():
  arrays = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((3,), ml_dtypes.bfloat16),
    "c": np.int32(3),
    "d": np.zeros((0, 2), np.float32),
  }
  want = tree.fingerprint(arrays)
  assert tree.fingerprint(jax.tree.map(jnp.asarray, arrays)) == want
  assert tree.fingerprint(dict(reversed(arrays.items()))) == want
  strided = arrays | {"a": np.asfortranarray(arrays["a"])}
  assert tree.fingerprint(strided) == want


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
  assert tree.fingerprint(original) != tree.fingerprint(changed)


def test_check_same_structure_lists_both_sides():
  got = {"a": np.zeros((2,)), "b": np.zeros((3,)), "old": np.zeros((1,))}
  want = {
    "a": np.zeros((2,)),
    "b": np.zeros((4,), np.float32),
    "new": np.zeros((5,)),
  }
  tree.check_same_structure(got, dict(got), "the file")
  with pytest.raises(InputError) as error:
    tree.check_same_structure(got, want, "the file")
  message = str(error.value)
  assert message.startswith("the file does not match")
  assert "missing (wanted, not found):\n  new: float64[5]" in message
  assert "unexpected (found, not wanted):\n  old: float64[1]" in message
  assert "b: found float64[3], wanted float32[4]" in message
