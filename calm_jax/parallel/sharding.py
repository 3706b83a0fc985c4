"""Where arrays lie on a mesh of devices: rules from leaf names to axes.

The axes are `data` and `fsdp`, which share the rows of a batch, `tensor`, which
shares the work of a matrix, and `sequence`, which shares the tokens of a row.
`fsdp` besides cuts the parameters, which are gathered a layer at a time.

A rule is (regex, axes). The first whose regex matches a leaf's whole name
holds. Its axes belong to the leaf's last dimensions: each is None, the name of
an axis, or a tuple of names; the dimensions before them, and with () all, are
not cut. What else has a name: "states" are the hidden states [B, L, D],
"heads" what kernels of attention read [B, N, L, H], "batch/.*" the arrays of a
batch [B, L], "cache/.*" those of a decoding cache.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from calm_jax.core import trees
from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError
from calm_jax.parallel import attention as kernels

Rules = tuple[tuple[str, tuple], ...]
PyTree = Any

# Of a parameter of no rule.
_UNRULED = "fsdp"
# What a layer's weights stay cut by while it computes.
_COMPUTED = ("tensor",)
_STACKED = re.compile(r"(.*/)?layers/.*")
# The name that says how the rows of a batch are shared, alike for all arrays.
_ROWS = "batch/tokens"


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh, and the rules that say where arrays lie on it.

  Attributes:
    mesh: from `mesh.make_mesh`.
    rules: in the order in which they are tried.

  Raises:
    InputError: a rule is no regular expression, or names an axis that the mesh
      does not have.
  """

  mesh: Mesh
  rules: Rules

  def __post_init__(self):
    for pattern, axes in self.rules:
      try:
        re.compile(pattern)
      except re.error as error:
        raise InputError(f"sharding rule {pattern!r}: {error}") from error
      unknown = {n for a in axes for n in _names(a)} - {*self.mesh.axis_names}
      if unknown:
        raise InputError(
          f"sharding rule {pattern!r} names the axes {sorted(unknown)}; there "
          f"are {self.mesh.axis_names}"
        )

  # Parameters, and what follows them.

  def shardings(self, shapes: trees.Tree) -> dict[str, Any]:
    """A tree of NamedShardings for a tree of parameters or their shapes."""
    return trees.unflatten(
      {
        name: self._named(self.spec(name, leaf.shape)[0])
        for name, leaf in trees.flatten(shapes).items()
      }
    )

  def place(self, params: trees.Tree) -> dict[str, Any]:
    """The tree with every leaf where `shardings` says.

    A leaf that lies there already is the same array. On several processes each
    gives the same whole leaves.
    """
    places = trees.flatten(self.shardings(params))
    return trees.unflatten(
      {
        name: put(leaf, places[name])
        for name, leaf in trees.flatten(params).items()
      }
    )

  def following(self, state: PyTree) -> PyTree:
    """NamedShardings for a training state: each leaf follows its parameter.

    By name: a leaf belongs to the parameter whose name its dict keys end in
    ("opt_state/.../mu/composition/kv/..."). Scalars and keys are replicated.
    """
    params = trees.flatten(state["trainable"])

    def one(path, leaf):
      keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
      for start in range(len(keys)):
        name = "/".join(keys[start:])
        if name in params and params[name].shape == leaf.shape:
          return self._named(self.spec(name, leaf.shape)[0])
      return self._named(PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)

  def spec(
    self, name: str, shape: tuple[int, ...]
  ) -> tuple[PartitionSpec, tuple]:
    """How a parameter is cut, and what its rule wanted and could not have.

    Where an axis does not divide its dimension, it cuts the largest that it
    does divide, of what one device holds; where there is none, none. A leaf of
    no rule is cut by `fsdp` in the same way. The leading dimension of stacked
    layers is never cut.

    Returns:
      (spec, ((axes, dimension that they cut or None), ...)).
    """
    first = 1 if _STACKED.fullmatch(name) else 0
    axes = self._rule(name)
    wanted = [(_UNRULED, None)]
    if axes is not None:
      start = len(shape) - len(axes)
      wanted = [(a, start + i) for i, a in enumerate(axes)]
    cut: list[tuple[str, ...]] = [()] * len(shape)
    homeless = []
    for names, dim in wanted:
      names = self._real(names)
      if not names:
        continue
      if dim is not None and dim >= first and self._fits(shape, dim, names):
        cut[dim] = names
      else:
        homeless.append(names)
    moved = []
    for names in homeless:
      dims = [
        dim
        for dim in range(first, len(shape))
        if self._fits(shape, dim, cut[dim] + names)
      ]
      best = max(
        dims, key=lambda d: shape[d] // self._size(cut[d]), default=None
      )
      if best is not None:
        cut[best] += names
      moved.append((names, best))
    return _partition(cut), tuple(moved) if axes is not None else ()

  def describe(self, shapes: trees.Tree) -> str:
    """How large the mesh is, and what could not be cut as its rule says."""
    sizes = {n: s for n, s in self.mesh.shape.items() if s > 1}
    lines = [f"mesh of {self.mesh.size} devices: {sizes}"]
    whole = here = 0
    for name, leaf in trees.flatten(shapes).items():
      spec, moved = self.spec(name, leaf.shape)
      size = math.prod(leaf.shape) * leaf.dtype.itemsize
      whole += size
      here += size // self._size([n for a in spec for n in _names(a)])
      for names, dim in moved:
        how = "replicated over it" if dim is None else f"cut along axis {dim}"
        lines.append(f"  {name} {list(leaf.shape)}: {'+'.join(names)} {how}")
    lines.insert(1, f"  {whole:,} bytes of parameters, {here:,} on each device")
    return "\n".join(lines)

  # Batches.

  def share(self, batch_size: int, pieces: int = 1) -> tuple[int, int]:
    """This process's part of the rows of a batch: (index, of how many).

    Args:
      batch_size: B, rows of the global batch.
      pieces: that a batch is computed in, one after the other.

    Raises:
      InputError: the devices cannot share the rows of a piece evenly.
    """
    rule = self._rule(_ROWS) or (None,)
    rows = self._size(self._real(rule[0]))
    if batch_size % (rows * pieces):
      raise InputError(
        f"batch_size={batch_size} (accumulate={pieces}) cannot be shared by "
        f"the {rows} devices along {rule[0]}; make it a multiple of "
        f"{rows * pieces}"
      )
    held = self._batch(_ROWS, (batch_size, 1), (0,))
    starts = {
      index[0].indices(batch_size)[:2]
      for index in held.addressable_devices_indices_map(
        (batch_size, 1)
      ).values()
    }
    first, end = min(s for s, _ in starts), max(e for _, e in starts)
    mine = end - first
    if batch_size % mine or first % mine:
      raise InputError(
        f"the rows {first} to {end - 1} of {batch_size} that process "
        f"{jax.process_index()} holds are no even share; order the mesh so "
        "that a process's devices are neighbours"
      )
    return first // mine, batch_size // mine

  def batch(self, rows: Batch, batch_size: int) -> Batch:
    """Global arrays of a batch, from the rows that this process has.

    Args:
      rows: arrays [b, L]: all rows, or this process's `share`.
      batch_size: B, rows of the global batch.

    Raises:
      InputError: an axis does not divide B or L.
    """

    def whole(path, array):
      shape = (batch_size, *array.shape[1:])
      sharding = self._batch(f"batch/{_name(path)}", shape, range(len(shape)))
      first = 0
      if len(array) != batch_size:
        first = self.share(batch_size)[0] * len(array)

      def block(index):
        start, stop, _ = index[0].indices(batch_size)
        return array[(slice(start - first, stop - first), *index[1:])]

      return jax.make_array_from_callback(shape, sharding, block)

    return jax.tree_util.tree_map_with_path(whole, rows)

  def batch_shardings(self, shapes: Batch) -> Batch:
    """Where the arrays of a whole batch lie; raises as `batch`."""
    return jax.tree_util.tree_map_with_path(
      lambda path, x: self._batch(
        f"batch/{_name(path)}", x.shape, range(len(x.shape))
      ),
      shapes,
    )

  def pieces(self, batch: Batch) -> Batch:
    """A batch cut into pieces [pieces, B, L], each shared by all devices."""
    return jax.tree_util.tree_map_with_path(
      lambda path, x: self._constrain(f"batch/{_name(path)}", x), batch
    )

  # Inside of programs. Where an axis does not divide a dimension, every device
  # computes all of it.

  def at(self, prefix: str) -> Place:
    """What a model under a prefix of the tree is told: see `Place`."""
    return Place(self, prefix)

  def caches(self, shapes: PyTree) -> PyTree:
    """NamedShardings for a decoding cache or its shapes, as `cache` lays it."""
    return jax.tree_util.tree_map_with_path(
      lambda path, x: self._named(
        self._fitting(f"cache/{_name(path)}", x.shape)
      ),
      shapes,
    )

  def cache(self, cache: PyTree) -> PyTree:
    """A decoding cache, constrained to where its rules say."""
    return jax.tree_util.tree_map_with_path(
      lambda path, x: self._constrain(f"cache/{_name(path)}", x), cache
    )

  def _constrain(self, name: str, x: jax.Array) -> jax.Array:
    if self._rule(name) is None:
      return x
    sharding = self._named(self._fitting(name, x.shape))
    return jax.lax.with_sharding_constraint(x, sharding)

  def _fitting(self, name: str, shape) -> PartitionSpec:
    """What a rule says, without the axes that do not divide the shape."""
    axes = self._rule(name) or ()
    start = len(shape) - len(axes)
    cut: list[tuple[str, ...]] = [()] * len(shape)
    for i, names in enumerate(axes):
      names = self._real(names)
      if start + i >= 0 and self._fits(shape, start + i, names):
        cut[start + i] = names
    return _partition(cut)

  def _batch(self, name: str, shape, dims) -> NamedSharding:
    cut: list[tuple[str, ...]] = [()] * len(shape)
    for dim, names in enumerate(self._rule(name) or ()):
      cut[dim] = self._real(names)
      if dim in dims and not self._fits(shape, dim, cut[dim]):
        raise InputError(
          f"{name} {list(shape)}: {self._size(cut[dim])} devices along "
          f"{'+'.join(cut[dim])} cannot share its axis {dim} evenly"
        )
      if dim not in dims:
        cut[dim] = ()
    return self._named(_partition(cut))

  def _rule(self, name: str) -> tuple | None:
    for pattern, axes in self.rules:
      if re.fullmatch(pattern, name):
        return axes
    return None

  def _real(self, axes) -> tuple[str, ...]:
    """The names that cut anything."""
    return tuple(n for n in _names(axes) if self.mesh.shape[n] > 1)

  def _size(self, names) -> int:
    return math.prod(self.mesh.shape[n] for n in names)

  def _fits(self, shape, dim: int, names) -> bool:
    return shape[dim] % self._size(names) == 0

  def _named(self, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(self.mesh, spec)


@dataclasses.dataclass(frozen=True)
class Place:
  """What one model is told of a layout, and all that it is told.

  Attributes:
    layout: the layout.
    prefix: of the model's leaves in the whole tree, with "/" at its end.
  """

  layout: Layout
  prefix: str

  def weight(self, name: str, weight: jax.Array) -> jax.Array:
    """A leaf of one layer as it computes: gathered, but for `tensor`.

    Args:
      name: of the leaf among the model's, "layers/attention/query/kernel".
      weight: without the leading axis of the stack.
    """
    spec, _ = self.layout.spec(self.prefix + name, (1, *weight.shape))
    cut = [tuple(n for n in _names(a) if n in _COMPUTED) for a in spec[1:]]
    sharding = self.layout._named(_partition(cut))
    return jax.lax.with_sharding_constraint(weight, sharding)

  def states(self, x_BLD: jax.Array) -> jax.Array:
    """Hidden states [B, L, D] between layers."""
    return self.layout._constrain("states", x_BLD)

  def cache(self, cache: PyTree) -> PyTree:
    """See `Layout.cache`."""
    return self.layout.cache(cache)

  @property
  def sequence(self) -> int:
    """Pieces that the queries of a kernel of attention are cut into."""
    _, _, tokens, _ = self.layout._rule("heads") or (None,) * 4
    return self.layout._size(self.layout._real(tokens))

  def attention(self, function: Callable, kernel: Any, *arrays) -> jax.Array:
    """See `sharded_heads.attend`."""
    spec = self.layout._fitting("heads", arrays[0].shape)
    mesh = self.layout.mesh
    return kernels.attend(mesh, spec, function, kernel, *arrays)


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
  """An array where a sharding says; the same one if it lies there."""
  if isinstance(leaf, jax.Array):
    if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
      return leaf
    if not leaf.is_fully_addressable or sharding.is_fully_addressable:
      return jax.device_put(leaf, sharding)
  # `device_put` would compare what all processes hold.
  whole = np.asarray(leaf)
  return jax.make_array_from_callback(
    whole.shape, sharding, lambda index: whole[index]
  )


def _names(axes) -> tuple[str, ...]:
  """The names in one entry of a rule or spec."""
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(axes)


def _partition(cut: Sequence[tuple[str, ...]]) -> PartitionSpec:
  return PartitionSpec(
    *(names[0] if len(names) == 1 else names or None for names in cut)
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
