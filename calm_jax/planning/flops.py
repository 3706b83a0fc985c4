"""FLOPs of matrix products: counted in a trace, or by formula from a config.

XLA's own count (`cost_analysis`) has the body of a loop once; the trace knows
how often it runs. Nothing is compiled or allocated, so a model of any size is
counted within seconds. The formulas are for what has no trace: the least that
a step could do, and guesses.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from calm_jax.composition.connections import Composition
from calm_jax.core import trees
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig


def count(function: Callable, *arguments: Any) -> int:
  """Counts the FLOPs of one call: two for each multiplication of a product.

  Norms, softmax and other elementwise work are not counted, nor is a gather
  of embeddings. Of the branches of a `cond` the most expensive counts. Of the
  arguments, trees of arrays or ShapeDtypeStructs, only shapes are read.
  ValueError if the turns of a loop around a product depend on data.
  """
  return count_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_jaxpr(
  jaxpr: core.Jaxpr, trips: int | None = None, kernels_only: bool = False
) -> int:
  """Does what `count` does for a program that is already traced.

  `trips` is the number of turns of loops where that depends on data, an error
  if None; `kernels_only` counts only what Pallas kernels compute.
  """
  return sum(_count_equation(e, trips, kernels_only) for e in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn, trips, kernels_only) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    if kernels_only:
      return 0
    (contracted, _), _ = params["dimension_numbers"]
    summed = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(summed)
  kernels_only = kernels_only and name != "pallas_call"
  inner = [
    count_jaxpr(j, trips, kernels_only) for j in core.jaxprs_in_params(params)
  ]
  if name == "cond":
    return max(inner)
  times = 1
  if name == "scan":
    times = params["length"]
  elif name == "pallas_call":
    # One cell of the kernel's grid; a cell that it skips is counted too.
    times = math.prod(params["grid_mapping"].grid)
  elif name == "shard_map":
    # The work of one device; what is not sharded, each of them does.
    times = params["mesh"].size
  elif name == "while" and any(inner):
    if trips is None:
      raise ValueError("a matrix product in a while loop: how often is unknown")
    times = trips
  return times * sum(inner)


def multiplied_weights(config: ModelConfig, layers: int) -> int:
  """Counts the weights that a token is multiplied with in the first layers.

  Of a mixture of experts those that a token goes through count.
  """
  leaves = trees.flatten(decoder.param_shapes(config)["layers"])
  total = 0.0
  for name, leaf in leaves.items():
    if name.endswith("kernel"):
      share = 1.0
      if "experts" in name:
        share = config.experts_per_token / config.num_experts
      total += share * math.prod(leaf.shape[1:])
  return round(layers * total)


def generated_token(spec: Composition) -> int:
  """Counts the multiplications of weights for one token that is generated.

  All models of a composition count up to the last layer that is needed, f_proj
  as folded into W_K and W_V.
  """
  anchor = spec.anchor
  total = multiplied_weights(anchor, anchor.num_layers)
  total += anchor.vocab_size * anchor.width
  inner = anchor.num_heads * (anchor.width // anchor.num_heads)
  for _, joined in spec.augmenting:
    last = max(c.augmenting for c in joined.connections)
    total += multiplied_weights(joined.config, last)
    widths = anchor.width + joined.config.width
    total += len(joined.connections) * 2 * inner * widths
  return total


def training_step(
  spec: Composition, rows: int, length: int, attended: float = 1.0
) -> int:
  """Counts the FLOPs that a step on Θ_C cannot do without.

  They are m_A up to its last tapped layer and m_B, forward; the head and m_B
  above the first connection, backward, without gradients of weights; and the
  connections with theirs. The norms before a projection and before a query are
  trained: gradients of what they read count, even into a frozen model.

  All models read the same `rows` of `length` tokens. `attended` is the share of
  the products of queries and keys that counts; 0.5 for those of the past alone.
  """
  tokens = rows * length

  def attention(width: int) -> int:
    return int(4 * attended * tokens * length * width)

  def layers(config: ModelConfig, count: int, attentions: int = 1) -> int:
    each = attention(config.num_heads * config.head_dim)
    products = 2 * tokens * multiplied_weights(config, count)
    return products + count * attentions * each

  anchor, D = spec.anchor, spec.anchor.width
  first = anchor.num_layers
  total = layers(anchor, first) + 2 * 2 * tokens * D * anchor.vocab_size
  for _, joined in spec.augmenting:
    config, connections = joined.config, joined.connections
    total += layers(config, max(pair.augmenting for pair in connections))
    first = min(first, *(pair.anchor for pair in connections))
    kernels = D * (config.width + 4 * D)
    total += len(connections) * 3 * (2 * tokens * kernels + attention(D))
  # The gradients of attention are four products for two.
  return total + layers(anchor, anchor.num_layers - first, attentions=2)
