"""The training loop: what it changes, what it saves, how it goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from calm_jax.core import trees
from calm_jax.core.errors import InputError, StorageError
from calm_jax.training import (
  checkpoint,
  optimizer,
  run_identity,
  trainer,
  utilisation,
)
from calm_jax.training import step as step_lib
from calm_jax.training.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def cached_programs(tmp_path_factory):
  with tiny.compilation_cache(tmp_path_factory.mktemp("programs")):
    yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """An uninterrupted run: (directory, the tree it returned)."""
  directory = tmp_path_factory.mktemp("finished")
  return directory, tiny.Run(directory)()


def assert_bit_equal(got, want):
  got, want = trees.flatten(got), trees.flatten(want)
  assert got.keys() == want.keys()
  for name, leaf in want.items():
    assert got[name].dtype == leaf.dtype, name
    assert np.asarray(got[name]).tobytes() == np.asarray(leaf).tobytes(), name


def saved_names(directory, step):
  """The names of the arrays on disk, as Orbax recorded them."""
  path = directory / "checkpoints" / str(step) / "state" / "_METADATA"
  keys = json.loads(path.read_text())["tree_metadata"].values()
  return {"/".join(k["key"] for k in leaf["key_metadata"]) for leaf in keys}


# What is trained, and what is saved.


def test_only_the_composition_changes(finished):
  before, after = tiny.Run(finished[0]).params, finished[1]
  for part in ("anchor", "augmenting"):
    assert_bit_equal(after[part], before[part])
  theta = trees.flatten(after["composition"])
  for name, leaf in trees.flatten(before["composition"]).items():
    assert (np.asarray(theta[name]) != np.asarray(leaf)).any(), name


def test_checkpoints_hold_the_composition_and_its_moments_only(finished):
  directory, trained = finished
  theta = {f"composition/{n}" for n in trees.flatten(trained["composition"])}
  names = saved_names(directory, 6)
  rest = {n for n in names if not any(n.endswith(leaf) for leaf in theta)}
  # Besides: how often Adam and the schedule stepped, the step, the key.
  assert len(names - rest) == 3 * len(theta)
  assert {n for n in names if n.startswith("trainable/")} == {
    f"trainable/{leaf}" for leaf in theta
  }
  assert len(rest) == 3
  assert "step" in rest
  assert all(n.startswith("opt_state/") for n in rest - {"step"})


def test_optimizer_state_is_of_the_trainable_leaves_only(tmp_path):
  run = tiny.Run(tmp_path)
  mask = trees.mask(run.params, run.stage.trainable)
  trainable, _ = trees.partition(run.params, mask)
  made = optimizer.make_optimizer(run.stage, mask)
  leaves = jax.tree.leaves(jax.eval_shape(made.init, trainable))
  counts = [leaf for leaf in leaves if leaf.shape == ()]
  assert len(counts) == 2
  assert len(leaves) - len(counts) == 2 * len(jax.tree.leaves(trainable))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == 2 + 2 * trees.count(
    trainable
  )


def test_the_callers_parameters_survive_donation(finished, tmp_path):
  run = tiny.Run(tmp_path)
  run()
  # A donated array would raise when read.
  assert_bit_equal(run.params, tiny.Run(tmp_path).params)


@pytest.mark.parametrize("model", ["anchor", "augmenting/kv"])
def test_a_model_trains_by_itself(model, tmp_path):
  stage = tiny.stage(model=model, trainable=(f"{model}/.*",), steps=2)
  run = tiny.Run(tmp_path, stage)
  before, after = trees.flatten(run.params), trees.flatten(run())
  changed = {
    n for n, leaf in before.items() if (np.asarray(after[n]) != leaf).any()
  }
  assert changed == {n for n in before if n.startswith(f"{model}/")}


# Arithmetic.


def one_step(run, batch, accumulate: int):
  """State and metrics after a step from the start."""
  mask = trees.mask(run.params, run.stage.trainable)
  trainable, frozen = trees.partition(run.params, mask)
  stage = dataclasses.replace(
    run.stage, accumulate=accumulate, schedule="constant", warmup=0,
    # eps keeps Adam from turning rounding errors into steps of full size.
    eps=1e-3, weight_decay=0.0, clip=1e9,
  )  # fmt: skip
  made = optimizer.make_optimizer(stage, mask)
  state = step_lib.initial_state(made, jax.tree.map(jnp.array, trainable))
  return step_lib.make_step(run.spec, stage, made)(state, frozen, batch)


def test_accumulating_equals_one_batch_of_ragged_rows(tmp_path):
  run = tiny.Run(tmp_path)
  theta = run.params["composition"]["kv"]["layer_2_to_1"]
  kernel = theta["output"]["kernel"]
  # W^O starts at zero, which would hide most of the gradient.
  theta["output"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape)
  batch = run.source[0]
  batch.weights[:2] = 0  # a piece without any target
  per_piece = batch.weights.reshape(4, -1).sum(1)
  assert per_piece[0] == 0 and len(set(per_piece)) > 2
  whole, metrics = one_step(run, batch, 1)
  pieces, metrics_4 = one_step(run, batch, 4)
  for name in metrics:
    np.testing.assert_allclose(metrics_4[name], metrics[name], rtol=1e-6)
  assert metrics["grad_norm"] > 1e-2
  for got, want in zip(
    jax.tree.leaves((pieces["trainable"], pieces["opt_state"])),
    jax.tree.leaves((whole["trainable"], whole["opt_state"])),
    strict=True,
  ):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_a_batch_that_cannot_be_cut_evenly(tmp_path):
  with pytest.raises(InputError, match=r"batch_size=8.*accumulate=3"):
    tiny.Run(tmp_path, tiny.stage(accumulate=3))()


def test_bfloat16_computes_but_float32_is_trained(tmp_path):
  run = tiny.Run(tmp_path, tiny.stage(steps=2), dtype="bfloat16")
  for part in ("anchor", "augmenting"):
    run.params[part] = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), run.params[part]
    )
  trained = run()
  assert {x.dtype for x in jax.tree.leaves(trained["composition"])} == {
    np.dtype("float32")
  }
  assert {x.dtype for x in jax.tree.leaves(trained["anchor"])} == {
    jnp.dtype("bfloat16")
  }
  dtypes = saved_dtypes(tmp_path, 2)
  assert dtypes == {"float32", "int32"}


def test_a_model_loaded_as_bfloat16_is_trained_in_float32(tmp_path):
  stage = tiny.stage(steps=2, model="anchor", trainable=("anchor/.*",))
  run = tiny.Run(tmp_path, stage, dtype="bfloat16")
  run.params["anchor"] = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16), run.params["anchor"]
  )
  first = run()["anchor"]
  assert {str(x.dtype) for x in jax.tree.leaves(first)} == {"float32"}
  assert saved_dtypes(tmp_path, 2) == {"float32", "int32"}
  assert_bit_equal(run()["anchor"], first)


def saved_dtypes(directory, step) -> set[str]:
  """Of the arrays on disk."""
  path = directory / "checkpoints" / str(step) / "state"
  metadata = ocp.PyTreeCheckpointHandler().metadata(path)
  return {str(leaf.dtype) for leaf in jax.tree.leaves(metadata.tree)}


# Divergence.


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  run = tiny.Run(tmp_path, source=tiny.Source(poisoned=(4,)))
  with pytest.raises(trainer.TrainingDiverged) as caught:
    run()
  message = str(caught.value)
  assert "step 5" in message
  assert "rows 4.0 to 4.7 of tests" in message
  assert "checkpoint is step 4" in message
  assert run_identity.completion(tmp_path) is None
  trained, _ = checkpoint.restore_trainable(tmp_path / "checkpoints")
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(trained))
  assert {r["step"] for r in read_metrics(tmp_path)} == {1, 2, 3, 4}


def test_nothing_is_saved_when_the_step_of_the_save_diverges(tmp_path):
  run = tiny.Run(tmp_path, source=tiny.Source(poisoned=(1,)))
  with pytest.raises(trainer.TrainingDiverged, match="step 2"):
    run()
  assert list((tmp_path / "checkpoints").iterdir()) == []


# Going on, and refusing to.


def test_a_resumed_run_ends_bit_equal(finished, tmp_path):
  directory, want = finished
  # Between two checkpoints, so that a step is done twice.
  broken = tiny.Run(tmp_path, source=tiny.Source(broken=(5,)))
  with pytest.raises(StorageError, match="no batch 5") as caught:
    broken()
  assert "step 6: its batch, rows 5.0 to 5.7 of tests" in str(caught.value)
  assert "checkpoint is step 4" in str(caught.value)
  assert run_identity.completion(tmp_path) is None
  assert [r["step"] for r in read_metrics(tmp_path)][-1] >= 4
  got = tiny.Run(tmp_path)()
  assert_bit_equal(got, want)
  logged, logged_once = (read_metrics(d) for d in (tmp_path, directory))
  assert [r["step"] for r in logged] == [1, 2, 3, 4, 5, 6]
  for a, b in zip(logged, logged_once, strict=True):
    assert a["loss"] == b["loss"]


def test_a_resumed_run_of_muon_ends_bit_equal(finished, tmp_path):
  stage = tiny.stage(optimizer="muon")
  want = tiny.Run(tmp_path / "whole", stage)()
  broken = tiny.Run(tmp_path / "broken", stage, tiny.Source(broken=(5,)))
  with pytest.raises(StorageError, match="no batch 5"):
    broken()
  assert_bit_equal(tiny.Run(tmp_path / "broken", stage)(), want)
  theta, of_adam = (
    trees.flatten(x["composition"]) for x in (want, finished[1])
  )
  kernels = [name for name in theta if name.endswith("kernel")]
  assert all((theta[name] != of_adam[name]).any() for name in kernels)


def test_an_identity_without_an_optimizer_is_adamws(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  mark = json.loads((tmp_path / "complete.json").read_text())
  assert "optimizer" not in mark["identity"]["settings"]
  with pytest.raises(InputError, match="optimizer: was None, is muon"):
    tiny.Run(tmp_path, tiny.stage(optimizer="muon"))()


def test_a_run_killed_after_its_last_save_needs_no_step(
  finished, tmp_path, monkeypatch
):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  (tmp_path / "complete.json").unlink()
  monkeypatch.setattr(step_lib, "make_step", lambda *_: None)
  assert_bit_equal(tiny.Run(tmp_path)(), finished[1])
  assert run_identity.completion(tmp_path)


def test_a_complete_stage_with_a_damaged_checkpoint(finished, tmp_path, capsys):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  path = tmp_path / "checkpoints" / "6" / "state" / "manifest.ocdbt"
  path.write_bytes(b"")
  assert_bit_equal(tiny.Run(tmp_path)(), finished[1])
  said = capsys.readouterr().err
  assert "was complete" in said and "step 4 is used" in said
  steps = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert steps == {"4", "6", "6.corrupt"}


def test_stopped_before_the_damaged_step_comes_again(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  path = tmp_path / "checkpoints" / "6" / "state" / "manifest.ocdbt"
  path.write_bytes(b"")
  with pytest.raises(StorageError):
    tiny.Run(tmp_path, source=tiny.Source(broken=(5,)))()
  assert run_identity.completion(tmp_path) is None
  assert_bit_equal(tiny.Run(tmp_path)(), finished[1])


def test_a_damaged_mark_of_completion(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  (tmp_path / "complete.json").write_text("{")
  with pytest.raises(StorageError, match=r"complete.json is damaged.*remove"):
    tiny.Run(tmp_path)()


def test_a_complete_stage_is_skipped(finished, monkeypatch):
  def never(*_):
    raise AssertionError("a finished stage ran")

  monkeypatch.setattr(step_lib, "make_step", never)
  assert_bit_equal(tiny.Run(finished[0])(), finished[1])


def other_anchor(run):
  norm = run.params["anchor"]["final_norm"]
  norm["scale"] = norm["scale"].at[0].add(1e-3)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"stage": tiny.stage(learning_rate=3e-3)}, "learning_rate.*0.01.*0.003"),
    ({"stage": tiny.stage(steps=7)}, "settings.steps: was 6, is 7"),
    ({"source": tiny.Source(name="more")}, "source: was tests 8, is more 8"),
    ({"seed": 1}, "seed: was 0, is 1"),
    (other_anchor, "frozen.anchor.sha256"),
  ],
  ids=["rate", "steps", "data", "seed", "anchor"],
)
def test_a_directory_of_another_run(
  change, said, complete, finished, tmp_path, monkeypatch
):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  if not complete:
    (tmp_path / "complete.json").unlink()
  run = tiny.Run(tmp_path, **(change if isinstance(change, dict) else {}))
  if callable(change):
    change(run)
  with pytest.raises(InputError, match=said) as caught:
    run()
  assert str(tmp_path) in str(caught.value)
  # Only what differs is listed.
  assert len(str(caught.value).splitlines()) == 3


def test_a_run_of_an_earlier_version(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
  mark = {"step": 6, "seconds": 1.0, "meta": {"settings": {"steps": 6}}}
  (tmp_path / "complete.json").write_text(json.dumps(mark))
  with pytest.raises(InputError, match="a run of another version of calm_jax"):
    tiny.Run(tmp_path)()


def test_how_often_is_logged_may_change(finished):
  stage = tiny.stage(log_every=3, checkpoint_every=3, keep_last=1)
  assert_bit_equal(tiny.Run(finished[0], stage)(), finished[1])


def test_the_best_checkpoint_is_by_the_held_out_loss(tmp_path):
  stage = tiny.stage(eval_every=2, keep_last=1, keep_best=1)
  run = tiny.Run(tmp_path, stage, eval_batches=(tiny.Source()[900],))
  run()
  losses = {
    r["step"]: r["eval_loss"]
    for r in read_metrics(tmp_path)
    if "eval_loss" in r
  }
  assert losses.keys() == {2, 4, 6}
  best = min(losses, key=losses.get)
  directory = tmp_path / "checkpoints"
  assert {p.name for p in directory.iterdir()} == {"6", str(best)}


def test_the_held_out_loss_is_per_target(tmp_path):
  # Two batches of unlike numbers of targets: their mean would be another.
  batches = [tiny.Source()[900], tiny.Source()[901]]
  batches[0].weights[2:] = 0
  run = tiny.Run(tmp_path, tiny.stage(steps=2), eval_batches=tuple(batches))
  trained = run()
  score = jax.jit(step_lib.row_losses, static_argnums=1)
  sums = [score(trained, run.spec, b) for b in batches]
  total = sum(float(loss.sum()) for loss, _ in sums)
  weight = sum(float(weight.sum()) for _, weight in sums)
  [got] = [r["eval_loss"] for r in read_metrics(tmp_path) if "eval_loss" in r]
  assert got == pytest.approx(total / weight, rel=1e-5)


# The order of things.


class Watched:
  """A metric that tells when it is fetched."""

  def __init__(self, step, events):
    self.step, self.events = step, events

  def item(self):
    self.events.append(f"fetch {self.step}")
    return 1.0


def test_a_step_is_dispatched_before_the_metrics_of_the_last(
  tmp_path, monkeypatch
):
  events, numbers = [], itertools.count(1)

  def fake_step(state, frozen, batch):
    number = next(numbers)
    events.append(f"step {number}")
    metrics = {"loss": Watched(number, events), "grad_norm": np.float32(1)}
    return state, metrics | {"tokens": np.int32(1)}

  save = checkpoint.Checkpoints.save

  def watched_save(self, step, *args):
    events.append(f"save {step}")
    return save(self, step, *args)

  monkeypatch.setattr(step_lib, "make_step", lambda *_: fake_step)
  monkeypatch.setattr(utilisation, "model_flops", lambda *_: 1)
  monkeypatch.setattr(checkpoint.Checkpoints, "save", watched_save)
  tiny.Run(tmp_path, tiny.stage(steps=5, checkpoint_every=3))()
  assert events == [
    "step 1", "step 2", "fetch 1", "step 3", "fetch 2", "fetch 3", "save 3",
    "step 4", "step 5", "fetch 4", "fetch 5", "save 5",
  ]  # fmt: skip
