"""Layers whose matrices are joined for decoding on a GPU.

Matrices that read the same input are one, and all are transposed: a row times a
matrix [out, in] is a sum over contiguous weights. In a layer's tree stand

  attention/query_key_value, attention/output    in place of query, key, value
  mlp/gate_up (without a gate up), mlp/down      in place of gate and up

each with the leaf "transposed" in place of "kernel", which modules of `layers`
and `block` read.
"""

import jax
import jax.numpy as jnp

from calm_jax.models import quantisation

_TOGETHER = {
  "attention": {"query_key_value": ("query", "key", "value")},
  "mlp": {"gate_up": ("gate", "up")},
}


def join(layer: dict) -> dict:
  """Joins and transposes the matrices of one layer; experts stay as they are.

  So do matrices with LoRA. Those that are quantised differently from their
  neighbours are transposed only.
  """
  layer = dict(layer)
  for part, together in _TOGETHER.items():
    kept = layer[part] = dict(layer[part])
    if "experts" in kept:
      continue
    for name, module in kept.items():
      if "kernel" in module and "lora_a" not in module:
        kept[name] = transpose(module)
    for name, members in together.items():
      modules = [kept[m] for m in members if m in kept]
      if len(modules) == len(members) and _alike(modules):
        kept[name] = concatenate(modules)
        for member in members:
          del kept[member]
  return layer


def is_joined(params: dict) -> bool:
  """Returns whether a model's layers are from `join`, at least the first."""
  layers = params["layers"]
  if not isinstance(layers, tuple):
    return False
  return "transposed" in layers[0]["attention"]["output"]


def transpose(module: dict) -> dict:
  """The parameters of a `Linear` with its kernel transposed."""
  rest = {name: leaf for name, leaf in module.items() if name != "kernel"}
  return rest | {"transposed": quantisation.transpose(module["kernel"])}


def concatenate(modules: list[dict]) -> dict:
  """Joins transposed `Linear`s that read the same input."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *modules)


def _alike(modules: list[dict]) -> bool:
  """Returns whether modules are transposed, and quantised alike."""
  trees = {jax.tree.structure(m) for m in modules}
  rows = {tuple(x.shape[1:] for x in jax.tree.leaves(m)) for m in modules}
  return len(trees) == len(rows) == 1 and "transposed" in modules[0]
