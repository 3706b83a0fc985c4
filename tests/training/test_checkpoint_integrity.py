"""Damaged files of checkpoints are found out, and an earlier step is used."""

from __future__ import annotations

import os
import shutil

import helpers
import jax
import numpy as np
import pytest
from test_checkpoint import abstract, assert_bit_equal, small_state, steps

from calm_jax.core.errors import StorageError
from calm_jax.training import checkpoint
from calm_jax.training.checkpoint import Checkpoints


def saved(directory, steps=(1, 2)):
  with Checkpoints(directory, keep_last=3, keep_best=1) as checkpoints:
    for step in steps:
      checkpoints.save(
        step, small_state(step), {"at": step}, {"step": step}, 1.0 / step
      )


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  directory = tmp_path_factory.mktemp("two_steps")
  saved(directory)
  return directory


@pytest.mark.parametrize(
  "damage", [helpers.truncate, helpers.flip, helpers.empty, os.remove]
)
def test_a_damaged_file_of_any_kind(damage, two_steps, tmp_path, capsys):
  names = [
    path.relative_to(two_steps)
    for path in (two_steps / "2").rglob("*")
    if path.is_file()
  ]
  assert len(names) > 8
  for number, name in enumerate(names):
    directory = tmp_path / str(number)
    shutil.copytree(two_steps, directory)
    damage(directory / name)
    with Checkpoints(directory, keep_last=3, keep_best=1) as checkpoints:
      state, data = checkpoints.restore(abstract(small_state()))
      step = int(state["step"])
      # What a step holds is right, whichever it is.
      assert_bit_equal(state, small_state(step))
      assert data == {"at": step}
      said = capsys.readouterr().err
      checked = name.name not in (
        "_CHECKPOINT_METADATA", "commit_success.txt"
      )  # fmt: skip
      if name.name == "checksums.json" and damage is os.remove:
        assert step == 2 and "has no checksums" in said
      else:
        assert step == (1 if checked else 2), name
        assert (name.name in said) == checked
      assert (directory / "2.corrupt").exists() == (step == 1)
      # It goes on, over the same step.
      checkpoints.save(3, small_state(3), {"at": 3}, {}, 0.0)
      assert checkpoints.latest() == 3


def test_a_step_is_damaged_again(two_steps, tmp_path):
  directory = tmp_path / "run"
  shutil.copytree(two_steps, directory)
  for _ in range(2):
    helpers.empty(directory / "2" / "meta" / "metadata")
    with Checkpoints(directory, keep_last=3) as checkpoints:
      checkpoints.restore(abstract(small_state()))
      checkpoints.save(2, small_state(2), {"at": 2}, {})
  assert {p.name for p in directory.iterdir()} == {
    "1", "2", "2.corrupt", "2.corrupt-2"
  }  # fmt: skip


def test_nothing_is_moved_while_nothing_is_good(two_steps, tmp_path):
  directory = tmp_path / "run"
  shutil.copytree(two_steps, directory)
  for step in "12":
    helpers.empty(directory / step / "meta" / "metadata")
  for reads in (Checkpoints, checkpoint.restore_trainable):
    with pytest.raises(StorageError, match="no good checkpoint") as error:
      reads(directory)
    for step in "12":
      assert f"{directory / step}/meta/metadata has 0" in str(error.value)
  assert {p.name for p in directory.iterdir()} == {"1", "2"}


def test_the_metrics_of_an_old_step_are_damaged(two_steps, tmp_path, capsys):
  directory = tmp_path / "run"
  shutil.copytree(two_steps, directory)
  helpers.empty(directory / "1" / "metrics" / "metrics")
  with Checkpoints(directory, keep_best=1) as checkpoints:
    assert checkpoints.latest() == 2
  assert steps(directory) == {2}
  assert "1/metrics/metrics has 0 bytes" in capsys.readouterr().err


def test_reading_falls_back_and_moves_nothing(two_steps, tmp_path, capsys):
  directory = tmp_path / "run"
  shutil.copytree(two_steps, directory)
  helpers.empty(directory / "2" / "meta" / "metadata")
  trainable, _ = checkpoint.restore_trainable(directory)
  want = jax.tree.map(np.asarray, small_state(1)["trainable"])
  assert_bit_equal(trainable, want)
  assert "step 1 is used" in capsys.readouterr().err
  with pytest.raises(StorageError, match="meta/metadata has 0 bytes"):
    checkpoint.restore_trainable(directory, 2)
  assert {p.name for p in directory.iterdir()} == {"1", "2"}
