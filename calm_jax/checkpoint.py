"""Checkpoints of a run: saved in the background, restored bit for bit.

A step on disk holds three items: `state` (a pytree of arrays), `data` (the
data iterator's state, JSON) and `meta` (what the run depends on, JSON). The
state is stored as nested dicts under the names of its leaves, so that what is
on disk does not depend on optax's NamedTuples, and a mismatch can be told by
name.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from calm_jax import tree
from calm_jax.errors import InputError

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

    Args:
      directory: made if absent; one run at a time may write to it.
      keep_last: how many of the newest checkpoints to keep, at least 1.
      keep_best: how many of the best to keep besides, among those saved with
        metrics.
      best_metric: the metric they are ranked by; lower is better.

    Raises:
      InputError: keep_last or keep_best is out of range.
    """
    if keep_last < 1 or keep_best < 0:
      raise InputError(
        f"keep_last must be at least 1 and keep_best at least 0, got"
        f" {keep_last} and {keep_best}"
      )
    self._directory = epath.Path(directory).absolute()
    self._best_metric = best_metric
    best = managers.BestN(
      get_metric_fn=self._rank,
      reverse=True,
      n=keep_best,
      keep_checkpoints_without_metrics=False,
    )
    self._manager = _manager(
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
    )
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
    return self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(tree.unflatten(_leaves(state))),
        data=ocp.args.JsonSave(_json_copy(data)),
        meta=ocp.args.JsonSave(_json_copy(meta)),
      ),
      # Empty ranks last; None would make Orbax warn at every save.
      metrics={k: float(v) for k, v in (metrics or {}).items()},
      force=True,
    )

  def wait(self) -> None:
    """Blocks until the save in flight is complete; raises its error."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the save in flight and releases the threads."""
    self._manager.close()
    self._sweep()

  def latest(self) -> int | None:
    """Returns the newest complete step; waits for one in flight."""
    self.wait()
    return self._manager.latest_step()

  def best(self) -> int | None:
    """Returns the complete step with the lowest metric, None without one."""
    self.wait()
    return _best(self._manager, self._best_metric)

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
    """
    self.wait()
    step = _find_step(self._manager, step)
    want = _leaves(abstract_state)
    saved = self._manager.item_metadata(step).state.tree
    nested = tree.unflatten(want)
    tree.check_same_structure(
      saved, nested, f"the checkpoint {self._directory / str(step)}"
    )
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          nested, restore_args=jax.tree.map(_restore_args, nested)
        ),
        data=ocp.args.JsonRestore(),
        meta=ocp.args.JsonRestore(),
      ),
    )
    state = _like(abstract_state, tree.flatten(restored.state))
    return state, restored.data, restored.meta

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _rank(self, metrics: Mapping[str, float]) -> float:
    return _finite_or_worst(metrics.get(self._best_metric, math.inf))

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
    step: a step, "best", or None for the latest.
    abstract: nested dict of `jax.ShapeDtypeStruct` with shardings, or of
      arrays, to restore into. None gives numpy arrays.
    best_metric: what "best" means; lower is better.

  Returns:
    (trainable, meta), trainable a nested dict.

  Raises:
    InputError: the directory holds no such step, or its trainable leaves are
      not those of `abstract`.
  """
  path = epath.Path(directory).absolute()
  if not path.exists():
    raise InputError(f"no checkpoint directory at {path}")
  manager = _manager(path, create=False)
  try:
    if step == "best":
      step = _best(manager, best_metric)
      if step is None:
        raise InputError(f"no checkpoint in {path} has {best_metric!r}")
    step = _find_step(manager, step)
    saved = manager.item_metadata(step).state.tree.get("trainable", {})
    want = saved if abstract is None else abstract
    tree.check_same_structure(saved, want, f"the checkpoint {path / str(step)}")
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          {"trainable": want},
          restore_args={"trainable": jax.tree.map(_restore_args, want)},
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


def is_complete(directory: str | os.PathLike) -> dict[str, Any] | None:
  """Returns what `mark_complete` recorded, None if the run is unfinished."""
  path = epath.Path(directory) / _COMPLETE
  return json.loads(path.read_text()) if path.exists() else None


def _manager(directory: epath.Path, **options) -> ocp.CheckpointManager:
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  arrays = ocp.handlers.PyTreeCheckpointHandler()
  registry.add("state", ocp.args.PyTreeSave, arrays)
  registry.add("state", ocp.args.PyTreeRestore, arrays)
  for item in ("data", "meta"):
    handler = ocp.handlers.JsonCheckpointHandler()
    registry.add(item, ocp.args.JsonSave, handler)
    registry.add(item, ocp.args.JsonRestore, handler)
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(**options),
    handler_registry=registry,
  )


def _find_step(manager: ocp.CheckpointManager, step: int | None) -> int:
  steps = sorted(manager.all_steps())
  if not steps:
    raise InputError(f"no complete checkpoint in {manager.directory}")
  if step is None:
    return steps[-1]
  if step not in steps:
    raise InputError(
      f"no complete checkpoint of step {step} in {manager.directory}; there"
      f" are {steps}"
    )
  return step


def _best(manager: ocp.CheckpointManager, name: str) -> int | None:
  ranked = [
    (_finite_or_worst(metrics[name]), -step)
    for step in manager.all_steps()
    if name in (metrics := manager.metrics(step) or {})
  ]
  return -min(ranked)[1] if ranked else None


def _finite_or_worst(value: float) -> float:
  # NaN compares false with everything and would make the order arbitrary.
  return value if math.isfinite(value) else math.inf


def _json_copy(value: Any) -> Any:
  # A copy because the caller's iterator moves on while the save runs, and
  # here rather than in the background so that what JSON cannot hold fails now.
  return json.loads(json.dumps(value))


def _leaves(state: PyTree) -> dict[str, Any]:
  """Names the leaves of any pytree; typed PRNG keys become their data."""
  named: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in named:
      raise ValueError(f"two leaves are called {name!r}")
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
      raise TypeError(f"leaf {name!r} is a {type(leaf).__name__}, not an array")
    named[name] = _key_data(leaf) if _is_key(leaf) else leaf
  return named


def _like(abstract_state: PyTree, restored: Mapping[str, Any]) -> PyTree:
  """Puts named leaves back into the structure they were named from."""

  def pick(path, want):
    leaf = restored[jax.tree_util.keystr(path, simple=True, separator="/")]
    if _is_key(want):
      return jax.random.wrap_key_data(leaf, impl=_key_impl(want))
    return leaf

  return jax.tree_util.tree_map_with_path(pick, abstract_state)


def _is_key(leaf: Any) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(key: Any) -> Any:
  if isinstance(key, jax.Array):
    return jax.random.key_data(key)
  data = jax.eval_shape(jax.random.key_data, key)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _key_impl(key: Any) -> Any:
  # `key_impl` takes a key or a tracer of one, but no ShapeDtypeStruct.
  found = []
  jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), key)
  return found[0]


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
    return ocp.RestoreArgs(restore_type=np.ndarray)
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  sharding = leaf.sharding or default
  return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape)
