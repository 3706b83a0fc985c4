"""The one training loop: any model or composition, any trainable leaves.

A stage is one run of it. It resumes from its newest checkpoint, ends
bit-equal to a run that was never interrupted, and is skipped once complete.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.composition import forward
from calm_jax.composition.connections import Composition
from calm_jax.core import trees
from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError, StorageError, TrainingDiverged
from calm_jax.data import pipeline
from calm_jax.parallel import processes
from calm_jax.parallel.sharding import Layout
from calm_jax.training import (
  checkpoint_integrity,
  memory,
  profiler,
  run_identity,
  signals,
  utilisation,
)
from calm_jax.training import step as step_lib
from calm_jax.training.checkpoint import Checkpoints, restore_trainable
from calm_jax.training.optimizer import make_optimizer
from calm_jax.training.progress import Progress
from calm_jax.training.stage import Stage
from calm_jax.training.trackers import Log, Trackers
from calm_jax.training.utilisation import Cost, Meter
from calm_jax.training.watchdog import Watchdog

Tree = dict[str, Any]


def run_stage(
  name: str,
  stage: Stage,
  spec: Composition,
  params: Tree,
  source,
  eval_batches: Sequence[Batch],
  directory: Path,
  trackers: Trackers,
  *,
  origins: dict[str, str],
  seed: int,
  layout: Layout | None = None,
  watchdog: float = 0,
  profile: str = "",
) -> tuple[Tree, Cost]:
  """Runs a stage to its end, from wherever an earlier process left it.

  All processes call this together, and the first one writes to the directory.
  Returns the whole tree with the trained leaves, and the cost of training.

  Args:
    source: indexable batches, with `describe(index)` and `fingerprint`; all
      rows of a batch, or this process's share (`Layout.share`).
    trackers: of the run; without any in all processes but the first.
    origins: see `run_identity.describe`.
    watchdog, profile: see `Settings`.

  Raises InputError if the directory holds another run, TrainingDiverged if the
  loss is not finite, StorageError if a batch or a checkpoint cannot be read or
  written, and Preempted after a signal, once what was done is saved.
  """
  if stage.batch_size % stage.accumulate:
    raise InputError(
      f"stage {name!r}: batch_size={stage.batch_size} cannot be cut into "
      f"accumulate={stage.accumulate} equal pieces"
    )
  if layout is not None:
    params = layout.place(params)
  part, _ = forward.submodel(spec, params, stage.model)
  for batch in eval_batches:
    forward.check(part, batch)
  mask = trees.mask(params, stage.trainable)
  trainable, frozen = trees.partition(params, mask)
  # A step of Adam is lost in the rounding of bfloat16. A copy, because the
  # step donates it and the caller may hold `params`.
  trainable = jax.tree.map(
    lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), trainable
  )
  identity = run_identity.describe(
    stage, spec, params, frozen, origins, seed, source.fingerprint
  )
  run = _Run(
    name,
    stage,
    part,
    source,
    eval_batches,
    directory,
    trackers,
    identity,
    layout,
    watchdog,
    profiler.parse(profile, name, stage.steps),
  )
  if (result := run.finished(trainable)) is None:
    with Checkpoints(
      run.checkpoint_folder,
      keep_last=stage.keep_last,
      keep_best=stage.keep_best if eval_batches else 0,
    ) as run.checkpoints:
      result = _train(run, spec, mask, trainable, frozen)
    run_identity.mark_complete(
      directory, step=stage.steps, identity=identity, **result[1]._asdict()
    )
  trained, cost = result
  return trees.merge(trained, frozen), cost


@dataclasses.dataclass
class _Run:
  """A stage with its data, its directory, and its checkpoints once open."""

  name: str
  stage: Stage
  part: Composition  # the model that is trained
  source: Any
  eval_batches: Sequence[Batch]
  directory: Path
  trackers: Trackers
  identity: dict
  layout: Layout | None
  watchdog: float
  profiled: range  # numbers of the steps that are traced
  checkpoints: Checkpoints = dataclasses.field(init=False)

  @property
  def checkpoint_folder(self) -> Path:
    return self.directory / "checkpoints"

  def check_identity(self, saved: dict) -> None:
    run_identity.check(saved, self.identity, self.directory)

  def finished(self, abstract: Tree) -> tuple[Tree, Cost] | None:
    """Reads (trained leaves, cost) of a finished stage, if this is one."""
    if (mark := run_identity.completion(self.directory)) is None:
      return None
    self.check_identity(mark.get("identity", {}))
    folder, step = self.checkpoint_folder, mark["step"]
    try:
      trained = restore_trainable(folder, step, abstract)[0]
      return trained, Cost(mark["seconds"], mark.get("flops"))
    except StorageError as error:
      checkpoint_integrity.warn(
        f"stage {self.name!r} was complete: {error}\nit goes on from an "
        "earlier checkpoint"
      )
      # If the run stops before it reaches that step again, a restart must not
      # look for the lost checkpoint.
      run_identity.remove_mark(self.directory)
      return None

  def resume(self, state: Tree) -> tuple[Tree, pipeline.BatchIterator, Cost]:
    """The newest state, the batches that follow, and the cost until there."""
    iterator = pipeline.BatchIterator(self.source)
    saved = self.checkpoints.restore(state, self.check_identity)
    if saved is None:
      return state, iterator, Cost(0.0, None)
    state, data = saved
    iterator.set_state(data["iterator"])
    return state, iterator, Cost(data["seconds"], data.get("flops"))

  def next_batch(self, iterator: Iterator[Batch], number: int) -> Batch:
    try:
      batch = next(iterator)
      forward.check(self.part, batch)
    except InputError as error:
      where = f"{self.position(number)}, {self.source.describe(number - 1)}"
      raise InputError(f"{where}: {error}") from error
    except OSError as error:
      raise StorageError(
        f"{self.position(number)}: its batch, "
        f"{self.source.describe(number - 1)}, cannot be read: {error}; "
        f"{self.last_checkpoint()}: bring the file back and start again by the "
        "same command"
      ) from error
    return self.placed(batch)

  def placed(self, batch: Batch) -> Batch:
    if self.layout is None:
      return batch
    return self.layout.batch(batch, self.stage.batch_size)

  def held_out_loss(self, evaluate: Callable, *params: Tree) -> float:
    """The mean loss of the targets of all held-out batches."""
    sums = [evaluate(*params, self.placed(x)) for x in self.eval_batches]
    pairs: list[tuple[float, float]] = processes.fetch(sums)
    loss, weight = sum(x for x, _ in pairs), sum(x for _, x in pairs)
    return float(loss / weight)

  def position(self, number: int) -> str:
    return f"stage {self.name!r}, step {number}"

  def last_checkpoint(self) -> str:
    if (step := self.checkpoints.latest()) is None:
      return f"{self.checkpoint_folder} has no checkpoint yet"
    return (
      f"the last good checkpoint is step {step} in {self.checkpoint_folder}"
    )


class _StepLog:
  """Fetches and logs a step's metrics once the next step is dispatched.

  So the device is never idle.
  """

  def __init__(self, run: _Run, log: Log, progress: Progress, meter: Meter):
    self._run, self._log, self._progress = run, log, progress
    self._meter = meter
    self._pending: tuple[int, dict[str, jax.Array]] | None = None

  def add(self, number: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step and logs those of the one before."""
    self.flush()
    self._pending = number, metrics

  def flush(self) -> None:
    """Logs what is pending; raises TrainingDiverged if it is not finite."""
    if self._pending is None:
      return
    (number, metrics), self._pending = self._pending, None
    values = {k: v.item() for k, v in processes.fetch(metrics).items()}
    run = self._run
    if not all(math.isfinite(values[k]) for k in ("loss", "grad_norm")):
      raise TrainingDiverged(
        f"{run.position(number)}: loss {values['loss']}, gradient norm "
        f"{values['grad_norm']}; the batch was "
        f"{run.source.describe(number - 1)}; {run.last_checkpoint()}. A "
        "restart gives the same result: lower the learning rate, or look at "
        "the batch"
      )
    self._meter.add(values.pop("tokens"))
    if number % run.stage.log_every and number != run.stage.steps:
      return
    rates = self._meter.rates()
    self._log(number, values | rates | {"memory_gib": memory.peak_gib()})
    self._progress.update(number, loss=values["loss"], **rates)


