"""Attention kernels on a mesh: XLA cannot partition them, `shard_map` does.

B batch, L query length, S key length, N query heads, K key-value heads, H head
width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array


def attend(
  mesh: Mesh,
  spec: PartitionSpec,
  function: Callable,
  kernel: Any,
  q_BNLH: Array,
  k_BKSH: Array,
  v_BKSH: Array,
  *others: Array,
) -> Array:
  """Calls function(kernel, arrays) on each device's rows, heads and queries.

  Key-value heads are repeated if more devices share the heads than there are.

  Args:
    spec: of the queries, along their first three axes.
    function: returns [B, N, L, H].
    kernel: a `SplashAttentionKernel` of all queries, made for as many pieces
      as `spec` cuts them into; None for one that reads a mask.
    *others: segments of the queries [B, L] and of the keys [B, S]; without a
      kernel a mask [B, 1, L, S].
  """
  rows, heads, tokens, _ = spec
  names = (heads,) if isinstance(heads, str) else heads or ()
  shares = math.prod(mesh.shape[name] for name in names)
  N, K = q_BNLH.shape[1], k_BKSH.shape[1]
  if K % shares:
    needed = math.lcm(K, shares)
    times = (N if N % needed else needed) // K
    k_BKSH, v_BKSH = (jnp.repeat(x, times, axis=1) for x in (k_BKSH, v_BKSH))
  keys = PartitionSpec(rows, heads)
  if kernel is None:
    kernel_spec, other_specs = None, (PartitionSpec(rows, None, tokens),)
  else:
    sharding = NamedSharding(mesh, PartitionSpec(None, tokens))
    kernel_spec = kernel.manual_sharding_spec(sharding)
    other_specs = PartitionSpec(rows, tokens), PartitionSpec(rows)
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=(kernel_spec, spec, keys, keys, *other_specs),
    out_specs=spec,
    check_vma=False,
  )(kernel, q_BNLH, k_BKSH, v_BKSH, *others)
