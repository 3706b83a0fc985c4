"""Rates of training: tokens a second, seconds a step, and FLOPs utilisation.

Model FLOPs utilisation is what the mathematics of a step needs, over what its
devices can compute in the time that it takes.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition import execution
from calm_jax.composition.connections import Composition
from calm_jax.core import flops, trees
from calm_jax.parallel import chips
from calm_jax.parallel.sharding import Layout
from calm_jax.training import step as step_lib
from calm_jax.training.optimizer import Optimizer
from calm_jax.training.stage import Stage


class Cost(NamedTuple):
  """The seconds of a stage's training, and the model FLOPs of all its steps."""

  seconds: float
  flops: int | None  # None if an earlier version ran it, which did not count


def model_flops(
  spec: Composition,
  stage: Stage,
  optimizer: Optimizer,
  step: Callable,
  arguments: tuple[Any, ...],
) -> int:
  """Counts the FLOPs that the matrix products of a step need.

  They are those of the step as `step_lib.make_step` makes it for one device,
  without a kernel and without recomputing anything. Attention counts for all
  pairs of positions of a row; the head only for the positions of the batch that
  have a weight in the loss. `step` is the one that runs: a jitted function that
  is like that is not traced again.
  """
  if not _is_plain(spec):
    plain = {"remat": "none", "attention": "xla", "place": None}
    plain |= {"loss_chunk": 0}
    spec = spec.with_compute(lambda part: plain)
    step = step_lib.make_step(spec, stage, optimizer)
  state, _, batch = arguments
  unweighted = batch.weights.size - int((batch.weights != 0).sum())
  head = _head_flops(spec, stage.model, state["trainable"])
  return flops.count(step, *arguments) - unweighted * head


def _head_flops(spec: Composition, model: str, trainable: dict) -> int:
  """Counts the FLOPs of the head for a position, with its gradients."""
  parts = execution.models(spec)
  owner = "anchor" if model == "composed" else model
  config, names = parts[owner], trees.flatten(trainable).keys()
  kernel = "embed/embedding" if config.tie_embeddings else "head/kernel"
  is_trained = f"{owner}/{kernel}" in names
  # What is below it needs the gradient of the states that it reads.
  products = 1 + is_trained + (len(names) > is_trained)
  return products * 2 * config.width * config.vocab_size


def _is_plain(spec: Composition) -> bool:
  """Checks whether a step traces no kernel, and each product once."""
  return all(
    compute.attention == "xla"
    and compute.remat != "full"
    and compute.loss_chunk == 0
    and compute.place is None
    for compute in (c.compute for c in execution.models(spec).values())
  )


class Peak(NamedTuple):
  """FLOPs a second that the devices of a run can compute at most."""

  flops: float
  source: str  # the name of a chip whose data sheet says it, or a measurement


def find_peak(dtype: str, layout: Layout | None = None) -> Peak:
  """Finds the peak of the devices of a layout, or of one device.

  It is that of the chips' data sheet, or, on a CPU or another device, the speed
  of a matrix product in `dtype`, which is measured once.
  """
  device = jax.local_devices()[0]
  count = 1 if layout is None else layout.mesh.size
  if chip := chips.DEVICE_KINDS.get(device.device_kind):
    wide = jnp.dtype(dtype) == jnp.float32
    each = chip.float32_flops if wide else chip.flops
    return Peak(count * each, f"{count} x {chip.name}")
  if device.platform == "cpu":
    count = jax.process_count()  # The devices of a CPU share its cores.
  return Peak(count * _measured(device, dtype), f"a matrix product in {dtype}")


@functools.cache
def _measured(device: jax.Device, dtype: str) -> float:
  """Measures the FLOPs a second of a device: the best of a few products."""
  size = 1024 if device.platform == "cpu" else 4096
  x = jax.device_put(jnp.ones((size, size), dtype), device)
  product = jax.jit(jnp.matmul).lower(x, x).compile()
  product(x, x).block_until_ready()
  best, began = float("inf"), time.perf_counter()
  while (start := time.perf_counter()) - began < 0.1:
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


class Meter:
  """Measures the steps of a stage, from one line of metrics to the next.

  The caller sets `flops`, the model FLOPs of all steps, once they are counted.
  The first step, in whose time its program is compiled, is left out of the
  rates, unless it is the only one of its line.
  """

  def __init__(self, peak: Peak, steps: int, flops: int | None = None):
    self._peak, self._total, self.flops = peak, steps, flops
    # When the steps since the last line ended, and with how many tokens.
    self._ends, self._compiles = [(time.monotonic(), 0)], True

  def add(self, tokens: int) -> None:
    """Counts a step that has just ended."""
    self._ends.append((time.monotonic(), tokens))

  def skip(self, seconds: float) -> None:
    """Leaves out seconds in which no step ran, such as an evaluation's."""
    self._ends = [(end + seconds, tokens) for end, tokens in self._ends]

  def rates(self) -> dict[str, float]:
    """Returns the rates of the steps since the last call, by their names."""
    ends = self._ends
    if self._compiles and len(ends) > 2:
      ends = ends[1:]
    self._ends, self._compiles = ends[-1:], False
    seconds = ends[-1][0] - ends[0][0]
    each = seconds / (len(ends) - 1)
    assert self.flops is not None  # They are counted after the first step.
    return {
      "tokens_per_second": sum(tokens for _, tokens in ends[1:]) / seconds,
      "step_seconds": each,
      "utilisation": self.flops / (self._total * each * self._peak.flops),
    }

  def __str__(self) -> str:
    """Says what all steps compute, and what utilisation is relative to."""
    peak, source = self._peak
    # No step ran, and an earlier version did not count.
    flops = "unknown" if self.flops is None else f"{self.flops:.4g}"
    return (
      f"{flops} model FLOPs in {self._total} steps; utilisation is relative to "
      f"{peak:.3g} FLOP/s ({source})"
    )
