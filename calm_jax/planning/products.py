"""FLOPs of the matrix products of a compiled program, as they are written."""

from __future__ import annotations

import functools
import math
import re

import numpy as np

_DIMS = re.compile(r"\[([\d,]*)\]")


def flops(one, types: dict[str, str]) -> int:
  """Of an `hlo.Instruction`: two for each multiplication of a product.

  Args:
    one: the instruction.
    types: of its operands, by name.
  """
  if one.kind not in ("dot", "convolution"):
    return 0
  left, right = (_shape(types[name]) for name in one.operands)
  out = _shape(one.type)
  if one.kind == "dot":
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    return 2 * math.prod(out) * math.prod(left[d] for d in _numbers(found[1]))
  return 2 * _convolution(one.rest, left, right, out)


def _convolution(rest: str, left, right, out) -> int:
  """A TPU's product; its batches may be dimensions that a window goes over."""
  names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
  window = re.search(r"window=\{([^}]*)\}", rest)
  window = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))
  of_left, of_right, of_out = (
    dict(zip(n, s, strict=True))
    for n, s in zip(names, (left, right, out), strict=True)
  )
  total = of_out["b"] * of_out["f"] * of_right["i"]
  for place, name in enumerate(sorted(n for n in of_out if n.isdigit())):
    sizes = (of_out[name], of_right[name], of_left[name])
    how = {
      key: int(value.split("x")[place].split("_")[0])
      for key, value in window.items()
      if key in ("stride", "pad", "lhs_dilate", "rhs_dilate")
    }
    total *= _met(*sizes, **how)
  return total


@functools.cache
def _met(
  out: int, size: int, given: int, stride=1, pad=0, lhs_dilate=1, rhs_dilate=1
) -> int:
  """Elements that a window meets, over all of its places along a dimension."""
  at = np.arange(out)[:, None] * stride + np.arange(size) * rhs_dilate - pad
  inside = (at >= 0) & (at // lhs_dilate < given)
  return int((inside & (at % lhs_dilate == 0)).sum())


def _shape(type_: str) -> list[int]:
  return _numbers(_DIMS.search(type_)[1])


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",") if n]