def _train(
  run: _Run, spec: Composition, mask: Tree, trainable: Tree, frozen: Tree
) -> tuple[Tree, Cost]:
  """Trains from the newest checkpoint on: (trained leaves, cost)."""
  stage = run.stage
  optimizer = make_optimizer(stage, mask)
  state = step_lib.initial_state(optimizer, trainable, run.layout)
  state, iterator, cost = run.resume(state)
  step = step_lib.make_step(spec, stage, optimizer, run.layout)
  evaluate = step_lib.make_eval(spec, stage.model)
  first, began = int(state["step"]), time.monotonic() - cost.seconds
  profiled = run.profiled if jax.process_index() == 0 else range(0)
  peak = utilisation.find_peak(spec.anchor.compute.dtype, run.layout)
  with (
    run.trackers.stage(run.name, run.directory, first) as write,
    Progress(stage.steps, first, run.name) as progress,
    signals.deferred(run.last_checkpoint) as request,
    Watchdog(run.watchdog) as watch,
    profiler.Profiler(profiled, run.directory / "profile") as profiles,
    memory.MemoryWatch(
      run.part, stage, run.name, run.last_checkpoint
    ) as memory_watch,
  ):
    meter = Meter(peak, stage.steps, cost.flops)
    log, poll = _StepLog(run, write, progress, meter), processes.Poll()
    for number in range(first + 1, stage.steps + 1):
      watch.expect(f"step {number}", compiles=number == first + 1)
      batch = run.next_batch(iterator, number)
      memory_watch.note(step, state, frozen, batch)
      state, metrics = profiles.run(number, step, state, frozen, batch)
      if meter.flops is None:
        # While the device is busy with the step.
        meter.flops = stage.steps * utilisation.model_flops(
          spec, stage, optimizer, step, (state, frozen, batch)
        )
      log.add(number, metrics)
      run.checkpoints.check()
      is_last, stops = number == stage.steps, poll(request.signal is not None)
      evaluates = bool(run.eval_batches) and (
        is_last or number % stage.eval_every == 0
      )
      saves = is_last or stops or number % stage.checkpoint_every == 0
      if not (evaluates or saves):
        continue
      # Nothing may be saved before its loss is known to be finite.
      log.flush()
      paused, loss = time.monotonic(), None
      if evaluates:
        watch.expect(f"the evaluation after step {number}", compiles=True)
        loss = run.held_out_loss(evaluate, state["trainable"], frozen)
        write(number, {"eval_loss": loss})
      if saves:
        watch.expect(f"the save of step {number}")
        cost = Cost(time.monotonic() - began, meter.flops)
        data = {"iterator": iterator.get_state(), **cost._asdict()}
        run.checkpoints.save(number, state, data, run.identity, loss)
      if stops:
        run.checkpoints.wait()
        raise request.error(f"{run.position(number)} is saved")
      meter.skip(time.monotonic() - paused)
    watch.expect("the last save")
    run.checkpoints.wait()
  print(f"{run.name}: {meter}", flush=True)
  return state["trainable"], Cost(time.monotonic() - began, meter.flops)
