"""Kernels of attention on a mesh: XLA cannot cut them, so they are cut here.

B batch, L query length, S key length, N query heads, K key-value heads, H head
width.
"""

from __future__ import annotations

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
  """function(kernel, the arrays): each device its rows, heads and queries.

  Where more devices share the heads than there are key heads, those are
  repeated.

  Args:
    mesh: of all devices.
    spec: how the queries are cut, along their first three axes.
    function: gives [B, N, L, H], as the queries are.
    kernel: a `SplashAttentionKernel` of all queries, made for as many pieces
      as `spec` cuts them into; None for one that reads a mask.
    q_BNLH: queries.
    k_BKSH: keys.
    v_BKSH: values.
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
    of_kernel, of_others = None, (PartitionSpec(rows, None, tokens),)
  else:
    cut = NamedSharding(mesh, PartitionSpec(None, tokens))
    of_kernel = kernel.manual_sharding_spec(cut)
    of_others = PartitionSpec(rows, tokens), PartitionSpec(rows)
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=(of_kernel, spec, keys, keys, *of_others),
    out_specs=spec,
    check_vma=False,
  )(kernel, q_BNLH, k_BKSH, v_BKSH, *others)
