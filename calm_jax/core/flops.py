"""FLOPs of matrix products, counted in a trace.

XLA's own count (`cost_analysis`) has the body of a loop once; the trace knows
how often it runs. Nothing is compiled or allocated, so a model of any size is
counted within seconds.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend import core


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


def _count_equation(equation: Any, trips, kernels_only) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    if kernels_only:
      return 0
    (contracted, _), _ = params["dimension_numbers"]
    summed = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(summed)
  kernels_only = kernels_only and name != "pallas_call"
  inner = [count_jaxpr(j, trips, kernels_only) for j in _inner_jaxprs(params)]
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


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
  """Yields the programs that an equation runs; JAX's is of 0.10.1."""
  for value in params.values():
    for item in value if isinstance(value, tuple) else (value,):
      if isinstance(item, core.Jaxpr):
        yield item
      elif isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
