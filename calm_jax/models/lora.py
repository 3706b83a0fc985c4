"""LoRA (Hu et al., 2022), the baseline of §4.4: y = x W + (x A) B.

A and B are leaves beside the kernel, "lora_a" [num_layers, in, R] and "lora_b"
[num_layers, R, out], for every linear layer of every block; `layers.Linear`
adds them where they are. There is no further scale: alpha equals the rank.
Kernels may be quantised (QLoRA; Dettmers et al., 2023).
"""

import re

import jax
import jax.numpy as jnp

from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.models import quantisation

_ADAPTED = re.compile(r"layers/(attention|mlp)/\w+/kernel")


def add(params: dict, rank: int, rng: jax.Array) -> dict:
  """Adds float32 A and B of a rank to a decoder's tree.

  A is normal with variance 1 / in, and B is zero, so nothing changes yet. A
  rank below 1, or MLPs that are mixtures of experts, raise InputError.
  """
  if rank < 1:
    raise InputError(f"a LoRA of rank {rank}: give 1 or more")
  leaves = trees.flatten(params)
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
  names = [n for n in trees.flatten(params) if n.endswith("/lora_a")]
  if names and quantisation.kind_of(params):
    dtype = params["final_norm"]["scale"].dtype
    params = quantisation.dequantise(params, dtype)
  leaves = trees.flatten(params)
  for name in names:
    owner = name.removesuffix("lora_a")
    a, b = leaves.pop(name), leaves.pop(f"{owner}lora_b")
    kernel = leaves[f"{owner}kernel"]
    change = jnp.matmul(a, b, precision="highest")
    leaves[f"{owner}kernel"] = (kernel + change).astype(kernel.dtype)
  return trees.unflatten(leaves)


def closest_rank(params: dict, target: int) -> int:
  """Returns the rank, from 1, of A and B with about `target` parameters."""
  shapes = [kernel.shape for kernel in _kernels(params).values()]
  per_rank = sum(layers * (wide + out) for layers, wide, out in shapes)
  below = max(1, target // per_rank)
  return min((below, below + 1), key=lambda rank: abs(rank * per_rank - target))


def _kernels(params: dict) -> dict:
  """Returns the kernels that get A and B, dense and abstract, by name."""
  leaves = trees.flatten(jax.eval_shape(quantisation.dequantise, params))
  if any("/experts/" in name for name in leaves):
    raise InputError("LoRA of a mixture of experts is not built")
  return {n: leaf for n, leaf in leaves.items() if _ADAPTED.fullmatch(n)}
