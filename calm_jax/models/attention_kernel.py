"""Attention of one new token a row to a cache, as two Triton kernels.

B rows, N query heads, K key-value heads, G = N / K, H head width, S slots of a
cache, C parts of its slots.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from calm_jax.models import cache as cache_lib
from calm_jax.models import tiles

Array = jax.Array
_LOWEST = -1e30


class Turn(NamedTuple):
  """The rotation of a step's token, for each feature and its partner's."""

  cos_BH: Array
  sin_BH: Array  # negative where the partner comes second
  rotated: int  # features; the others pass

  @staticmethod
  def make(rope: tuple[Array, Array], H: int) -> "Turn":
    """Spreads the tables (cos, sin), [B, 1, 1, R/2], over all features."""
    cos, sin = (x[:, 0, 0] for x in rope)
    rotated = 2 * cos.shape[-1]
    rest = [(0, 0), (0, H - rotated)]
    cos_BH = jnp.concatenate([cos, cos], axis=-1)
    sin_BH = jnp.concatenate([-sin, sin], axis=-1)
    ones = jnp.pad(cos_BH, rest, constant_values=1)
    return Turn(ones, jnp.pad(sin_BH, rest), rotated)


class NewToken(NamedTuple):
  """The norms and the rotation of the keys that `attend` adds to a cache."""

  turn: Turn | None
  query_norm: tiles.RmsNorm | None
  key_norm: tiles.RmsNorm | None


def attend(
  q_BF: Array,
  cache: dict,
  bias_BS: Array,
  filled: Array,
  heads: int,
  scale: float,
  cap: float | None,
  new: NewToken | None = None,
) -> tuple[Array, dict]:
  """Attention of one token a row, [B, N H], and the cache with it.

  Args:
    q_BF: queries [B, N H]; with `new` [B, (N + 2 K) H], keys and values after
      them, neither normed nor rotated.
    cache: {"key", "value"}, each [1, B, K, S, H].
    bias_BS: float32, 0 at the slots that a row may see, or very negative.
    filled: int32 [], how many slots are read; `new` goes into the last.
    heads: N.
    scale, cap: as for `attention.attend`.
    new: None if the cache has all keys already.
  """
  key, value = (cache[name][0] for name in cache_lib.NAMES)
  B, K, S, H = key.shape
  N = heads
  C = max(1, min(S // 128, 256 // (B * K)))
  refs = {"q": q_BF, "bias": bias_BS, "filled": filled.reshape(1)}
  norms, rotated = {}, 0
  if new is not None and new.turn is not None:
    refs["cos"], refs["sin"], rotated = new.turn
  if new is not None and new.query_norm is not None:
    refs["query_norm"], *norms["query_norm"] = new.query_norm
    refs["key_norm"], *norms["key_norm"] = new.key_norm
  size = max(16, min(64, 2**13 // tiles.power(H)))
  shape = _Shape(N, K, H, size, norms, rotated, new is not None)
  compute = functools.partial(_attend_part, shape, scale, cap)
  arrays = [refs, key, value]
  wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  outs = [wide((B, N, C, H)), wide((B, N, C)), wide((B, N, C))]
  places = {}
  if new is not None:
    outs += [key, value]
    places = {len(refs): 3, len(refs) + 1: 4}
  parts = tiles.call(
    "decode_attend", compute, outs, (B, K, C), arrays, 2, places
  )
  out = jax.ShapeDtypeStruct((B, N * H), cache["value"].dtype)
  joined = tiles.call("decode_join", _join, out, (B, N), parts[:3])
  if new is None:
    return joined, cache
  return joined, {"key": parts[3][None], "value": parts[4][None]}


class _Shape(NamedTuple):
  N: int
  K: int
  H: int
  size: int  # slots of a tile
  norms: dict[str, list]  # of "query_norm" and "key_norm", eps and plus_one
  rotated: int  # features of a head
  extends: bool  # whether the token's keys are new


def _attend_part(
  shape: _Shape,
  scale: float,
  cap: float | None,
  refs,
  k_ref,
  v_ref,
  out_ref,
  top_ref,
  sum_ref,
  *cache_refs,
):
  """One key head of a row with a part of the slots."""
  row, head, part = (pl.program_id(i) for i in range(3))
  N, K, H, size, *_, extends = shape
  C, G, dtype = pl.num_programs(2), N // K, k_ref.dtype
  features = jnp.arange(tiles.power(H))
  real = tiles.below(features, H, len(features))
  vectors = functools.partial(_vectors, shape, refs, row, dtype)
  q = vectors(head * G, tiles.power(G), "query_norm")
  q = (q.astype(jnp.float32) * scale).astype(dtype)
  filled = refs["filled"][0]
  each = pl.cdiv(pl.cdiv(filled, C), size) * size
  start = part * each
  stop = jnp.minimum(start + each, filled)
  newest = {}
  if extends:
    newest["key"] = vectors(N + head, 1, "key_norm")
    newest["value"] = vectors(N + K + head, 1, "value")

  def tile(ref, name, slots, mask):
    inside = tiles.both(mask[:, None], None if real is None else real[None])
    found = tiles.load(
      ref, row, head, slots[:, None], features[None], mask=inside
    )
    if extends:
      is_new = slots[:, None] == filled - 1
      found = jnp.where(is_new, newest[name], found)
    return found

  def go_on(step, carry):
    top, total, out = carry
    slots = start + step * size + jnp.arange(size)
    mask = slots < stop
    scores = tiles.dot(q, tile(k_ref, "key", slots, mask))
    if cap is not None:
      scores = cap * jnp.tanh(scores / cap)
    bias = tiles.load(refs["bias"], row, slots, mask=mask)
    scores = jnp.where(mask[None], scores + bias[None], _LOWEST)
    higher = jnp.maximum(top, scores.max(axis=1))
    weights = jnp.where(mask[None], jnp.exp(scores - higher[:, None]), 0)
    shrink = jnp.exp(top - higher)
    total = total * shrink + weights.sum(axis=1)
    values = tile(v_ref, "value", slots, mask)
    out = out * shrink[:, None] + tiles.dot(weights.astype(dtype), values.T)
    return higher, total, out

  tall = q.shape[0]
  empty = jnp.full(tall, _LOWEST), jnp.zeros(tall), jnp.zeros(q.shape)
  empty = tuple(x.astype(jnp.float32) for x in empty)
  steps = pl.cdiv(jnp.maximum(stop - start, 0), size)
  top, total, out = jax.lax.fori_loop(0, steps, go_on, empty)
  heads = jnp.arange(tall)
  own, inside = head * G + heads, heads < G
  triton.store(top_ref.at[row, own, part], top, mask=inside)
  triton.store(sum_ref.at[row, own, part], total, mask=inside)
  wide = tiles.both(inside[:, None], None if real is None else real[None])
  at = out_ref.at[row, own[:, None], part, features[None]]
  triton.store(at, out, mask=wide)
  if extends:

    @pl.when((start < filled) & (filled <= stop))
    def _():
      for ref, name in zip(cache_refs, ("key", "value"), strict=True):
        index = row, head, filled - 1, features[None]
        mask = None if real is None else real[None]
        triton.store(ref.at[index], newest[name], mask=mask)


def _vectors(
  shape: _Shape, refs, row, dtype, first, count: int, norm: str
) -> Array:
  """Loads a row's heads from `first` on, [count, H], normed and rotated."""
  N, K, H, _, norms, rotated, _ = shape
  features, heads = jnp.arange(tiles.power(H)), jnp.arange(count)[:, None]
  real = tiles.below(features, H, len(features))
  mask = tiles.both(None if count == 1 else heads < N // K, real)

  def at(places):
    index = (first + heads) * H + places[None]
    x = tiles.load(refs["q"], row, index, mask=mask).astype(jnp.float32)
    if norm not in norms:
      return x
    eps, plus_one = norms[norm]
    mean = jnp.square(x).sum(axis=1, keepdims=True) / H
    gain = tiles.load(refs[norm], places, mask=real).astype(jnp.float32)
    gain = 1 + gain if plus_one else gain
    x = x * jax.lax.rsqrt(mean + eps) * gain[None]
    return x.astype(dtype).astype(jnp.float32)

  x, half = at(features), rotated // 2
  if half and norm != "value":
    # Feature i turns with i + half; those from `rotated` on stay.
    second = jnp.where(features < rotated, features - half, features)
    partner = jnp.where(features < half, features + half, second)
    cos, sin = (
      tiles.load(refs[n], row, features, mask=real) for n in ("cos", "sin")
    )
    x = x * cos[None] + at(partner) * sin[None]
  return x.astype(dtype)


def _join(part_ref, top_ref, sum_ref, out_ref):
  """Joins the parts of a head, each relative to its own largest score."""
  row, head = pl.program_id(0), pl.program_id(1)
  C, H = part_ref.shape[2:]
  parts, features = jnp.arange(tiles.power(C)), jnp.arange(tiles.power(H))
  there, real = parts < C, features < H
  top = triton.load(top_ref.at[row, head, parts], mask=there, other=_LOWEST)
  share = jnp.exp(top - top.max())
  total = (share * tiles.load(sum_ref, row, head, parts, mask=there)).sum()
  mask = there[:, None] & real[None]
  tile = tiles.load(
    part_ref, row, head, parts[:, None], features[None], mask=mask
  )
  out = (tile * share[:, None]).sum(axis=0) / total
  at = out_ref.at[row, head * H + features]
  triton.store(at, out.astype(out_ref.dtype), mask=real)
