"""The leaves of any pytree by name, as they are stored and put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any


def by_name(state: PyTree) -> dict[str, Any]:
  """Names the leaves of any pytree; typed PRNG keys become their data."""
  named: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in named:
      raise ValueError(f"two leaves are called {name!r}")
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
      raise TypeError(f"leaf {name!r} is a {type(leaf).__name__}, not an array")
    named[name] = _key_data(leaf) if _is_key(leaf) else leaf
  return named


def like(abstract_state: PyTree, restored: Mapping[str, Any]) -> PyTree:
  """Puts named leaves back into the structure they were named from."""

  def pick(path, want):
    leaf = restored[jax.tree_util.keystr(path, simple=True, separator="/")]
    if _is_key(want):
      return jax.random.wrap_key_data(leaf, impl=_key_impl(want))
    return leaf

  return jax.tree_util.tree_map_with_path(pick, abstract_state)


def restore_args(leaf: Any) -> ocp.RestoreArgs:
  """How Orbax is to make a leaf: where, or as numpy."""
  if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
    return ocp.RestoreArgs(restore_type=np.ndarray)
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  sharding = leaf.sharding or default
  return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape)


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(key: Any) -> Any:
  if isinstance(key, jax.Array):
    return jax.random.key_data(key)
  data = jax.eval_shape(jax.random.key_data, key)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _key_impl(key: Any) -> Any:
  # `key_impl` takes a key or a tracer of one, but no ShapeDtypeStruct.
  found = []
  jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), key)
  return found[0]
