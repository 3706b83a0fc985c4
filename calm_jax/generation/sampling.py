"""Picks the next token from its logits."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.core.errors import check_float, check_int

Array = jax.Array
_MOST = 1e20  # Logits times it, or over it, are finite.
_MOST_K = 2**31 - 1  # that an int32 holds
_ROUNDING = 1e-6  # of sums of probabilities in float32


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Greedy at temperature 0; else a draw from what the filters leave.

  The filters act in this order, on logits divided by the temperature. Of tokens
  that are equally likely, top_k and top_p keep those with low ids. Raises
  InputError for a value outside its range.
  """

  temperature: float = 0.0  # 0 takes the likeliest token
  top_k: int = 0  # keeps the k likeliest tokens; 0 keeps all
  top_p: float = 1.0  # keeps the fewest whose probabilities sum to at least p
  min_p: float = 0.0  # keeps tokens at least min_p times as likely as the best
  # Positive logits of tokens seen before, in the prompt or since, are divided
  # by it and negative ones multiplied; greedily too.
  repetition_penalty: float = 1.0

  def __post_init__(self):
    checked = {
      "temperature": check_float("temperature", self.temperature, 0, _MOST),
      "top_k": check_int("top_k", self.top_k, 0, _MOST_K),
      "top_p": check_float("top_p", self.top_p, 0, 1, excluded=0),
      "min_p": check_float("min_p", self.min_p, 0, 1, excluded=1),
      "repetition_penalty": check_float(
        "repetition_penalty", self.repetition_penalty, 1 / _MOST, _MOST
      ),
    }
    for name, value in checked.items():
      object.__setattr__(self, name, value)  # numpy's numbers as Python's

  @property
  def draws(self) -> bool:
    """True if it needs random keys."""
    return self.temperature > 0

  def __call__(
    self, keys_B: Array | None, logits_BV: Array, seen_BV: Array | None
  ) -> Array:
    """The next token of each row, int32 [B], drawn with a random key a row.

    `seen_BV` is true at the tokens that the repetition penalty is for.
    """
    if self.repetition_penalty != 1:
      assert seen_BV is not None
      penalty = self.repetition_penalty
      scale = jnp.where(logits_BV > 0, 1 / penalty, penalty)
      logits_BV = jnp.where(seen_BV, logits_BV * scale, logits_BV)
    if self.temperature == 0:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    assert keys_B is not None
    logits_BV = self.filter(logits_BV / max(self.temperature, 1 / _MOST))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)

  def filter(self, logits_BV: Array) -> Array:
    """The logits, with -inf at the tokens that may not be drawn."""
    if 0 < self.top_k < logits_BV.shape[-1]:
      sorted_BV = jax.lax.top_k(logits_BV, self.top_k)[0]
      logits_BV = _likeliest(logits_BV, sorted_BV, self.top_k)
    if self.top_p < 1:
      sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
      p_BV = jax.nn.softmax(sorted_BV, axis=-1)
      # A token stays if the likelier ones do not make up top_p already.
      before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
      stays_BV = before_BV < self.top_p * (1 - _ROUNDING)
      count_B1 = stays_BV.sum(axis=-1, keepdims=True).clip(1)
      logits_BV = _likeliest(logits_BV, sorted_BV, count_B1)
    if self.min_p > 0:
      most = logits_BV.max(axis=-1, keepdims=True)
      is_kept_BV = logits_BV >= most + jnp.log(self.min_p)
      logits_BV = jnp.where(is_kept_BV, logits_BV, -jnp.inf)
    return logits_BV


class RowSampler(NamedTuple):
  """The fields of a `Sampler` for each row; without a repetition penalty.

  A row is drawn as its sampler alone would draw it, with the same keys.
  """

  temperature_B: Array | np.ndarray  # float32
  top_k_B: Array | np.ndarray  # int32
  top_p_B: Array | np.ndarray  # float32
  min_p_B: Array | np.ndarray  # float32

  draws = True
  repetition_penalty = 1.0

  @classmethod
  def of(cls, samplers: Sequence[Sampler]) -> "RowSampler":
    """The samplers of rows as arrays, for samplers without a penalty."""
    for sampler in samplers:
      check_float("repetition_penalty", sampler.repetition_penalty, 1, 1)
    types = np.float32, np.int32, np.float32, np.float32
    names = (name.removesuffix("_B") for name in cls._fields)
    return cls(
      *(
        np.array([getattr(sampler, name) for sampler in samplers], dtype)
        for name, dtype in zip(names, types, strict=True)
      )
    )

  def __call__(
    self, keys_B: Array | None, logits_BV: Array, seen_BV: Array | None
  ) -> Array:
    """The next token of each row, int32 [B]."""
    assert keys_B is not None and seen_BV is None
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> Array:
      scale_B1 = jnp.maximum(self.temperature_B, 1 / _MOST)[:, None]
      kept_BV = self._filtered(logits_BV / scale_B1)
      drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
      is_drawn_B = self.temperature_B > 0
      return jnp.where(is_drawn_B, drawn_B.astype(jnp.int32), greedy_B)

    # Drawing passes over the vocabulary several times.
    return jax.lax.cond((self.temperature_B > 0).any(), draw, lambda: greedy_B)

  def _filtered(self, logits_BV: Array) -> Array:
    V = logits_BV.shape[-1]
    filters_B = (self.top_k_B > 0) | (self.top_p_B < 1) | (self.min_p_B > 0)

    def filtered() -> Array:
      ordered_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
      k_B = jnp.where(self.top_k_B > 0, self.top_k_B, V)
      k_B1 = jnp.minimum(k_B, V)[:, None]
      kept_BV = _likeliest(logits_BV, ordered_BV, k_B1)
      is_first_BV = jnp.arange(V) < k_B1
      ordered_BV = jnp.where(is_first_BV, ordered_BV, -jnp.inf)
      p_BV = jax.nn.softmax(ordered_BV, axis=-1)
      before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
      top_p_B1 = self.top_p_B[:, None]
      stays_BV = before_BV < top_p_B1 * (1 - _ROUNDING)
      count_B1 = stays_BV.sum(axis=-1, keepdims=True).clip(1)
      count_B1 = jnp.where(top_p_B1 < 1, count_B1, V)
      kept_BV = _likeliest(kept_BV, ordered_BV, count_B1)
      least_B = kept_BV.max(axis=-1) + jnp.log(self.min_p_B)
      return jnp.where(kept_BV >= least_B[:, None], kept_BV, -jnp.inf)

    return jax.lax.cond(filters_B.any(), filtered, lambda: logits_BV)


def _likeliest(
  logits_BV: Array, sorted_BV: Array, count_B1: Array | int
) -> Array:
  """Keeps so many of the likeliest tokens; of equal ones, those of low ids.

  `sorted_BV` begins with that many, the likeliest first.
  """
  last_B1 = jnp.broadcast_to(count_B1 - 1, (*logits_BV.shape[:-1], 1))
  least_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
  above_BV, equal_BV = logits_BV > least_B1, logits_BV == least_B1
  room_B1 = count_B1 - above_BV.sum(axis=-1, keepdims=True)
  is_kept_BV = above_BV | (equal_BV & (equal_BV.cumsum(axis=-1) <= room_B1))
  return jnp.where(is_kept_BV, logits_BV, -jnp.inf)


GREEDY = Sampler()
