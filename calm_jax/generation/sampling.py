"""Picks the next token from its logits."""

import dataclasses

import jax
import jax.numpy as jnp

from calm_jax.core.errors import InputError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Greedy at temperature 0; else a draw from what the filters leave.

  The filters act in this order, on logits divided by the temperature. Raises
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
    is_whole = self.top_k >= 0 and self.top_k == int(self.top_k)
    checks = {
      "temperature": (self.temperature >= 0, "at least 0"),
      "top_k": (is_whole, "a whole number, 0 for no limit"),
      "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
      "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
      "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
    }
    for name, (is_allowed, allowed) in checks.items():
      if not is_allowed:
        raise InputError(f"{name}={getattr(self, name)} must be {allowed}")

  def __call__(self, keys_B: Array, logits_BV: Array, seen_BV: Array) -> Array:
    """The next token of each row, int32 [B], drawn with a random key a row.

    `seen_BV` is true at the tokens that the repetition penalty is for.
    """
    if self.repetition_penalty != 1:
      penalty = self.repetition_penalty
      scale = jnp.where(logits_BV > 0, 1 / penalty, penalty)
      logits_BV = jnp.where(seen_BV, logits_BV * scale, logits_BV)
    if self.temperature == 0:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = self.filter(logits_BV / self.temperature)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)

  def filter(self, logits_BV: Array) -> Array:
    """The logits, with -inf at the tokens that may not be drawn."""
    if 0 < self.top_k < logits_BV.shape[-1]:
      least = jax.lax.top_k(logits_BV, self.top_k)[0][..., -1:]
      logits_BV = _at_least(logits_BV, least)
    if self.top_p < 1:
      sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
      p_BV = jax.nn.softmax(sorted_BV, axis=-1)
      # A token stays if the likelier ones do not make up top_p already.
      stays_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < self.top_p
      kept_BV = jnp.where(stays_BV, sorted_BV, jnp.inf)
      least = jnp.min(kept_BV, axis=-1, keepdims=True)
      logits_BV = _at_least(logits_BV, least)
    if self.min_p > 0:
      most = logits_BV.max(axis=-1, keepdims=True)
      logits_BV = _at_least(logits_BV, most + jnp.log(self.min_p))
    return logits_BV


def _at_least(logits: Array, least: Array) -> Array:
  return jnp.where(logits >= least, logits, -jnp.inf)


GREEDY = Sampler()
