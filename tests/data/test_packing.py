"""Tests of calm_jax.data.packing."""

import numpy as np

from calm_jax.data.packing import pack_rows


def by_hand(lengths, length):
  rows, offsets, row, used = [], [], 0, 0
  for n in lengths:
    if used + n > length:
      row, used = row + 1, 0
    rows.append(row)
    offsets.append(used)
    used += n
  return rows, offsets


def test_rows_take_what_fits():
  # The first row is full to its last slot, the last takes a whole row.
  rows, offsets = pack_rows(np.array([3, 5, 4, 3, 8]), 8, pack=True)
  assert rows.tolist() == [0, 0, 1, 1, 2]
  assert offsets.tolist() == [0, 3, 0, 4, 0]


def test_rows_equal_the_loop():
  lengths = np.random.default_rng(0).integers(1, 9, size=500)
  for length in (8, 13, 5000):
    rows, offsets = pack_rows(lengths, length, pack=True)
    assert (rows.tolist(), offsets.tolist()) == by_hand(lengths, length)


def test_a_row_each():
  rows, offsets = pack_rows(np.array([3, 1]), 8, pack=False)
  assert (rows.tolist(), offsets.tolist()) == ([0, 1], [0, 0])
  assert len(pack_rows(np.array([], np.int64), 8, pack=True)[0]) == 0
