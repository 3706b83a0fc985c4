"""The placement of one model on a mesh, for `models.config.Compute.place`.

B batch, L query length, S key length, D width, N query heads, K key-value
heads, H head width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from calm_jax.parallel.sharding import Layout, axis_names, partition

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ModelPlacement:
  """Constrains a model's arrays, within programs, to where a layout says."""

  layout: Layout
  prefix: str  # Of the model's leaves in the whole tree, with "/" at its end.

  def weight(self, name: str, weight: Array) -> Array:
    """A leaf of one layer as it computes: gathered, but for `tensor`.

    The name is among the model's, "layers/attention/query/kernel"; the weight
    is without the leading axis of the stack.
    """
    spec = self.layout.spec(self.prefix + name, (1, *weight.shape))
    kept = [{"tensor"}.intersection(axis_names(axes)) for axes in spec[1:]]
    sharding = NamedSharding(self.layout.mesh, partition(kept))
    return jax.lax.with_sharding_constraint(weight, sharding)

  def states(self, x_BLD: Array) -> Array:
    """Hidden states between layers."""
    return self.layout.constrain("states", x_BLD)

  def shares(self, x_BLD: Array) -> tuple[int, int]:
    """Counts the devices that share the rows, and the tokens, of states."""
    rows, tokens, _ = self.layout.fitting("states", x_BLD).spec
    size = self.layout.size
    return size(axis_names(rows)), size(axis_names(tokens))

  def cache(self, cache: Any) -> Any:
    """The KV cache."""
    return self.layout.constrain_all("cache", cache)

  @property
  def sequence(self) -> int:
    """Pieces that the queries of an attention kernel are cut into."""
    _, _, tokens, _ = self.layout.rule("heads") or ((),) * 4
    return self.layout.size(tokens)

  def attention(
    self,
    function: Callable,
    kernel: Any,
    q_BNLH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    *others: Array,
  ) -> Array:
    """Calls function(kernel, arrays) on each device's rows, heads and queries.

    XLA cannot partition kernels, `shard_map` does. Key-value heads are repeated
    if more devices share the heads than there are.

    Args:
      function: returns [B, N, L, H].
      kernel: a `SplashAttentionKernel` of all queries, made for `sequence`
        pieces; None for cuDNN's.
      *others: segments of the queries [B, L] and of the keys [B, S]; without
        a kernel a mask [B, 1, L, S] or nothing.
    """
    mesh, spec = self.layout.mesh, self.layout.fitting("heads", q_BNLH).spec
    rows, heads, tokens, _ = spec
    shares = self.layout.size(axis_names(heads))
    N, K = q_BNLH.shape[1], k_BKSH.shape[1]
    if K % shares:
      needed = math.lcm(K, shares)
      times = (N if N % needed else needed) // K
      k_BKSH, v_BKSH = (jnp.repeat(x, times, axis=1) for x in (k_BKSH, v_BKSH))
    if kernel is None:
      kernel_spec = None
      other_specs = (P(rows, None, tokens),) * len(others)
    else:
      sharding = NamedSharding(mesh, P(None, tokens))
      kernel_spec = kernel.manual_sharding_spec(sharding)
      other_specs = P(rows, tokens), P(rows)
    keys = P(rows, heads)
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(kernel_spec, spec, keys, keys, *other_specs),
      out_specs=spec,
      check_vma=False,
    )(kernel, q_BNLH, k_BKSH, v_BKSH, *others)


def placements(layout: Layout) -> Callable[[str], dict[str, Any]]:
  """The placement of each part, for `Composition.with_compute`."""
  return lambda part: {"place": ModelPlacement(layout, f"{part}/")}
