"""The cross-entropy, against NumPy."""

from __future__ import annotations

import numpy as np

from calm_jax import losses


def test_cross_entropy():
  random = np.random.default_rng(0)
  logits = 30 * random.standard_normal((2, 4, 5)).astype(np.float32)
  targets = random.integers(0, 5, (2, 4))
  weights = np.array([[0, 1, 1, 0], [0, 0, 0, 0]], np.float32)
  loss, weight = losses.cross_entropy(logits, targets, weights)
  exact = logits.astype(np.float64)
  want = 0.0
  for t in (1, 2):
    shares = np.exp(exact[0, t] - exact[0, t].max())
    want -= np.log(shares[targets[0, t]] / shares.sum())
  np.testing.assert_allclose(loss, [want, 0], rtol=1e-5)
  np.testing.assert_array_equal(weight, [2, 0])


def test_huge_logits_stay_finite():
  logits = np.array([[[1e4, -1e4, 0]]], np.float32)
  loss, _ = losses.cross_entropy(logits, np.array([[1]]), np.ones((1, 1)))
  np.testing.assert_allclose(loss, [2e4])
