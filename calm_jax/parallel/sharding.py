"""Layouts of arrays on a mesh of devices: rules from leaf names to axes.

`data` and `fsdp` share the rows of a batch, `tensor` the work of a matrix,
`sequence` the tokens of a row; `fsdp` also cuts the parameters, which are
gathered a layer at a time.

A rule is (regex, axes); the first whose regex matches a leaf's whole name
holds. Its axes belong to the leaf's last dimensions: each is None, the name of
an axis, or a tuple of names. Other arrays have names too: "states" are the
hidden states [B, L, D], "heads" what attention kernels read [B, N, L, H],
"batch/.*" the arrays of a batch [B, L], "cache/.*" those of a decoding cache.

Where an axis does not divide its dimension, a parameter is cut along another
one, a batch is an error, and all else is computed whole by each device.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from calm_jax.core import trees
from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError

Rules = tuple[tuple[str, tuple], ...]
PyTree = Any
Axes = tuple[str, ...]

_STACKED = re.compile(r"(.*/)?layers/.*")


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh, and the rules that say where arrays lie on it."""

  mesh: Mesh
  rules: Rules

  def __post_init__(self):
    known = self.mesh.axis_names
    for pattern, axes in self.rules:
      try:
        re.compile(pattern)
      except re.error as error:
        raise InputError(f"sharding rule {pattern!r}: {error}") from error
      names = {name for entry in axes for name in axis_names(entry)}
      if unknown := sorted(names - {*known}):
        raise InputError(
          f"sharding rule {pattern!r}: no axes {unknown} in the mesh's {known}"
        )

  def rule(self, name: str) -> tuple[Axes, ...] | None:
    """The axes, of several devices, of the first rule that matches a name."""
    for pattern, axes in self.rules:
      if re.fullmatch(pattern, name):
        return tuple(self._real(axis_names(entry)) for entry in axes)
    return None

  def size(self, names: Iterable[str]) -> int:
    """The number of devices along these axes."""
    return math.prod(self.mesh.shape[n] for n in names)

  # Parameters, and the optimizer's state.

  def spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """The axes along which a parameter is cut.

    An axis that does not divide its dimension cuts the largest that it does
    divide, if any. So does `fsdp` with a parameter of no rule. The leading
    dimension of stacked layers is never cut.
    """
    return partition(self._cut_parameter(name, shape)[0])

  def shardings(self, shapes: trees.Tree, prefix: str = "") -> dict[str, Any]:
    """NamedShardings for parameters: all, or the part "anchor/" of a tree."""
    return trees.unflatten(
      {
        name: NamedSharding(self.mesh, self.spec(prefix + name, leaf.shape))
        for name, leaf in trees.flatten(shapes).items()
      }
    )

  def place(self, params: trees.Tree) -> dict[str, Any]:
    """Puts leaves, whole on each process, where `shardings` says."""
    shardings = trees.flatten(self.shardings(params))
    leaves = trees.flatten(params).items()
    return trees.unflatten({n: _put(x, shardings[n]) for n, x in leaves})

  def following(self, state: PyTree) -> PyTree:
    """NamedShardings for a training state: each leaf follows its parameter.

    A leaf belongs to the parameter whose name its dict keys end in
    ("opt_state/.../mu/composition/kv/..."). All others are replicated.
    """
    params = trees.flatten(state["trainable"])

    def sharding(path, leaf):
      keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
      for start in range(len(keys)):
        name = "/".join(keys[start:])
        if name in params and params[name].shape == leaf.shape:
          return NamedSharding(self.mesh, self.spec(name, leaf.shape))
      return NamedSharding(self.mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)

  def describe(self, shapes: trees.Tree) -> str:
    """Names the mesh and what could not be cut as its rule says."""
    lines, whole, here = [], 0, 0
    for name, leaf in trees.flatten(shapes).items():
      cut, moved = self._cut_parameter(name, leaf.shape)
      size = math.prod(leaf.shape) * leaf.dtype.itemsize
      whole += size
      here += size // math.prod(map(self.size, cut))
      if self.rule(name) is None:
        continue
      for names, dim in moved:
        how = "replicated over it" if dim is None else f"cut along axis {dim}"
        lines.append(f"\n  {name} {list(leaf.shape)}: {'+'.join(names)} {how}")
    sizes = {n: s for n, s in self.mesh.shape.items() if s > 1}
    return (
      f"mesh of {self.mesh.size} devices: {sizes}\n  {whole:,} bytes of "
      f"parameters, {here:,} on each device{''.join(lines)}"
    )

  # Batches.

  def share(self, batch_size: int, pieces: int = 1) -> tuple[int, int]:
    """This process's part of the B rows of a batch: (index, of how many).

    Raises InputError if the devices cannot share each piece's rows evenly.
    """
    axes = (self.rule("batch/tokens") or ((),))[0]
    if batch_size % (multiple := self.size(axes) * pieces):
      raise InputError(
        f"batch_size={batch_size} (accumulate={pieces}) cannot be shared by "
        f"the {self.size(axes)} devices along {axes}; make it a multiple of "
        f"{multiple}"
      )
    sharding = NamedSharding(self.mesh, partition([axes]))
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    ranges = [index[0].indices(batch_size)[:2] for index in held if index]
    first, end = min(r[0] for r in ranges), max(r[1] for r in ranges)
    mine = end - first
    if batch_size % mine or first % mine:
      raise InputError(
        f"the rows {first} to {end - 1} of {batch_size} that process "
        f"{jax.process_index()} holds are no even share; order the mesh so "
        "that a process's devices are neighbours"
      )
    return first // mine, batch_size // mine

  def batch(self, rows: Batch, batch_size: int) -> Batch:
    """Global arrays [B, L] of a batch, from all rows or this process's `share`.

    Raises InputError if an axis does not divide B or L.
    """
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), rows
    )

    def global_array(x, sharding):
      shape = (batch_size, *x.shape[1:])
      return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(global_array, rows, self.batch_shardings(shapes))

  def batch_shardings(self, shapes: Batch) -> Batch:
    """NamedShardings for the arrays of a whole batch; raises as `batch`."""

    def sharding(name, x):
      cut, undivided = self._cut(self.rule(name), x.shape)
      for names, dim in undivided:
        raise InputError(
          f"{name} {list(x.shape)}: {self.size(names)} devices along "
          f"{'+'.join(names)} cannot share its axis {dim} evenly"
        )
      return NamedSharding(self.mesh, partition(cut))

    return _map_named(sharding, "batch", shapes)

  # Arrays within programs.

  def caches(self, shapes: PyTree) -> PyTree:
    """NamedShardings for a decoding cache or its shapes."""
    return _map_named(self.fitting, "cache", shapes)

  def constrain_all(self, kind: str, arrays: PyTree) -> PyTree:
    """A "batch", or pieces of one, or a "cache" where their rules say."""
    return _map_named(self.constrain, kind, arrays)

  def constrain(self, name: str, x: jax.Array) -> jax.Array:
    """An array where the rule of its name says, if there is one."""
    if self.rule(name) is None:
      return x
    return jax.lax.with_sharding_constraint(x, self.fitting(name, x))

  def fitting(self, name: str, x: jax.Array) -> NamedSharding:
    """A rule's sharding, without the axes that do not divide the shape."""
    cut, _ = self._cut(self.rule(name), x.shape)
    return NamedSharding(self.mesh, partition(cut))

  def _cut_parameter(self, name: str, shape: tuple[int, ...]):
    """Axes along each dimension; (axes, dimension or None) of those moved."""
    first = 1 if _STACKED.fullmatch(name) else 0
    cut, undivided = self._cut(self.rule(name), shape, first)
    if self.rule(name) is None:
      undivided = [(self._real(("fsdp",)), None)]
    moved = []
    for names, _ in undivided:
      here = {
        dim: shape[dim] // self.size(cut[dim])
        for dim in range(first, len(shape))
        if shape[dim] % self.size(cut[dim] + names) == 0
      }
      largest = max(here, key=lambda dim: here[dim], default=None)
      if largest is not None:
        cut[largest] += names
      moved.append((names, largest))
    return cut, moved

  def _cut(self, rule: tuple | None, shape: tuple[int, ...], first: int = 0):
    """Axes along each dimension they divide; (axes, dimension) of the rest."""
    cut: list[Axes] = [()] * len(shape)
    undivided, rule = [], rule or ()
    for dim, names in enumerate(rule, start=len(shape) - len(rule)):
      if dim >= first and shape[dim] % self.size(names) == 0:
        cut[dim] = names
      elif names:
        undivided.append((names, dim))
    return cut, undivided

  def _real(self, names: Axes) -> Axes:
    """The axes that have more than one device."""
    return tuple(n for n in names if self.mesh.shape[n] > 1)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
  """An array where a sharding says; the same one if it lies there."""
  if isinstance(leaf, jax.Array):
    if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
      return leaf
    if not leaf.is_fully_addressable or sharding.is_fully_addressable:
      return jax.device_put(leaf, sharding)
  # `device_put` would compare what all processes hold.
  whole = np.asarray(leaf)
  return jax.make_array_from_process_local_data(sharding, whole, whole.shape)


def axis_names(axes: Any) -> Axes:
  """The names in one entry of a rule or spec."""
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def partition(cut: Iterable[Collection[str]]) -> PartitionSpec:
  """The spec of the axes along each dimension."""
  return PartitionSpec(*(tuple(names) or None for names in cut))


def _map_named(function: Callable, kind: str, arrays: PyTree) -> PyTree:
  """Maps (name, array) of each leaf; a name is "batch/anchor/tokens"."""

  def named(path, x):
    path = jax.tree_util.keystr(path, simple=True, separator="/")
    return function(f"{kind}/{path}", x)

  return jax.tree_util.tree_map_with_path(named, arrays)
