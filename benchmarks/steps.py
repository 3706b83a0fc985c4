"""Builds and times a training step of a composition."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import pairs
from benchmarks.machine import Clock
from calm_jax.composition.connections import Composition
from calm_jax.core import flops, trees
from calm_jax.core.batch import Batch, plain_sequence
from calm_jax.planning import flops as formulas
from calm_jax.training import optimizer
from calm_jax.training import step as step_lib
from calm_jax.training.stage import Stage


def parts(spec: Composition) -> tuple[Callable, Callable]:
  """The trainer's step of Θ_C, and what makes its (state, frozen leaves)."""
  shapes = jax.eval_shape(lambda: pairs.parameters(spec, "float32"))
  mask = trees.mask(shapes, ("composition/.*",))
  stage = Stage(
    learning_rate=1e-4, schedule="constant", warmup=0, b2=0.95, weight_decay=0.0
  )
  made = optimizer.make_optimizer(stage, mask)

  def make() -> tuple[dict, dict]:
    params = pairs.parameters(spec, "float32")
    trainable, frozen = trees.partition(params, mask)
    return step_lib.initial_state(made, trainable), frozen

  return step_lib.make_step(spec, stage, made), make


def batch_of(
  rows: int, length: int, vocabulary: int = pairs.V, weighted: float = 1.0
) -> Batch:
  """Random rows, of which the last tokens, a share `weighted`, have a loss."""
  random = np.random.default_rng(0)
  tokens = random.integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
  ones, places = np.ones((rows, length), np.int32), np.arange(length)
  weighted_tokens = round(weighted * length)
  return Batch(
    plain_sequence(tokens[:, :-1]),
    {},
    {},
    prompt_ends=0 * ones,
    targets=tokens[:, 1:],
    weights=(ones * (places >= length - weighted_tokens)).astype(np.float32),
  )


class Timed:
  """A step that can be called again and again, and what it should cost."""

  def __init__(
    self, spec: Composition, rows: int, length: int, weighted: float = 1.0
  ):
    step, make = parts(spec)
    self.state, self.frozen = make()
    shape = rows, length, spec.anchor.vocab_size
    self.batch, self.whole = jax.device_put(
      (batch_of(*shape, weighted), batch_of(*shape))
    )
    arguments = self.state, self.frozen, self.batch
    self.traced = flops.count(step, *arguments)
    self.weighted = round(weighted * length) / length
    self.least = formulas.training_step(
      spec, rows, length, weighted=self.weighted
    )
    self.tokens = rows * length
    self.step = step.lower(*arguments).compile()
    self.temporary = self.step.memory_analysis().temp_size_in_bytes
    self()

  def __call__(
    self, clock: Clock = time.perf_counter, all_weighted: bool = False
  ) -> float:
    """Seconds of a step, the device's work included."""
    batch = self.whole if all_weighted else self.batch
    jax.block_until_ready(self.state)
    began = clock()
    self.state, metrics = self.step(self.state, self.frozen, batch)
    jax.block_until_ready((self.state, metrics))
    return clock() - began


def measure(
  runs: dict[str, Callable[[Clock], float]],
  least: int,
  matmul: Callable[[], float],
  repeats: int,
  clock: Clock,
) -> dict[str, dict[str, float]]:
  """Medians by name: seconds, matmul FLOPs a second, share of the limit.

  Args:
    runs: steps, which take turns, with matmuls between them.
    least: FLOPs of each.
    matmul: from `machine.make_matmul`.
    repeats: turns.
    clock: that steps are timed by.
  """
  found = {name: ([], [], []) for name in runs}
  for run in runs.values():
    run(clock)  # whose first calls are slower
  before = matmul()
  for _ in range(repeats):
    for name, run in runs.items():
      seconds = run(clock)
      after = matmul()
      # Times add up, not rates.
      rate = 2 / (1 / before + 1 / after)
      share = least / rate / seconds
      for kept, value in zip(found[name], (seconds, rate, share), strict=True):
        kept.append(value)
      before = after
  names = "seconds", "rate", "share"
  return {
    name: dict(zip(names, map(statistics.median, values), strict=True))
    for name, values in found.items()
  }


def unrolled_flops(
  spec: Composition, rows: int, length: int, weighted: float = 1.0
) -> float:
  """XLA's count, which has the body of a loop once: so layers have none.

  A chunk of the loss holds all weighted positions: its loop runs once too.
  """
  chunk = max(1, rows * round(weighted * length))
  layers = {"unroll": spec.anchor.num_layers, "loss_chunk": chunk}
  step, make = parts(
    pairs.computed(spec, spec.anchor.compute.attention, **layers)
  )
  batch = batch_of(rows, length, spec.anchor.vocab_size)
  compiled = step.lower(*jax.eval_shape(make), batch).compile()
  return compiled.cost_analysis()["flops"]
