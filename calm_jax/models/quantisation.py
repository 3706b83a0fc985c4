"""Weights of few bits: int8 or int4, in blocks that have scales (by qwix).

In place of the array [..., in, out] of a kernel stands a dict of leaves:

  {"int8": int8 [..., in, out], "scale": bfloat16 [..., blocks, out]}
  {"int4": uint8 [..., in, out / 2], "scale": bfloat16 [..., blocks, out]}

The weights of a block of inputs share a scale. Of an embedding [V, D], which
may be the head too, D is the "in": its scales are [V, blocks].
"""

import functools
import math
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.core import trees
from calm_jax.core.errors import InputError, check_choice
from calm_jax.core.extras import import_extra

Array = jax.Array

KINDS = ("", "int8", "int4")
BLOCKS = {"int8": 64, "int4": 32}  # inputs that share a scale, at most
# The range of a block may end at these shares of its largest weight: with so
# few steps, finer ones are worth more than the largest weights.
_ENDS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}
_QUANTISED = re.compile(
  r"layers/(?!.*router/).*/kernel|head/kernel|embed/embedding"
)


def check(kind: str) -> None:
  """Raises InputError unless it is one of KINDS, and qwix is there for it."""
  check_choice("quantise", kind, KINDS)
  if kind:
    _load_qwix()


def _load_qwix() -> ModuleType:
  # Here: it takes half a second, and few need it.
  return import_extra("quantise", "qwix", "quant")


def quantise(params: dict, kind: str) -> dict:
  """Quantises a decoder's linear layers, experts, head and embeddings.

  All else stays as it is. The kind "" changes nothing. An unknown kind, or a
  tree that is quantised already, raises InputError.
  """
  check(kind)
  if kind and (before := kind_of(params)):
    raise InputError(f"the model is in {before} already: load it anew")
  leaves = trees.flatten(params).items()
  return trees.unflatten(
    {n: quantise_leaf(n, leaf, kind) for n, leaf in leaves}
  )


def quantise_leaf(name: str, leaf: Any, kind: str) -> Any:
  """Quantises one leaf to a dict, or returns a leaf that stays as it is."""
  if kind and _QUANTISED.fullmatch(name):
    return _quantised(leaf, kind, input_axis(name, leaf.ndim))
  return leaf


def shapes(params: dict, kind: str) -> dict:
  """Returns the result of `quantise` as ShapeDtypeStructs."""
  return jax.eval_shape(functools.partial(quantise, kind=kind), params)


def input_axis(name: str, ndim: int) -> int:
  """Returns the axis of a kernel or an embedding along which blocks lie."""
  return ndim - (1 if name.endswith("embedding") else 2)


@functools.partial(jax.jit, static_argnames=("kind", "axis"))
def _quantised(weight: Array, kind: str, axis: int) -> dict[str, Array]:
  # Two neighbours of the last axis share a byte: an odd one cannot.
  if weight.shape[-1] % 2:
    kind = "int8"
  inputs = weight.shape[axis]
  size = math.ceil(inputs / math.ceil(inputs / BLOCKS[kind]))
  gap = [(0, 0)] * weight.ndim
  gap[axis] = (0, -inputs % size)
  dtype = jnp.promote_types(weight.dtype, jnp.float32)
  wide = jnp.pad(weight.astype(dtype), gap)
  blocks = (*wide.shape[:axis], -1, size, *wide.shape[axis + 1 :])
  largest = jnp.abs(wide).reshape(blocks).max(axis + 1)

  def attempt(best, end):
    values, scale, least = best
    most = jnp.repeat(end * largest, size, axis=axis)
    made = _load_qwix().quantize(
      jnp.clip(wide, -most, most),
      jnp.dtype(kind),
      channelwise_axes=[i for i in range(weight.ndim) if i != axis],
      tiled_axes={axis: size},
      scale_dtype=jnp.bfloat16,
    )
    steps = made.qvalue.astype(jnp.int8)
    off = dense({"int8": steps, "scale": made.scale}, dtype) - wide
    error = jnp.square(off).reshape(blocks).sum(axis + 1)
    better = error < least
    values = jnp.where(jnp.repeat(better, size, axis=axis), steps, values)
    scale = jnp.where(better, made.scale, scale)
    return (values, scale, jnp.minimum(error, least)), None

  values, scale = (
    jnp.zeros(wide.shape, "int8"),
    jnp.zeros(largest.shape, "bfloat16"),
  )
  start = values, scale, jnp.full(largest.shape, jnp.inf, dtype)
  ends = jnp.array(_ENDS[kind], dtype)
  (values, scale, _), _ = jax.lax.scan(attempt, start, ends)
  values = jax.lax.slice_in_dim(values, 0, inputs, axis=axis)
  if kind == "int8":
    return {"int8": values, "scale": scale}
  return {"int4": _pack(values), "scale": scale}


def _pack(values: Array) -> Array:
  """Packs two neighbours of the last axis, int8 from -8 to 7, in a byte."""
  low, high = values[..., ::2], values[..., 1::2]
  return jax.lax.bitcast_convert_type((low & 15) | (high << 4), jnp.uint8)


