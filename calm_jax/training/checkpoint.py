"""Checkpoints of a run: saved in the background, restored bit for bit.

A step on disk holds three items: `state` (a pytree of arrays), `data` (the
data iterator's state, JSON) and `meta` (what the run depends on, JSON). The
state is stored as nested dicts under the names of its leaves, so that what is
on disk does not depend on optax's NamedTuples, and a mismatch can be told by
name. All files have checksums, which are verified before they are read.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from calm_jax.core import trees
from calm_jax.core.errors import (
  InputError,
  LostProcess,
  Preempted,
  StorageError,
)
from calm_jax.training import (
  checkpoint_files,
  checkpoint_leaves,
  checkpoint_steps,
)

PyTree = Any

_COMPLETE = "complete.json"
_DELETED = ".deleted"


class Checkpoints:
  """The checkpoints of one run in one directory.

  All processes of a run make one and call its methods together. A context
  manager: leaving it waits for the save in flight.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep_last: int = 2,
    keep_best: int = 0,
    best_metric: str = "loss",
  ):
    """Opens a directory for writing and cleans what a killed process left.

    The newest step is a good one from then on: one that is damaged is renamed
    to `<step>.corrupt`, which is told on standard error.

    Args:
      directory: made if absent; one run at a time may write to it.
      keep_last: how many of the newest checkpoints to keep, at least 1.
      keep_best: how many of the best to keep besides, among those saved with
        metrics.
      best_metric: the metric they are ranked by; lower is better.

    Raises:
      InputError: keep_last or keep_best is out of range.
      StorageError: each step that there is is damaged.
    """
    if keep_last < 1 or keep_best < 0:
      raise InputError(
        f"keep_last must be at least 1 and keep_best at least 0, got"
        f" {keep_last} and {keep_best}"
      )
    self._directory = epath.Path(directory).absolute()
    checkpoint_steps.recover(self._directory)
    self._best_metric = best_metric
    best = managers.BestN(
      get_metric_fn=self._rank,
      reverse=True,
      n=keep_best,
      keep_checkpoints_without_metrics=False,
    )
    self._manager = checkpoint_steps.manager(
      self._directory,
      cleanup_tmp_directories=True,
      # Orbax stores the metrics only if it is told how to rank them.
      best_fn=self._rank if keep_best else None,
      best_mode="min",
      preservation_policy=managers.AnyPreservationPolicy(
        [managers.LatestN(keep_last), best]
      ),
      # A step is renamed away before its files go, so that a kill in the
      # middle of a deletion does not leave a step that looks complete.
      todelete_subdir=_DELETED,
      # Called before the rename that makes a step complete.
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    self._saving: int | None = None
    self._sweep()

  def save(
    self,
    step: int,
    state: PyTree,
    data: Any,
    meta: Any,
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Starts a save; the arrays may be donated as soon as this returns.

    An error in an earlier save that ran in the background is raised here, or
    by `wait` or `close`.

    Args:
      step: must be greater than every step saved so far.
      state: pytree of arrays, with the key "trainable" if
        `restore_trainable` is to work.
      data: JSON, the same on all processes.
      meta: JSON, the same on all processes.
      metrics: makes the step a candidate for the best; not stored when
        keep_best is 0.

    Returns:
      False if this step is the latest and saved already, in which case nothing
      is written.

    Raises:
      InputError: a later step is saved already, or `metrics` lacks the metric
        that checkpoints are ranked by.
      StorageError: this save or the one before failed; earlier ones are kept.
      LostProcess: other processes do not take part.
    """
    latest = self.latest()
    if latest == step:
      return False
    if latest is not None and latest > step:
      raise InputError(
        f"{self._directory} has step {latest} already, which is after step"
        f" {step}: resume from it or write to another directory"
      )
    if metrics is not None and self._best_metric not in metrics:
      raise InputError(
        f"metrics {sorted(metrics)} lack {self._best_metric!r}, by which the"
        " best checkpoint is chosen"
      )
    self._sweep()
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave(
        trees.unflatten(checkpoint_leaves.by_name(state))
      ),
      data=ocp.args.JsonSave(_json_copy(data)),
      meta=ocp.args.JsonSave(_json_copy(meta)),
    )
    # Empty ranks last; None would make Orbax warn at every save.
    metrics = {k: float(v) for k, v in (metrics or {}).items()}
    self._saving = step
    with self._storing():
      return self._manager.save(step, args=args, metrics=metrics, force=True)

  def check(self) -> None:
    """Raises the error of a save that has failed by now; does not wait."""
    if not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Blocks until the save in flight is complete; raises as `save`."""
    with self._storing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save in flight and releases the threads."""
    with self._storing():
      self._manager.close()
    self._sweep()

  def latest(self) -> int | None:
    """Returns the newest complete step; waits for one in flight."""
    self.wait()
    return self._manager.latest_step()

  def best(self) -> int | None:
    """Returns the complete step with the lowest metric, None without one."""
    self.wait()
    return checkpoint_steps.best(self._manager, self._best_metric)

  def steps(self) -> list[int]:
    """Returns the complete steps on disk, ascending."""
    self.wait()
    return sorted(self._manager.all_steps())

  def restore(
    self, abstract_state: PyTree, step: int | None = None
  ) -> tuple[PyTree, Any, Any]:
    """Restores a step into the structure, dtypes and shardings given.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings, or of
        arrays. A leaf without a sharding goes to the default device; numpy
        arrays are restored as such.
      step: the latest if None.

    Returns:
      (state, data, meta).

    Raises:
      InputError: there is no such step, or its leaves are not those of
        `abstract_state`.
      StorageError: the step is damaged.
    """
    self.wait()
    if step is None:
      step = checkpoint_steps.find_step(self._manager, None)
    else:
      step = checkpoint_steps.good_step(self._manager, step)
    want = checkpoint_leaves.by_name(abstract_state)
    saved = self._manager.item_metadata(step).state.tree
    nested = trees.unflatten(want)
    trees.check_same_structure(
      saved, nested, f"the checkpoint {self._directory / str(step)}"
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          nested,
          restore_args=jax.tree.map(checkpoint_leaves.restore_args, nested),
        ),
        data=ocp.args.JsonRestore(),
        meta=ocp.args.JsonRestore(),
      ),
    )
    state = checkpoint_leaves.like(
      abstract_state, trees.flatten(restored.state)
    )
    return state, restored.data, restored.meta

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind, *_) -> None:
    if jax.process_count() > 1 and kind and not issubclass(kind, Preempted):
      return  # The others may be gone, and a save ends with theirs only.
    self.close()

  @contextlib.contextmanager
  def _storing(self) -> Iterator[None]:
    """Tells of a failure to write which step is still good."""
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise
    except TimeoutError as error:
      raise LostProcess(
        f"step {self._saving} in {self._directory} was not saved, since other "
        f"processes did not take part: {error}"
      ) from error
    except Exception as error:
      # Tensorstore raises ValueError where the disk is full.
      kept = ocp.utils.checkpoint_steps(self._directory)
      raise StorageError(
        f"step {self._saving} was not saved in {self._directory}: {error}\n"
        f"the last good checkpoint there is step {max(kept, default=None)}; "
        "see that there is space and that it can be written to, and start "
        "again by the same command"
      ) from error

  def _seal(self) -> None:
    # Orbax does not say which folder it is about to rename.
    name = str(self._saving)
    [step] = [
      path
      for path in self._directory.iterdir()
      if path.name == name or path.name.startswith(f"{name}.orbax-checkpoint")
    ]
    checkpoint_files.seal(step)

  def _rank(self, metrics: Mapping[str, float]) -> float:
    return checkpoint_steps.finite_or_worst(
      metrics.get(self._best_metric, math.inf)
    )

  def _sweep(self) -> None:
    if jax.process_index() == 0:
      (self._directory / _DELETED).rmtree(missing_ok=True)


def restore_trainable(
  directory: str | os.PathLike,
  step: int | str | None = None,
  *,
  abstract: PyTree | None = None,
  best_metric: str = "loss",
) -> tuple[dict[str, Any], Any]:
  """Restores what was trained, without the optimizer's state.

  Reads only; a run may be writing to the directory.

  Args:
    directory: of `Checkpoints`.
    step: a step, "best", or None for the latest that is not damaged.
    abstract: nested dict of `jax.ShapeDtypeStruct` with shardings, or of
      arrays, to restore into. None gives numpy arrays.
    best_metric: what "best" means; lower is better.

  Returns:
    (trainable, meta), trainable a nested dict.

  Raises:
    InputError: the directory holds no such step, or its trainable leaves are
      not those of `abstract`.
    StorageError: the step, or each that there is, is damaged.
  """
  path = epath.Path(directory).absolute()
  if not path.exists():
    raise InputError(f"no checkpoint directory at {path}")
  manager = checkpoint_steps.manager(path, create=False)
  try:
    if step == "best":
      step = checkpoint_steps.best(manager, best_metric)
      if step is None:
        raise InputError(f"no checkpoint in {path} has {best_metric!r}")
    step = checkpoint_steps.good_step(manager, step)
    saved = manager.item_metadata(step).state.tree.get("trainable", {})
    want = saved if abstract is None else abstract
    trees.check_same_structure(
      saved, want, f"the checkpoint {path / str(step)}"
    )
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          {"trainable": want},
          restore_args={
            "trainable": jax.tree.map(checkpoint_leaves.restore_args, want)
          },
          partial_restore=True,
        ),
        meta=ocp.args.JsonRestore(),
      ),
    )
  finally:
    manager.close()
  return restored.state["trainable"], restored.meta


def mark_complete(
  directory: str | os.PathLike, info: Mapping[str, Any]
) -> None:
  """Records `info` (JSON) as the mark of a finished run; atomic."""
  if jax.process_index() != 0:
    return
  path = epath.Path(directory) / _COMPLETE
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(dict(info), indent=2, sort_keys=True) + "\n"
  if "://" in os.fspath(path):
    # An object store has no rename, and writes an object whole or not at all.
    path.write_text(text)
    return
  temporary = path.with_name(_COMPLETE + ".tmp")
  with open(temporary, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def unmark(directory: str | os.PathLike) -> None:
  """Forgets that a run was finished."""
  if jax.process_index() == 0:
    (epath.Path(directory) / _COMPLETE).unlink(missing_ok=True)


def is_complete(directory: str | os.PathLike) -> dict[str, Any] | None:
  """Returns what `mark_complete` recorded, None if the run is unfinished.

  Raises:
    StorageError: the mark is damaged.
  """
  path = epath.Path(directory) / _COMPLETE
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise StorageError(
      f"{path} is damaged: {error}; remove it, and the stage is looked at again"
    ) from error


def _json_copy(value: Any) -> Any:
  # A copy because the caller's iterator moves on while the save runs, and
  # here rather than in the background so that what JSON cannot hold fails now.
  return json.loads(json.dumps(value))
