"""A training step of the composition, against this machine's matmul rate.

  python -m benchmarks.train_step [--repeats 5] [--growth] [--cpu]

The pair of benchmarks.generate in float32, rows of real length 8 x 256, all of
the trainer's step. Steps and large matmuls take turns, and a step is compared
with the matmuls around it, so that a busy machine slows both: "of the limit" is
the time that the least FLOPs of a step take at the matmul's rate, over the
step's own. The least is m_A up to its last tapped layer and m_B, forward; the
head and m_B above the first connection, backward, without gradients of weights;
and the connections with theirs. Attention counts in full, not its causal half.
--cpu compares seconds of CPU, all threads together, for machines that are busy:
what other programs take does not count, nor do cores that wait.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.generate import V, model
from calm_jax import composition, flops, optim, placing, training_step, tree
from calm_jax.connections import Augmenting, Composition, default_connections
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig
from configs import common

BATCH, LENGTH = 8, 256
GOAL = 0.8
MATMUL, TIMES = 4096, 3  # products of squares
NAME = "augmenting"
Clock = Callable[[], float]


def pair(connections: int = 0, deep: int = 1, wide: int = 1) -> Composition:
  """51M parameters and 10M beside them, or more; Θ_C at each 4th layer."""
  anchor = model(512 * wide, 12 * deep, 1632 * wide)
  augmenting = model(256 * wide, 8 * deep, 600 * wide)
  pairs = default_connections(
    augmenting.num_layers, anchor.num_layers, connections or 2
  )
  return Composition(anchor, ((NAME, Augmenting(augmenting, pairs)),))


def least_flops(spec: Composition, rows: int, length: int) -> int:
  """What a step cannot do without, of matrix products; see above.

  The norms before a projection and before a query are trained: the gradients
  of what those read count, even into a frozen model.
  """
  tokens = rows * length

  def attention(width: int) -> int:
    return 4 * tokens * length * width

  def linears(c: ModelConfig) -> int:
    heads = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
    mlp = (3 if c.gated_mlp else 2) * c.mlp_width
    return 2 * tokens * c.width * (heads + mlp)

  def layers(c: ModelConfig, count: int, times: int = 1) -> int:
    # The gradients of attention are four products for two.
    inner = c.num_heads * c.head_dim
    return count * (linears(c) + times * attention(inner))

  b, D = spec.anchor, spec.anchor.width
  head = 2 * tokens * D * b.vocab_size
  total = layers(b, b.num_layers) + 2 * head
  first = b.num_layers
  for _, joined in spec.augmenting:
    c = joined.config
    total += layers(c, max(pair.augmenting for pair in joined.connections))
    for at in joined.connections:
      first = min(first, at.anchor)
      kernels = D * (c.width + 4 * D)
      total += 3 * (2 * tokens * kernels + attention(D))
  return total + layers(b, b.num_layers - first, times=2)


def prepare(spec: Composition) -> tuple[Callable, dict, dict]:
  """The trainer's step of Θ_C, its state and the frozen leaves; random."""
  init = jax.jit(decoder.init, static_argnums=1)
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "anchor": init(keys[0], spec.anchor),
    "augmenting": {
      name: init(keys[1], joined.config) for name, joined in spec.augmenting
    },
    "composition": composition.init(keys[2], spec),
  }
  mask = tree.mask(params, ("composition/.*",))
  trainable, frozen = tree.partition(params, mask)
  rate = optim.schedule("constant", 1e-4, steps=1000, warmup=0, final=1.0)
  tx = optim.optimizer(
    mask, rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, decay="", clip=1.0
  )
  state = {
    "trainable": trainable,
    "opt_state": tx.init(params),
    "step": jnp.int32(0),
    "rng": jax.random.key(0),
  }
  step = training_step.make_step(spec, "composed", tx, rate, accumulate=1)
  return step, state, frozen


def batch_of(rows: int, length: int) -> dict[str, np.ndarray]:
  random = np.random.default_rng(0)
  tokens = random.integers(0, V, (rows, length + 1), dtype=np.int32)
  ones = np.ones((rows, length), np.int32)
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segments": ones,
    "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape),
    "prompt_ends": 0 * ones,
    "weights": ones.astype(np.float32),
  }


class Timed:
  """A step that can be called again and again, and what it should cost."""

  def __init__(self, spec: Composition, rows: int = BATCH, length=LENGTH):
    step, self.state, self.frozen = prepare(spec)
    self.batch = jax.device_put(batch_of(rows, length))
    arguments = self.state, self.frozen, self.batch
    self.traced = flops.count(step, *arguments)
    self.least = least_flops(spec, rows, length)
    self.tokens = rows * length
    self.step = step.lower(*arguments).compile()
    self.temporary = self.step.memory_analysis().temp_size_in_bytes
    self()

  def __call__(self, clock: Clock = time.perf_counter) -> float:
    began = clock()
    self.state, metrics = self.step(self.state, self.frozen, self.batch)
    metrics["loss"].block_until_ready()
    jax.block_until_ready(self.state["trainable"])
    return clock() - began


