"""The one training loop: any model or composition, any trainable leaves.

A stage is one run of it. It resumes from its newest checkpoint, ends
bit-equal to a run that was never interrupted, and is skipped once complete.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.composition.connections import Composition
from calm_jax.core import trees
from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError, StorageError, TrainingDiverged
from calm_jax.data import pipeline
from calm_jax.parallel import processes
from calm_jax.parallel.sharding import Layout
from calm_jax.training import checkpoint, run_identity, signals
from calm_jax.training import step as step_lib
from calm_jax.training.metrics import MetricWriter, Progress
from calm_jax.training.optimizer import Optimizer, make_optimizer
from calm_jax.training.stage import Stage
from calm_jax.training.watchdog import Watchdog

Array = jax.Array


def run_stage(
  name: str,
  stage: Stage,
  spec: Composition,
  params: dict,
  source,
  eval_batches: list[Batch],
  directory: Path,
  *,
  origins: dict[str, str],
  seed: int,
  layout: Layout | None = None,
  watchdog: float = 0,
) -> tuple[dict, float]:
  """Runs a stage to its end, from wherever an earlier process left it.

  Args:
    name: of the stage, for the progress bar.
    stage: what to do.
    spec: the whole composition.
    params: its whole tree.
    source: random access to batches, with `describe(index)`: all of their rows,
      or this process's `layout.share`.
    eval_batches: held-out batches, measured every `eval_every` steps.
    directory: where checkpoints and metrics go.
    origins: where each frozen model came from, for the checkpoint.
    seed: of the run.
    layout: of all arrays, on several devices; all processes call this together
      and the first one writes.
    watchdog: seconds after which a step counts as hung; 0 for never.

  Returns:
    (the whole tree with the trained leaves, seconds of training).

  Raises:
    InputError: the directory holds a run of other settings or other models.
    TrainingDiverged: the loss is not finite.
    StorageError: a batch cannot be read, or a checkpoint not be written or,
      where no other is left, read.
    Preempted: a signal came, and what was done is saved.
  """
  if stage.batch_size % stage.accumulate:
    raise InputError(
      f"stage {name!r}: batch_size={stage.batch_size} cannot be cut into "
      f"accumulate={stage.accumulate} equal pieces"
    )
  if layout is not None:
    params = layout.place(params)
  mask = trees.mask(params, stage.trainable)
  trainable, frozen = trees.partition(params, mask)
  # A step of Adam is lost in the rounding of bfloat16. A copy, because the
  # step donates it and the caller may hold `params`.
  trainable = jax.tree.map(
    lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32)), trainable
  )
  meta = run_identity.describe(
    stage, spec, params, frozen, origins, seed, source
  )
  done = checkpoint.is_complete(directory)
  checkpoints_dir = directory / "checkpoints"
  if done:
    run_identity.check(done["meta"], meta, directory)
    try:
      trained, _ = checkpoint.restore_trainable(
        checkpoints_dir, done["step"], abstract=trainable
      )
      return trees.merge(trained, frozen), done["seconds"]
    except StorageError as error:
      print(
        f"warning: stage {name!r} was complete: {error}\nit goes on from an "
        "earlier checkpoint",
        file=sys.stderr,
        flush=True,
      )
      # Stopped before that step comes again, it must not be looked for.
      checkpoint.unmark(directory)

  optimizer = make_optimizer(stage, mask)
  state = _initial_state(optimizer, trainable, layout)
  with checkpoint.Checkpoints(
    checkpoints_dir,
    keep_last=stage.keep_last,
    keep_best=stage.keep_best if eval_batches else 0,
    best_metric="eval_loss",
  ) as checkpoints:
    data, first, seconds = {"iterator": None}, 0, 0.0
    if checkpoints.latest() is not None:
      state, data, saved = checkpoints.restore(state)
      run_identity.check(saved, meta, directory)
      first, seconds = int(state["step"]), data["seconds"]
    iterator = pipeline.make_iterator(source)
    if data["iterator"] is not None:
      iterator.set_state(data["iterator"])
    loop = _Loop(
      name, stage, source, eval_batches, checkpoints, meta, directory, layout,
      watchdog,
    )  # fmt: skip
    step = step_lib.make_step(spec, stage, optimizer, layout)
    evaluate = step_lib.make_eval(spec, stage.model)
    state, seconds = loop.run(
      step, evaluate, state, frozen, iterator, first, seconds
    )
  checkpoint.mark_complete(
    directory, {"step": stage.steps, "seconds": seconds, "meta": meta}
  )
  return trees.merge(state["trainable"], frozen), seconds


def _initial_state(
  optimizer: Optimizer, trainable: dict, layout: Layout | None
) -> dict[str, Any]:
  """The state before the first step, laid out as its parameters are."""
  make = functools.partial(step_lib.initial_state, optimizer)
  if layout is None:
    return make(trainable)
  shardings = layout.following(jax.eval_shape(make, trainable))
  del shardings["trainable"]

  def rest(trainable):
    state = make(trainable)
    del state["trainable"]
    return state

  made = jax.jit(rest, out_shardings=shardings)(trainable)
  return made | {"trainable": trainable}


@dataclasses.dataclass
class _Loop:
  """The loop itself; step N is dispatched before N-1's metrics are read."""

  name: str
  stage: Stage
  source: Any
  eval_batches: list[Batch]
  checkpoints: checkpoint.Checkpoints
  meta: dict
  directory: Path
  layout: Layout | None
  watchdog: float

  def run(self, step, evaluate, state, frozen, iterator, first, seconds):
    stage = self.stage
    began = time.monotonic() - seconds
    writes = jax.process_index() == 0
    with (
      MetricWriter(self.directory, resume_step=first, active=writes) as writer,
      Progress(stage.steps, first, self.name, active=writes) as progress,
      signals.deferred() as request,
      Watchdog(self.watchdog) as watch,
    ):
      self._last_log, self._tokens = time.monotonic(), 0
      pending, poll = None, processes.Poll()
      for number in range(first + 1, stage.steps + 1):
        watch.expect(f"step {number}", compiles=number == first + 1)
        batch = self._placed(self._next(iterator, number))
        state, metrics = step(state, frozen, batch)
        if pending is not None:
          self._read(*pending, writer, progress)
        pending = number, metrics
        self.checkpoints.check()
        last = number == stage.steps
        stops = poll(request.signal is not None)
        evaluates = self.eval_batches and (
          last or number % stage.eval_every == 0
        )
        saves = last or stops or number % stage.checkpoint_every == 0
        if not (evaluates or saves):
          continue
        # Nothing may be saved before its loss is known to be finite.
        self._read(*pending, writer, progress)
        pending, scores = None, None
        if evaluates:
          watch.expect(f"the evaluation after step {number}", compiles=True)
          scores = {
            "eval_loss": self._evaluate(evaluate, state["trainable"], frozen)
          }
          writer.write(number, scores)
        if saves:
          watch.expect(f"the save of step {number}")
          data = {
            "iterator": iterator.get_state(),
            "seconds": time.monotonic() - began,
          }
          self.checkpoints.save(number, state, data, self.meta, scores)
        if stops:
          self.checkpoints.wait()
          raise request.error(f"{self._here(number)} is saved")
      watch.expect("the last save")
      self.checkpoints.wait()
    return state, time.monotonic() - began

  def _here(self, number: int) -> str:
    return f"stage {self.name!r}, step {number}"

  def _kept(self) -> str:
    self.checkpoints.wait()
    return (
      f"the last good checkpoint is step {self.checkpoints.latest()} in "
      f"{self.directory}/checkpoints"
    )

  def _next(self, iterator, number):
    try:
      return next(iterator)
    except OSError as error:
      raise StorageError(
        f"{self._here(number)}: its batch, {self.source.describe(number - 1)}, "
        f"cannot be read: {error}; {self._kept()}: bring the file back and "
        "start again by the same command"
      ) from error

  def _read(self, number, metrics, writer, progress):
    """Fetches the metrics of a step, which waits until it is done."""
    values = {k: v.item() for k, v in processes.fetch(metrics).items()}
    if not all(math.isfinite(values[k]) for k in ("loss", "grad_norm")):
      raise TrainingDiverged(
        f"{self._here(number)}: loss {values['loss']}, gradient norm "
        f"{values['grad_norm']}; the batch was "
        f"{self.source.describe(number - 1)}; {self._kept()}. Started again, "
        "it comes to the same: lower the learning rate, or look at the batch"
      )
    self._tokens += values.pop("tokens")
    if number % self.stage.log_every == 0 or number == self.stage.steps:
      now = time.monotonic()
      speed = self._tokens / (now - self._last_log)
      self._last_log, self._tokens = now, 0
      writer.write(number, values | {"tokens_per_second": speed})
      progress.update(number, loss=values["loss"], tokens_per_second=speed)

  def _placed(self, batch):
    if self.layout is None:
      return batch
    return self.layout.batch(batch, self.stage.batch_size)

  def _evaluate(self, evaluate, trainable, frozen) -> float:
    sums = [
      evaluate(trainable, frozen, self._placed(b)) for b in self.eval_batches
    ]
    loss, weight = map(sum, zip(*processes.fetch(sums), strict=True))
    return float(loss / weight)
