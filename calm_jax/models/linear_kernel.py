"""The product of a few rows with a matrix, as one Triton kernel.

B rows, D inputs, F outputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from calm_jax.models import tiles
from calm_jax.models.quantisation import is_quantised

Array = jax.Array


class Residual(NamedTuple):
  """A term that the states still lack: x + factor * norm(delta)."""

  delta_BD: Array
  norm: tiles.RmsNorm | None
  factor: float


def _rows(shape: tuple[int, int]) -> tuple[Array, Array | None, int]:
  """The rows of a tile of inputs, which of them are real, and its width."""
  B, D = shape
  if B == 1:
    return jnp.arange(1)[:, None], None, min(4096, tiles.power(D))
  rows = jnp.arange(tiles.ROWS)[:, None]
  return rows, None if B == tiles.ROWS else rows < B, min(512, tiles.power(D))


class _Input:
  """The tiles of norm(x + residual), computed where they are multiplied."""

  def __init__(self, refs: dict, D: int, norms: dict[str, list], factor: float):
    self._refs, self._D, self._norms, self._factor = refs, D, norms, factor
    self._rows, self._real, self.chunk = _rows(refs["x"].shape)
    self._rms: dict[str, Array] = {}
    if "delta_scale" in refs:
      self._rms["delta_scale"] = self._inverse(self._delta, "delta_scale")
    if "scale" in refs:
      self._rms["scale"] = self._inverse(self.summed, "scale")

  def _inverse(self, tile: Callable, name: str) -> Array:
    def add(i, total_R1):
      x = tile(*self.columns(i * self.chunk, self.chunk))
      return total_R1 + jnp.square(x).sum(axis=1, keepdims=True)

    zero_R1 = jnp.zeros(self._rows.shape, jnp.float32)
    chunks = -(-self._D // self.chunk)
    total_R1 = jax.lax.fori_loop(0, chunks, add, zero_R1)
    return jax.lax.rsqrt(total_R1 / self._D + self._norms[name][0])

  def columns(self, at, size: int):
    columns = at + jnp.arange(size)
    return columns, tiles.below(columns, self._D, size)

  def _tile(self, name: str, columns, mask) -> Array:
    inside = tiles.both(self._real, None if mask is None else mask[None])
    tile = tiles.load(self._refs[name], self._rows, columns[None], mask=inside)
    return tile.astype(jnp.float32)

  def _normed(self, x, name: str, columns, mask) -> Array:
    if name not in self._rms:
      return x
    scale = tiles.load(self._refs[name], columns, mask=mask).astype(jnp.float32)
    scale = 1 + scale if self._norms[name][1] else scale
    return self._rounded(x * self._rms[name] * scale[None])

  def _rounded(self, x: Array) -> Array:
    """Rounds as if the array were kept between two kernels."""
    return x.astype(self._refs["x"].dtype).astype(jnp.float32)

  def _delta(self, columns, mask) -> Array:
    return self._tile("delta", columns, mask)

  def summed(self, columns, mask) -> Array:
    x = self._tile("x", columns, mask)
    if "delta" not in self._refs:
      return x
    delta = self._delta(columns, mask)
    delta = self._normed(delta, "delta_scale", columns, mask)
    return self._rounded(x + self._rounded(self._factor * delta))

  def normed(self, columns, mask) -> Array:
    """The tile that is multiplied, [tiles.ROWS, columns]."""
    y = self._normed(self.summed(columns, mask), "scale", columns, mask)
    y = jnp.broadcast_to(y, (tiles.ROWS, y.shape[1]))
    return y.astype(self._refs["x"].dtype)

  def write(self, ref, part: Array) -> None:
    """Writes a part of x + residual."""
    columns = part * self.chunk + jnp.arange(self.chunk)
    inside = tiles.both(self._real, (columns < self._D)[None])
    summed = self.summed(columns, columns < self._D)
    at = ref.at[self._rows, columns[None]]
    triton.store(at, summed.astype(ref.dtype), mask=inside)


def linear(
  x_BD: Array,
  weight_FD: Array | dict,
  bias_F: Array | None = None,
  norm: tiles.RmsNorm | None = None,
  residual: Residual | None = None,
  activation: Callable | None = None,
  gated: bool = False,
) -> tuple[Array, Array]:
  """Computes y = activation(norm(x + residual) W^T + b) of up to ROWS rows.

  Args:
    x_BD: the states.
    weight_FD: outputs come first; perhaps quantised, as an embedding is.
    bias_F, norm, residual, activation: None for none.
    gated: y is the first half, activated, times the second half.

  Returns:
    y, [B, F] or half as wide if gated, and x + residual, [B, D].
  """
  B, D = x_BD.shape
  refs, norms, factor = {"x": x_BD, "weight": weight_FD}, {}, 1.0
  if bias_F is not None:
    refs["bias"] = bias_F
  if norm is not None:
    refs["scale"], *norms["scale"] = norm
  if residual is not None:
    refs["delta"], factor = residual.delta_BD, residual.factor
    if residual.norm is not None:
      refs["delta_scale"], *norms["delta_scale"] = residual.norm
  halves = 2 if gated else 1
  F = jax.tree.leaves(weight_FD)[0].shape[0] // halves
  tile = 32 if F // 32 >= 128 else 16
  outs = [jax.ShapeDtypeStruct((B, F), x_BD.dtype)]
  outs += [] if residual is None else [x_BD]

  def kernel(refs, y_ref, *x_refs):
    given = _Input(refs, D, norms, factor)
    part = pl.program_id(0)
    if x_refs:
      pl.when(part * given.chunk < D)(lambda: given.write(x_refs[0], part))
    outputs = part * tile + jnp.arange(tile)
    real = tiles.below(outputs, F, tile) if grid * tile == F else outputs < F
    products = _products(refs["weight"], given, D, F, outputs, real, halves)
    for half in range(halves if "bias" in refs else 0):
      bias = tiles.load(refs["bias"], half * F + outputs, mask=real)
      products[half] += bias.astype(jnp.float32)[:, None]
    rounded = [p.astype(y_ref.dtype) for p in products]
    wide = [p.astype(jnp.float32) for p in rounded]
    y = wide[0] if activation is None else activation(wide[0])
    y = y * wide[1] if gated else y
    rows = jnp.arange(tiles.ROWS)[None]
    mask = rows < B if real is None else (rows < B) & real[:, None]
    y = y.astype(y_ref.dtype)
    triton.store(y_ref.at[rows, outputs[:, None]], y, mask=mask)

  grid = max(-(-F // tile), -(-D // _rows(x_BD.shape)[2]))
  y_BF, *x = tiles.call("decode_linear", kernel, outs, (grid,), [refs], 4)
  return y_BF, x[0] if x else x_BD


def _block(D: int, outputs: int) -> int:
  """Chooses how many inputs are multiplied at once: no mask if it divides D,
  and no more shared memory than small GPUs have for four tiles on their way."""
  most = min(2**13 // outputs, 256, tiles.power(D))
  sizes = [n for n in (256, 128, 64) if n <= most and D % n == 0]
  return sizes[0] if sizes else most


def _products(
  weight, given: _Input, D: int, F: int, outputs, real, halves: int
) -> list[Array]:
  """Multiplies W's rows of `outputs`, in each half, with the inputs.

  The weights of a block share a scale, which its partial products are
  multiplied with: a quantised matrix is never made whole. Two neighbours of
  an int4 share a byte.
  """
  kind = ""
  if is_quantised(weight):
    kind = "int4" if "int4" in weight else "int8"
  values = weight[kind] if kind else weight
  size = (
    -(-D // weight["scale"].shape[1])
    if kind
    else _block(D, len(outputs) * halves)
  )
  ways = 2 if kind == "int4" else 1
  blocks = -(-D // size)
  together = next(n for n in (4, 3, 2, 1) if blocks % n == 0) if kind else 1
  columns = jnp.arange(tiles.power(-(-size // ways)))

  def multiply(block, sums):
    places = block * (size // ways) + columns
    limit = jnp.minimum((block + 1) * size, D) // ways
    exact = len(columns) * ways == size and D % size == 0
    mask = None if exact else places < limit
    parts = [jnp.zeros_like(s) for s in sums]
    inside = real[:, None] if real is not None else None
    inside = tiles.both(inside, None if mask is None else mask[None])
    packed = [
      tiles.load(values, (h * F + outputs)[:, None], places[None], mask=inside)
      for h in range(halves)
    ]
    for way in range(ways):
      x = given.normed(places * ways + way, mask)
      for h, tile in enumerate(packed):
        w = tile
        if kind == "int4":
          signed = jax.lax.bitcast_convert_type(tile, jnp.int8)
          w = signed >> 4 if way else (signed << 4) >> 4
        parts[h] += tiles.dot(w.astype(x.dtype), x)
    if kind:
      for h in range(halves):
        scale = tiles.load(weight["scale"], h * F + outputs, block, mask=real)
        parts[h] *= scale.astype(jnp.float32)[:, None]
    return [s + p for s, p in zip(sums, parts, strict=True)]

  def go_on(step, sums):
    for i in range(together):
      sums = multiply(step * together + i, sums)
    return sums

  sums = [jnp.zeros((len(outputs), tiles.ROWS), jnp.float32)] * halves
  return list(jax.lax.fori_loop(0, blocks // together, go_on, sums))
