"""Controls that the paper lacks: m_A's states destroyed on their way to m_B.

Accuracy that survives these controls cannot come from m_A's knowledge. Those of
`Augmenting.control` hold in training too; a batch's `Control` replaces the
states of a trained composition, for an audit.

B batch, M augmenting length, E augmenting width.
"""

import jax
import jax.numpy as jnp

from calm_jax.composition.connections import Augmenting
from calm_jax.core.batch import Control
from calm_jax.core.errors import InputError

Array = jax.Array


def controlled(
  joined: Augmenting, h_BME: Array, positions_BM: Array, layer: int
) -> Array:
  """Applies `Augmenting.control` to the states of a tapped layer.

  The result is the same in training, in one pass and while a cache grows.
  Raises InputError if control="shuffled" has a batch of one row.
  """
  if joined.control == "zeroed":
    return jnp.zeros_like(h_BME)
  if joined.control == "shuffled":
    if len(h_BME) == 1:
      raise InputError("control='shuffled' takes two rows of a batch or more")
    return jnp.roll(h_BME, 1, axis=0)
  if joined.control == "noise":
    rng = jax.random.fold_in(jax.random.key(joined.control_seed), layer)
    return _noise_like(h_BME, rng, positions_BM)
  return h_BME


def replaced(
  control: Control, h_BME: Array, positions_BM: Array, layer: int
) -> tuple[Array, Array]:
  """Returns the states of a tapped layer that each row is given instead of its
  own, and their positions."""
  h_BME, positions_BM = h_BME[control.rows_B], positions_BM[control.rows_B]

  def noise(h_BME):
    rng = jax.random.fold_in(jax.random.key(control.seed), layer)
    return _noise_like(h_BME, rng, positions_BM)

  given = jax.lax.cond(control.noise, noise, lambda h_BME: h_BME, h_BME)
  return given, positions_BM


def _noise_like(h_BME: Array, rng: Array, positions_BM: Array) -> Array:
  """Normal noise with the norms of the states, seeded by the positions."""

  def draw(position):
    key = jax.random.fold_in(rng, position)
    return jax.random.normal(key, h_BME.shape[-1:])

  def norm(x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.linalg.norm(wide, axis=-1, keepdims=True)

  noise_BME = jax.vmap(jax.vmap(draw))(positions_BM)
  scaled_BME = noise_BME * (norm(h_BME) / norm(noise_BME))
  return scaled_BME.astype(h_BME.dtype)
