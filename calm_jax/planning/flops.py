"""Counts the matrix products of a program, from its trace.

XLA's own count (`cost_analysis`) has the body of a loop once, however often it
runs, and layers are run by a loop. The trace knows how often. Nothing is
compiled or allocated, so that a model of any size is counted within seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *arguments: Any) -> int:
  """The FLOPs of one call: two for each multiplication of a matrix product.

  Norms, softmax and other elementwise work are not counted, nor is a gather
  of embeddings. Of the branches of a `cond` the dearest counts.

  Args:
    function: to be traced.
    arguments: trees of arrays or ShapeDtypeStructs; only shapes are read.

  Raises:
    ValueError: a matrix product within a loop that runs for as long as its
      data say.
  """
  return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_jaxpr(
  jaxpr: core.Jaxpr, trips: int | None = None, kernels_only: bool = False
) -> int:
  """`count` of a program that was traced.

  Args:
    jaxpr: the program.
    trips: of loops that run for as long as their data say; an error if None.
    kernels_only: whether to count but what Pallas kernels compute.
  """
  return sum(_of_equation(e, trips, kernels_only) for e in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, trips, kernels_only) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    if kernels_only:
      return 0
    (contracted, _), _ = params["dimension_numbers"]
    summed = [equation.invars[0].aval.shape[axis] for axis in contracted]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(summed)
  kernels_only = kernels_only and name != "pallas_call"
  inner = [
    of_jaxpr(j, trips, kernels_only) for j in core.jaxprs_in_params(params)
  ]
  if name == "cond":
    return max(inner)
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "pallas_call":
    # One cell of the kernel's grid; a cell that it skips is counted too.
    return math.prod(params["grid_mapping"].grid) * sum(inner)
  if name == "shard_map":
    # The work of one device; what is not cut, each of them does.
    return params["mesh"].size * sum(inner)
  if name == "while" and any(inner):
    if trips is None:
      raise ValueError("a matrix product in a while loop: how often is unknown")
    return trips * sum(inner)
  return sum(inner)