def make_matmul(clock: Clock) -> Callable[[], float]:
  """Measures FLOPs a second of a large matrix product."""
  a = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL))
  product = jax.jit(jnp.matmul)
  product(a, a).block_until_ready()

  def rate() -> float:
    began = clock()
    for _ in range(TIMES):
      product(a, a).block_until_ready()
    return TIMES * 2 * MATMUL**3 / (clock() - began)

  return rate


def measure(
  runs: dict[str, Timed], repeats: int, clock: Clock
) -> dict[str, dict]:
  """Medians by name: seconds, matmul FLOPs a second, share of the limit."""
  matmul = make_matmul(clock)
  found = {name: ([], [], []) for name in runs}
  before = matmul()
  for _ in range(repeats):
    for name, run in runs.items():
      seconds = run(clock)
      after = matmul()
      # Times add up, not rates.
      rate = 2 / (1 / before + 1 / after)
      share = run.least / rate / seconds
      for kept, value in zip(found[name], (seconds, rate, share), strict=True):
        kept.append(value)
      before = after
  names = "seconds", "rate", "share"
  return {
    name: dict(zip(names, map(statistics.median, values), strict=True))
    for name, values in found.items()
  }


def unrolled_flops(spec: Composition, rows: int, length: int) -> float:
  """XLA's count, which has the body of a loop once: so there is none."""
  layers = {"unroll": spec.anchor.num_layers, "loss_chunk": 0}
  step, *arguments = prepare(placing.configure(spec, lambda part: layers))
  compiled = step.lower(*arguments, batch_of(rows, length)).compile()
  return compiled.cost_analysis()["flops"]


def one(spec: Composition, repeats: int, clock: Clock) -> None:
  run = Timed(spec)
  of_xla = unrolled_flops(spec, BATCH, LENGTH)
  got = measure({"": run}, repeats, clock)[""]
  table = Table("a step of 8 x 256 tokens", "", "of the least, or the limit")
  seconds, rate = got["seconds"], got["rate"]
  table.add_row("least GFLOPs", f"{run.least / 1e9:,.1f}", "")
  for name, count in (("traced", run.traced), ("XLA's, unrolled", of_xla)):
    table.add_row(
      f"GFLOPs {name}", f"{count / 1e9:,.1f}", f"{count / run.least:.3f}"
    )
  table.add_row("temporary MB", f"{run.temporary / 1e6:,.0f}", "")
  table.add_row("matmul, GFLOPs a second", f"{rate / 1e9:,.0f}", "")
  table.add_row("seconds", f"{seconds:.3f}", "")
  table.add_row(
    f"tokens/s (limit {run.tokens * rate / run.least:,.0f})",
    f"{run.tokens / seconds:,.0f}",
    f"{got['share']:.3f} (goal {GOAL})",
  )
  Console().print(table)


def growth(how: dict, repeats: int, clock: Clock) -> None:
  """The same for pairs twice as large, in one respect each."""
  specs = {
    "51M + 10M, 2 connections, 8 x 256": (pair(), BATCH, LENGTH),
    "twice the layers": (pair(deep=2), BATCH, LENGTH),
    "twice the width": (pair(wide=2), BATCH, LENGTH),
    "twice the length": (pair(), BATCH, 2 * LENGTH),
    "twice the rows": (pair(), 2 * BATCH, LENGTH),
    "4 connections": (pair(connections=4), BATCH, LENGTH),
  }
  runs = {
    name: Timed(placing.configure(spec, lambda part: how), *shape)
    for name, (spec, *shape) in specs.items()
  }
  found = measure(runs, repeats, clock)
  table = Table(
    "", "tokens/s", "time", "least FLOPs", "temporary", "of the limit"
  )
  base, *_ = runs
  for name, run in runs.items():
    got = found[name]
    table.add_row(
      name,
      f"{run.tokens / got['seconds']:,.0f}",
      f"{got['seconds'] / found[base]['seconds']:.2f}",
      f"{run.least / runs[base].least:.2f}",
      f"{run.temporary / runs[base].temporary:.2f}",
      f"{got['share']:.3f}",
    )
  Console().print(table)


def main() -> None:
  defaults = common.get_config()
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--growth", action="store_true")
  parser.add_argument("--cpu", action="store_true")
  how = "unroll", "remat", "loss_chunk"
  for name in how:
    default = defaults[name]
    parser.add_argument(f"--{name}", type=type(default), default=default)
  options = parser.parse_args()
  fields = {name: getattr(options, name) for name in how}
  clock = time.process_time if options.cpu else time.perf_counter
  if options.growth:
    growth(fields, options.repeats, clock)
  else:
    spec = placing.configure(pair(), lambda part: fields)
    one(spec, options.repeats, clock)


if __name__ == "__main__":
  main()
