"""The choice whether layers leave their stacks, for devices not at hand."""

from __future__ import annotations

import pytest

from calm_jax.composition import inference

GB = 2**30


class Device:
  compute_capability = "9.0"

  def __init__(self, platform: str, stats: dict[str, int]):
    self.platform, self._stats = platform, stats

  def memory_stats(self):
    return self._stats or None


class Leaf:
  """An array of 6 GB on devices of one platform."""

  nbytes = 6 * GB

  def __init__(self, platform: str, count: int = 1, **stats: int):
    self._devices = {Device(platform, stats) for _ in range(count)}

  def devices(self):
    return self._devices


@pytest.mark.parametrize(
  ("leaf", "layout"),
  [
    (Leaf("cpu"), "apart"),
    (Leaf("cpu", 2), "stacked"),
    (Leaf("tpu"), "stacked"),
    (Leaf("gpu"), "joined"),  # which does not say how much memory it has
    (Leaf("gpu", bytes_limit=60 * GB, bytes_in_use=6 * GB), "joined"),
    (Leaf("gpu", bytes_limit=60 * GB, bytes_in_use=49 * GB), "stacked"),
    (Leaf("gpu", 2, bytes_limit=60 * GB, bytes_in_use=6 * GB), "stacked"),
  ],
)
def test_layers_leave_their_stacks_where_that_is_free_or_fits(leaf, layout):
  params = {"anchor": {"layers": {"kernel": leaf}}}
  assert inference.choose_layout(params) == layout
