"""The placement of one model on a mesh, for `models.config.Compute.place`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from calm_jax.parallel import attention
from calm_jax.parallel.sharding import Layout, axis_names, partition


@dataclasses.dataclass(frozen=True)
class ModelPlacement:
  """Constrains a model's arrays, within programs, to where a layout says."""

  layout: Layout
  prefix: str  # Of the model's leaves in the whole tree, with "/" at its end.

  def weight(self, name: str, weight: jax.Array) -> jax.Array:
    """A leaf of one layer as it computes: gathered, but for `tensor`.

    The name is among the model's, "layers/attention/query/kernel"; the weight
    is without the leading axis of the stack.
    """
    spec = self.layout.spec(self.prefix + name, (1, *weight.shape))
    kept = partition(
      [tuple(n for n in axis_names(axes) if n == "tensor") for axes in spec[1:]]
    )
    sharding = NamedSharding(self.layout.mesh, kept)
    return jax.lax.with_sharding_constraint(weight, sharding)

  def states(self, x_BLD: jax.Array) -> jax.Array:
    """Hidden states [B, L, D] between layers."""
    return self.layout.constrain("states", x_BLD)

  def cache(self, cache: Any) -> Any:
    """The KV cache."""
    return self.layout.constrain_all("cache", cache)

  @property
  def sequence(self) -> int:
    """Pieces that the queries of a kernel of attention are cut into."""
    _, _, tokens, _ = self.layout.rule("heads") or (None,) * 4
    return self.layout.size(self.layout.real(tokens))

  def attention(self, function: Callable, kernel: Any, *arrays) -> jax.Array:
    """Calls a kernel on each device's share; see `attention.attend`."""
    spec = self.layout.fitting("heads", arrays[0]).spec
    return attention.attend(self.layout.mesh, spec, function, kernel, *arrays)


def placements(layout: Layout) -> Callable[[str], dict[str, Any]]:
  """The placement of each part, for `Composition.with_compute`."""
  return lambda part: {"place": ModelPlacement(layout, f"{part}/")}
