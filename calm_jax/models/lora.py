"""LoRA (Hu et al., 2022), the baseline of §4.4: y = x W + (x A) B.

A and B are leaves beside the kernel, "lora_a" [num_layers, in, R] and "lora_b"
[num_layers, R, out], for every linear layer of every block; embeddings and
head have none. A tree that was not given any has none, and `layers.Linear`
adds what it finds. There is no further scale: alpha equals the rank. Kernels
may be quantised (QLoRA; Dettmers et al., 2023).
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.models import quantisation

_ADAPTED = re.compile(r"layers/(attention|mlp)/\w+/kernel")


def add(params: dict, rank: int, rng: jax.Array) -> dict:
  """Adds fresh A and B to a decoder's tree; B is zero, so nothing changes yet.

  Args:
    params: of `decoder.param_shapes`, layers stacked; its leaves are kept.
    rank: R, at least 1.
    rng: for A, normal with variance 1 / in. New leaves are float32.

  Raises:
    InputError: the rank is no rank, or the MLPs are mixtures of experts.
  """
  if rank < 1:
    raise InputError(f"a LoRA of rank {rank}: give 1 or more")
  leaves = dict(trees.flatten(params))
  for i, (name, kernel) in enumerate(_kernels(params).items()):
    layers, wide_in, wide_out = kernel.shape
    key, shape = jax.random.fold_in(rng, i), (layers, wide_in, rank)
    owner = name.removesuffix("kernel")
    leaves[f"{owner}lora_a"] = jax.random.normal(key, shape) * wide_in**-0.5
    leaves[f"{owner}lora_b"] = jnp.zeros((layers, rank, wide_out))
  return trees.unflatten(leaves)


def merge(params: dict) -> dict:
  """Merges A and B into the kernels: W + A B, in the kernels' own dtype.

  A quantised tree with LoRA becomes one of arrays, in the norms' dtype.
  """
  leaves = dict(trees.flatten(params))
  if quantisation.kind_of(params) and any(
    n.endswith("/lora_a") for n in leaves
  ):
    dtype = params["final_norm"]["scale"].dtype
    leaves = dict(trees.flatten(quantisation.dequantise(params, dtype)))
  for name in [n for n in leaves if n.endswith("/lora_a")]:
    owner = name.removesuffix("lora_a")
    a, b = leaves.pop(name), leaves.pop(f"{owner}lora_b")
    kernel = leaves[f"{owner}kernel"]
    change = jnp.matmul(a, b, precision="highest")
    leaves[f"{owner}kernel"] = (kernel + change).astype(kernel.dtype)
  return trees.unflatten(leaves)


def closest_rank(params: dict, target: int) -> int:
  """Returns the rank, from 1, of A and B with about `target` parameters."""
  per_rank = sum(
    k.shape[0] * sum(k.shape[1:]) for k in _kernels(params).values()
  )
  below = max(1, target // per_rank)
  return min((below, below + 1), key=lambda rank: abs(rank * per_rank - target))


def _kernels(params: dict) -> dict:
  leaves = trees.flatten(jax.eval_shape(quantisation.dequantise, params))
  if any("/experts/" in name for name in leaves):
    raise InputError("LoRA of a mixture of experts is not built")
  return {n: leaf for n, leaf in leaves.items() if _ADAPTED.fullmatch(n)}
