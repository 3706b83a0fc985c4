"""Cross-attention that knows of positions, against NumPy."""

from __future__ import annotations

import dataclasses

import helpers
import jax
import numpy as np
import pytest
from helpers import composed

from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.core.errors import InputError

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 8)).astype(np.int32)


def test_positions_turn_by_the_distance_to_the_newest_token_in_sight():
  config, _ = helpers.model(0)  # 4 heads of 8
  joined = Augmenting(config, (), positions="rope", output_init="normal")
  cross = cross_attention.CrossAttention(config, joined)
  random = np.random.default_rng(0)
  x_LD, h_ME = (random.normal(size=s) for s in ((5, 32), (7, 24)))
  visible = np.array([1, 1, 3, 4, 7])
  mask = np.arange(7) < visible[:, None]
  inputs = [a[None].astype(np.float32) for a in (x_LD, h_ME)]
  params = cross.init(jax.random.key(0), *inputs, mask[None])["params"]
  got = cross.apply({"params": params}, *inputs, mask[None])

  def normed(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)

  def heads(name, x):
    y = x @ np.asarray(params[name]["kernel"], np.float64)
    return y.reshape(len(x), 4, 8).swapaxes(0, 1)

  projected = normed(h_ME) @ np.asarray(
    params["projection"]["kernel"], np.float64
  )
  q, k, v = (
    heads("query", normed(x_LD)), heads("key", projected),
    heads("value", projected),
  )  # fmt: skip
  # A pair of features is a complex number, which a position turns.
  angles = 10_000.0 ** -(np.arange(4) / 4)
  distance = (visible - 1)[:, None] - np.arange(7)
  turn = np.exp(1j * distance[..., None] * angles)
  complex_q, complex_k = (x[..., :4] + 1j * x[..., 4:] for x in (q, k))
  scores = np.einsum(
    "nlh,nmh,lmh->nlm", complex_q, complex_k.conj(), turn
  ).real / np.sqrt(8)
  weights = np.exp(scores) * mask
  weights /= weights.sum(-1, keepdims=True)
  out = (weights @ v).swapaxes(0, 1).reshape(5, 32)
  want = out @ np.asarray(params["output"]["kernel"], np.float64)
  np.testing.assert_allclose(got[0], want, rtol=2e-5, atol=1e-6)
  plain = cross_attention.CrossAttention(
    config, dataclasses.replace(joined, positions="none")
  )
  other = plain.apply({"params": params}, *inputs, mask[None])
  assert np.abs(np.asarray(other[0]) - want).max() > 1e-3


def test_positions_count_from_the_start_of_a_packed_text():
  spec, params = helpers.compose(positions="rope")
  alone = [
    composed(params, spec, helpers.rows([TOKENS[1, :n]], length=n))
    for n in (4, 6)
  ]
  packed = composed(
    params, spec, helpers.rows([TOKENS[1, :4], TOKENS[1, :6]], length=10)
  )
  np.testing.assert_allclose(packed[0, :4], alone[0][0], atol=2e-5)
  np.testing.assert_allclose(packed[0, 4:], alone[1][0], atol=2e-5)


def test_unknown_positions_and_odd_heads():
  config, _ = helpers.model(0)
  one = (Connection(1, 1),)
  with pytest.raises(InputError, match="positions='alibi'"):
    Augmenting(config, one, positions="alibi")
  with pytest.raises(InputError, match="heads of an even width"):
    Composition(
      dataclasses.replace(config, width=20, num_heads=4),
      (("kv", Augmenting(config, one, positions="rope")),),
    )
