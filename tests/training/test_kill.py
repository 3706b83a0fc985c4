"""kill -9 at random moments: the run that goes on loses nothing."""

from __future__ import annotations

import helpers
import kill_driver
import numpy as np

from calm_jax.core import trees
from calm_jax.training import checkpoint
from calm_jax.training.metrics import read_metrics


def test_kill_9_at_random_moments(tmp_path):
  programs = tmp_path / "programs"
  want = kill_driver.run(tmp_path / "whole", programs)
  killed = tmp_path / "killed"
  lives = helpers.lives(kill_driver.__file__, killed, programs, 0)
  *kills, last = lives
  # What is tested below is worth nothing unless the kills hit.
  assert len(kills) == kill_driver.KILLS
  assert all(life["exit"] == -9 and not life["complete"] for life in kills)
  assert sum(bool(life["half_saved"]) for life in kills) >= 2
  assert len({life["newest"] for life in kills}) >= 4
  assert last["exit"] == 0 and last["complete"]

  got, _ = checkpoint.restore_trainable(killed / "checkpoints")
  got, want = (
    trees.flatten(got["composition"]),
    trees.flatten(want["composition"]),
  )
  assert got.keys() == want.keys()
  for name, leaf in want.items():
    assert np.asarray(got[name]).tobytes() == np.asarray(leaf).tobytes(), name
  once, again = (read_metrics(tmp_path / d) for d in ("whole", "killed"))
  assert [(r["step"], r["loss"]) for r in again] == [
    (r["step"], r["loss"]) for r in once
  ]
