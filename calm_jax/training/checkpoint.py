"""Checkpoints of a run: saved in the background, restored bit for bit.

A step on disk holds three items: `state` (a pytree of arrays, stored under the
names of its leaves), `data` (the data iterator's state, JSON) and `meta` (the
run's identity, JSON).
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from calm_jax.core import errors, trees
from calm_jax.training import checkpoint_integrity

PyTree = Any

_DELETED = ".deleted"
_LOSS = "loss"  # The name under which a step's loss is on disk.


class Checkpoints(contextlib.AbstractContextManager):
  """The checkpoints of one run; leaving the context waits for the last save.

  All processes of the run make the same calls together.
  """

  def __init__(
    self, directory: str | Path, *, keep_last: int = 2, keep_best: int = 0
  ):
    """Opens a directory for writing, by one run at a time; made if absent.

    What a killed process left is removed, and a damaged newest step is moved
    aside; StorageError if all are damaged. The `keep_last` newest checkpoints
    are kept, and besides the `keep_best` with the lowest loss.
    """
    if keep_last < 1 or keep_best < 0:
      raise errors.InputError(
        f"{keep_last=} must be at least 1, and {keep_best=} at least 0"
      )
    self._directory = Path(directory).absolute()
    self._saving: int | None = None
    if jax.process_index() == 0:
      # Orbax would do it in a thread, which fails where a process ends early.
      for path in self._directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
    checkpoint_integrity.recover(self._directory)
    best = managers.BestN(
      get_metric_fn=_rank,
      reverse=True,
      n=keep_best,
      keep_checkpoints_without_metrics=False,
    )
    policies = [managers.LatestN(keep_last), best]
    options = ocp.CheckpointManagerOptions(
      # Orbax stores the metrics only if it is told how to rank them.
      best_fn=_rank if keep_best else None,
      best_mode="min",
      preservation_policy=managers.AnyPreservationPolicy(policies),
      # A step is renamed away before its files go, so that a kill in the
      # middle of a deletion does not leave a step that looks complete.
      todelete_subdir=_DELETED,
      # Called before the rename that makes a step complete.
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    self._manager = ocp.CheckpointManager(self._directory, options=options)
    self._remove_deleted()

  def save(
    self, step: int, state: PyTree, data, meta, loss: float | None = None
  ) -> None:
    """Starts a save; the arrays may be donated as soon as this returns.

    `data` and `meta` are JSON, the same on all processes; a loss makes the step
    a candidate for the best. Raises StorageError if this save or the one before
    failed, and LostProcess if other processes do not take part.
    """
    if (latest := self.latest()) is not None and latest >= step:
      raise errors.InputError(
        f"{self._directory} has step {latest}, and step {step} is to be saved: "
        "resume from it or write to another directory"
      )
    self._remove_deleted()
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(_nested(state)),
      data=ocp.args.JsonSave(_json_copy(data)),
      meta=ocp.args.JsonSave(_json_copy(meta)),
    )
    # Empty ranks last; None would make Orbax warn at every save.
    metrics = {} if loss is None else {_LOSS: float(loss)}
    self._saving = step
    with self._storage_errors():
      self._manager.save(step, args=args, metrics=metrics, force=True)

  def check(self) -> None:
    """Raises the error of a save that has failed by now; does not wait."""
    if not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Blocks until the save in flight is complete; raises as `save`."""
    with self._storage_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save in flight and releases the threads."""
    with self._storage_errors():
      self._manager.close()
    self._remove_deleted()

  def latest(self) -> int | None:
    """Returns the newest complete step; waits for one in flight."""
    self.wait()
    return self._manager.latest_step()

  def restore(
    self, abstract_state: PyTree, check_meta: Callable = lambda meta: None
  ) -> tuple[PyTree, Any] | None:
    """Restores (state, data) of the newest step; None if there is no step.

    The state gets the structure, dtypes and shardings of `abstract_state`, a
    pytree of arrays or `jax.ShapeDtypeStruct`; a leaf without a sharding is a
    numpy array. `check_meta` is called with the step's `meta` before.

    Raises:
      InputError: the leaves of the step are not the same.
    """
    if (step := self.latest()) is None:
      return None
    path = self._directory / str(step)
    check_meta(_read(path, meta=ocp.args.JsonRestore()).meta)
    restored = _restore(path, _nested(abstract_state))
    leaves = trees.flatten(restored.state)
    state = jax.tree_util.tree_map_with_path(
      lambda path, _: leaves[_leaf_name(path)], abstract_state
    )
    return state, restored.data

  def __exit__(self, kind, *_) -> None:
    is_fault = kind is not None and not issubclass(kind, errors.Preempted)
    # Other processes may be gone after a fault, and a save ends with theirs.
    if jax.process_count() == 1 or not is_fault:
      self.close()

  @contextlib.contextmanager
  def _storage_errors(self) -> Iterator[None]:
    """Turns failures to write into errors that name the last good step."""
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise
    except TimeoutError as error:
      raise errors.LostProcess(
        f"step {self._saving} in {self._directory} was not saved, since other "
        f"processes did not take part: {error}"
      ) from error
    except Exception as error:
      # Tensorstore raises ValueError where the disk is full.
      kept = ocp.utils.checkpoint_steps(self._directory)
      raise errors.StorageError(
        f"step {self._saving} was not saved in {self._directory}: {error}\n"
        f"the last good checkpoint there is step {max(kept, default=None)}; "
        "see that there is space and that it can be written to, and start "
        "again by the same command"
      ) from error

  def _seal(self) -> None:
    name = f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}"
    checkpoint_integrity.seal(self._directory / name)

  def _remove_deleted(self) -> None:
    if jax.process_index() == 0:
      shutil.rmtree(self._directory / _DELETED, ignore_errors=True)


def restore_trainable(
  directory: str | Path, step: int | None = None, abstract: PyTree = None
) -> tuple[dict[str, Any], Any]:
  """Restores (trainable leaves, meta); a run may be writing to the directory.

  Without a step it is the newest intact one; `abstract` is as for
  `Checkpoints.restore`, None for numpy arrays.

  Raises:
    InputError: there is no such step, or its leaves are not the same.
    StorageError: the step, or each that there is, is damaged.
  """
  path = Path(directory).absolute()
  step = checkpoint_integrity.intact_step(path, step)
  want = None if abstract is None else {"trainable": abstract}
  restored = _restore(path / str(step), want, only="trainable")
  return restored.state["trainable"], restored.meta


def _restore(path: Path, want: PyTree, only: str = "") -> ocp.args.Composite:
  """Reads a step, or one part of its state, into `want` or numpy arrays."""
  # pyrefly: ignore [bad-argument-type]  # Any path will do.
  saved = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
  if only:
    saved = {only: saved.get(only, {})}
  if want is None:
    want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
  trees.check_same_structure(saved, want, f"the checkpoint {path}")
  # A leaf without a sharding is a JAX array to orbax before 0.11.31.
  restore_args = jax.tree.map(
    lambda leaf: (
      leaf
      if isinstance(leaf, ocp.ArrayRestoreArgs)
      else dataclasses.replace(leaf, restore_type=np.ndarray)
    ),
    ocp.checkpoint_utils.construct_restore_args(want),
  )
  state = ocp.args.PyTreeRestore(
    want, restore_args=restore_args, partial_restore=bool(only)
  )
  json_item = ocp.args.JsonRestore()
  return _read(path, state=state, data=json_item, meta=json_item)


def _read(path: Path, **items) -> ocp.args.Composite:
  checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
  return checkpointer.restore(path, args=ocp.args.Composite(**items))


def _rank(metrics: Mapping[str, float]) -> float:
  loss = metrics.get(_LOSS, math.inf)
  # NaN compares false with everything and would make the order arbitrary.
  return loss if math.isfinite(loss) else math.inf


def _nested(state: PyTree) -> dict[str, Any]:
  """The leaves of any pytree, which must be arrays, as nested dicts."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return trees.unflatten({_leaf_name(path): leaf for path, leaf in leaves})


def _leaf_name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _json_copy(value: Any) -> Any:
  # A copy because the caller's iterator moves on while the save runs, and
  # here rather than in the background so that what JSON cannot hold fails now.
  return json.loads(json.dumps(value))
