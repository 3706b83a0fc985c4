"""Keys and values of the tokens read so far: {"key", "value"}.

Each is [R, B, K, S, H], R layers of S slots; heads come before slots, since a
few queries are multiplied with them in that order. XLA's CPU backend copies
what a loop both updates and reads, at every step, so there a loop that reads
token by token leaves the cache alone: between `begin` and `settle`, new tokens
go to a few slots beside it, "recent", the first of which stands for slot
"first".
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
NAMES = ("key", "value")


def empty(
  rows: int, batch: int, heads: int, slots: int, width: int, dtype: str
) -> dict:
  """Makes a cache of zeros [R, B, K, S, H]."""
  shape = (rows, batch, heads, slots, width)
  return {name: jnp.zeros(shape, dtype) for name in NAMES}


def extend(cache: dict, new: dict, row: Array | int, index: Array) -> dict:
  """Writes new keys and values [B, K, L, H] into slots index .. of a row."""
  if "recent" in cache:
    index = index - cache["first"]
    return cache | {"recent": extend(cache["recent"], new, row, index)}
  return _write(cache, {n: new[n][None] for n in NAMES}, row, index)


def _write(cache: dict, new: dict, row: Array | int, index: Array) -> dict:
  """Writes keys and values of one or more rows, from slot `index` on."""
  at = (row, 0, 0, index, 0)
  return {n: jax.lax.dynamic_update_slice(cache[n], new[n], at) for n in NAMES}


def blocks(
  cache: dict, row: Array | int, mask_B1LS: Any
) -> list[tuple[Array, Array, Any]]:
  """Returns (keys, values [B, K, S, H], mask) of each block of a row."""
  key, value = (cache[name][row] for name in NAMES)
  if "recent" not in cache:
    return [(key, value, mask_B1LS)]
  first, recent = cache["first"], cache["recent"]
  before_S = jnp.arange(mask_B1LS.shape[-1]) < first
  size = recent["key"].shape[3]
  new_mask = jax.lax.dynamic_slice_in_dim(mask_B1LS, first, size, axis=-1)
  return [
    (key, value, mask_B1LS & before_S),
    (recent["key"][row], recent["value"][row], new_mask),
  ]


def begin(cache: dict, size: int, first: Array) -> dict:
  """Adds `size` recent slots, which stand for slots from `first` on."""
  R, B, K, _, H = cache["key"].shape
  recent = empty(R, B, K, size, H, cache["key"].dtype)
  return cache | {"recent": recent, "first": first}


def settle(cache: dict) -> dict:
  """Writes the recent slots to the slots that they stand for."""
  return _write(cache, cache["recent"], 0, cache["first"])
