"""Tests of calm_jax.data.packing."""

import numpy as np

from calm_jax.data.packing import pack_rows


def by_hand(lengths, length):
  rows, row, used = [], 0, 0
  for n in lengths:
    if used + n > length:
      row, used = row + 1, 0
    rows.append(row)
    used += n
  return rows


def pack(lengths, length):
  return pack_rows([(np.array(lengths, int), length)], pack=True).tolist()


def test_rows_take_what_fits():
  # The first row is full to its last slot, the last takes a whole row.
  assert pack([3, 5, 4, 3, 8], 8) == [0, 0, 1, 1, 2]


def test_rows_equal_the_loop():
  lengths = np.random.default_rng(0).integers(1, 9, size=500)
  for length in (8, 13, 5000):
    assert pack(lengths, length) == by_hand(lengths, length)


def test_rows_fit_every_model():
  first, second = np.array([2, 2, 2, 2]), np.array([1, 5, 1, 6])
  rows = pack_rows([(first, 8), (second, 6)], pack=True)
  assert rows.tolist() == [0, 0, 1, 2]


def test_a_row_each():
  lengths = np.array([3, 1])
  assert pack_rows([(lengths, 8)], pack=False).tolist() == [0, 1]
  assert pack([], 8) == []