def _halves(packed: Array) -> tuple[Array, Array]:
  """Returns the first and the second weight of each byte, as int8."""
  signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
  # Shifts of int8 keep the sign.
  return (signed << 4) >> 4, signed >> 4


def _unpack(packed: Array) -> Array:
  pairs = jnp.stack(_halves(packed), axis=-1)
  return pairs.reshape(*packed.shape[:-1], -1)


def transpose(weight: Array | dict[str, Array]) -> Array | dict[str, Array]:
  """Returns W^T of a matrix [in, out], which `matmul` reads as `transposed`.

  An int4 one with an odd number of inputs becomes an int8.
  """
  if not isinstance(weight, Mapping):
    return weight.T
  packed = weight.get("int4")
  values = (weight["int8"] if packed is None else _unpack(packed)).T
  scale = weight["scale"].T
  if packed is None or values.shape[-1] % 2:
    return {"int8": values, "scale": scale}
  return {"int4": _pack(values), "scale": scale}


def is_quantised(weight: Any) -> bool:
  """Returns whether a dict stands for an array."""
  return isinstance(weight, Mapping) and bool({"int8", "int4"} & {*weight})


def kind_of(params: Mapping) -> str:
  """Returns the one of KINDS that a tree was quantised to."""
  ends = {name.rpartition("/")[2] for name in trees.flatten(params)}
  return next((kind for kind in ("int4", "int8") if kind in ends), "")


def dense(weight: Array | Mapping[str, Array], dtype) -> Array:
  """Returns an array, or what stands for one, as an array of a dtype."""
  if not isinstance(weight, Mapping):
    return weight.astype(dtype)
  values, scale = weight.get("int8"), weight["scale"]
  if values is None:
    values = _unpack(weight["int4"])
  for axis in range(max(0, values.ndim - 2), values.ndim):
    size, blocks = values.shape[axis], scale.shape[axis]
    if blocks not in (1, size):
      scale = jnp.repeat(scale, math.ceil(size / blocks), axis=axis)
      scale = jax.lax.slice_in_dim(scale, 0, size, axis=axis)
  wide = jnp.promote_types(dtype, jnp.float32)
  return (values.astype(wide) * scale.astype(wide)).astype(dtype)


def dequantise(params: dict, dtype="float32") -> dict:
  """Replaces all quantised weights of a tree by arrays of a dtype."""

  def undo(weight):
    return dense(weight, dtype) if is_quantised(weight) else weight

  return jax.tree.map(undo, params, is_leaf=is_quantised)


def matmul(
  x: Array, weight: Array | Mapping, transposed: bool = False
) -> Array:
  """Computes x W, or x W^T, in x's dtype.

  A quantised W is dequantised where it is needed and never kept: the backward
  pass, which gives x a gradient and W none, does it again.
  """
  if isinstance(weight, Mapping):
    return _matmul(x, dict(weight), transposed)
  # A transposed table would be hoisted out of a loop, as a copy.
  contracted = (1,), (1 if transposed else 0,)
  return jax.lax.dot_general(x, weight.astype(x.dtype), (contracted, ((), ())))


def _product(x: Array, weight: dict[str, Array], transposed: bool) -> Array:
  def multiply(x, weight):
    made = dense(weight, x.dtype)
    return x @ (made.T if transposed else made)

  if transposed and len(x) == 1 and _has_even_blocks(x.shape[1], weight):
    return jax.lax.platform_dependent(
      x, weight, cuda=row_product, default=multiply
    )
  return multiply(x, weight)


def _has_even_blocks(inputs: int, weight: dict[str, Array]) -> bool:
  """Returns whether the blocks of W^T are all alike, and of whole bytes."""
  blocks = weight["scale"].shape[1]
  return inputs % blocks == 0 and (
    "int8" in weight or inputs // blocks % 2 == 0
  )


def row_product(x_1D: Array, weight: dict[str, Array]) -> Array:
  """Multiplies one row with W^T, summing over the terms of each output.

  That is one kernel of a GPU, which reads W's few bits. As a product of
  matrices XLA would write W dequantised to memory, and read it back.
  """
  scale_FK = weight["scale"].astype(jnp.float32)
  blocks, x_D = scale_FK.shape[1], x_1D[0].astype(jnp.float32)

  def terms(values, x):
    x_KI = x.reshape(blocks, -1)
    return values.reshape(-1, *x_KI.shape).astype(jnp.float32) * x_KI

  if "int8" in weight:
    terms_FKI = terms(weight["int8"], x_D)
  else:
    low, high = _halves(weight["int4"])
    terms_FKI = terms(low, x_D[::2]) + terms(high, x_D[1::2])
  return (terms_FKI * scale_FK[..., None]).sum((1, 2)).astype(x_1D.dtype)[None]


_matmul = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _forward(x, weight, transposed):
  # Plainly, so that policies of `jax.checkpoint` see a matrix product.
  return _product(x, weight, transposed), weight


def _backward(transposed, weight, gradient):
  return _product(gradient, weight, not transposed), None


_matmul.defvjp(_forward, _backward)
