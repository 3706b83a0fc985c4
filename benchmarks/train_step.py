"""Measures a training step of the composition against this machine's matmuls.

  python -m benchmarks.train_step [--repeats 5] [--cpu]
  python -m benchmarks.train_step --growth
  python -m benchmarks.train_step --devices
  python -m benchmarks.train_step --pair=gemma --dtype=bfloat16 --length=2048 \\
    --rows=4 --attention=auto --torch

A pair of benchmarks.pairs, rows of real length, all of the trainer's step.
Steps and large matmuls take turns, and a step is compared with the matmuls
around it, so that a busy machine slows both: "of the limit" is the time that
the least FLOPs of a step (`planning.flops.training_step`) take at the matmul's
rate, over the step's own; on an accelerator that is the model FLOPs
utilisation, with the rate that a matmul reaches for 100%. Attention counts in
full; another row has its causal half alone. --cpu compares seconds of CPU, all
threads together, for machines that are busy: what other programs take does not
count, nor do cores that wait.

--torch trains the same pair on the same batch by benchmarks.torch_loop too, in
turns. JAX is told to leave it memory (XLA_PYTHON_CLIENT_PREALLOCATE=false).
That loop has no soft cap of attention's scores, since SDPA has none; --no_cap
leaves Gemma-2's out of our step too, so that both compute the same.

--weighted=0.2 gives only the last fifth of each row a loss, as completions of
prompts have, and measures a step with all of it in turns.

--growth is the small pair twice as large, in one respect each; every shape is
measured by itself and freed before the next. --devices is one step on 1, 2, 4
and 8 simulated devices, along `data` and along `fsdp`, without a clock: what
one device does and holds, by its compiled program, whose loops are unrolled so
that XLA counts all of them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import time

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import machine, pairs, steps
from benchmarks.machine import Clock
from calm_jax.composition.connections import Composition
from calm_jax.composition.execution import Asked
from calm_jax.planning import flops

BATCH, LENGTH = 8, 256
GOALS = {"cpu": 0.8, "gpu": 0.55}
OVER_TORCH = 1.5
HOW = "attention", "remat", "loss_chunk", "unroll"


def torch_run(options, spec: Composition):
  """The same by PyTorch."""
  from benchmarks import torch_loop

  device = torch_loop.device()
  anchor, augmenting = pairs.jsons(options.pair)
  ((_, joined),) = spec.augmenting
  run = torch_loop.Loop(
    torch_loop.random_model(anchor, options.dtype, device),
    torch_loop.random_model(augmenting, options.dtype, device, head=False),
    joined.connections,
    steps.batch_of(options.rows, options.length, spec.anchor.vocab_size),
  )
  run()
  return run


def report_step(spec: Composition, options, clock: Clock) -> None:
  """Prints what a step of one pair takes."""
  rows, length = options.rows, options.length
  ours = steps.Timed(spec, rows, length, options.weighted)
  platform = jax.default_backend()
  runs = {"ours": ours}
  if options.weighted < 1:
    runs["whole"] = functools.partial(ours, all_weighted=True)
  if options.torch:
    runs["torch"] = torch_run(options, spec)
  matmul = machine.make_matmul(options.matmul, options.dtype, clock)
  found = steps.measure(runs, ours.least, matmul, options.repeats, clock)
  got = found["ours"]
  seconds, rate = got["seconds"], got["rate"]
  table = Table(
    f"a step of {rows} x {length} tokens", "", "of the least, or the limit"
  )
  table.add_row("least GFLOPs", f"{ours.least / 1e9:,.1f}", "")
  counts = {"traced": ours.traced}
  if platform == "cpu":  # Of kernels of others it knows nothing.
    shape = rows, length, options.weighted
    counts["XLA's, unrolled"] = steps.unrolled_flops(spec, *shape)
  for name, count in counts.items():
    table.add_row(
      f"GFLOPs {name}", f"{count / 1e9:,.1f}", f"{count / ours.least:.3f}"
    )
  table.add_row("temporary MB", f"{ours.temporary / 1e6:,.0f}", "")
  table.add_row(
    f"matmul of {options.matmul}, GFLOPs a second", f"{rate / 1e9:,.0f}", ""
  )
  table.add_row("seconds", f"{seconds:.3f}", "")
  goal = f" (goal {GOALS[platform]})" if platform in GOALS else ""
  table.add_row(
    f"tokens/s (limit {ours.tokens * rate / ours.least:,.0f})",
    f"{ours.tokens / seconds:,.0f}",
    f"{got['share']:.3f}{goal}",
  )
  if options.weighted < 1:
    table.add_row(
      f"with a loss at {options.weighted:.0%} of positions, of all's time",
      "",
      f"{seconds / found['whole']['seconds']:.3f}",
    )
  causal = flops.training_step(spec, rows, length, 0.5, ours.weighted)
  half = causal / ours.least
  table.add_row(
    "with attention to the past only", "", f"{half * got['share']:.3f}"
  )
  if options.torch:
    other = found["torch"]
    table.add_row(
      "PyTorch loop, seconds",
      f"{other['seconds']:.3f}",
      f"{other['share']:.3f}",
    )
    table.add_row(
      "PyTorch loop, of our time",
      f"{other['seconds'] / seconds:.2f}",
      f"(goal {OVER_TORCH})",
    )
  Console().print(table)


def growth(asked: Asked, options, clock: Clock) -> None:
  """The same for pairs twice as large, in one respect each."""
  rows, length = options.rows, options.length
  shapes = {
    f"51M + 10M, 2 connections, {rows} x {length}": ({}, rows, length),
    "twice the layers": ({"deep": 2}, rows, length),
    "twice the width": ({"wide": 2}, rows, length),
    "twice the length": ({}, rows, 2 * length),
    "twice the rows": ({}, 2 * rows, length),
    "4 connections": ({"connections": 4}, rows, length),
  }
  matmul = machine.make_matmul(options.matmul, options.dtype, clock)
  table = Table(
    "", "tokens/s", "time", "least FLOPs", "temporary", "of the limit"
  )
  base = None
  for name, (change, *shape) in shapes.items():
    spec = pairs.computed(pairs.small(**change), dtype=options.dtype)
    spec = pairs.chosen(spec, *shape, asked)
    run = steps.Timed(spec, *shape)
    got = steps.measure({"": run}, run.least, matmul, options.repeats, clock)[
      ""
    ]
    base = base or (got["seconds"], run.least, run.temporary)
    table.add_row(
      name,
      f"{run.tokens / got['seconds']:,.0f}",
      f"{got['seconds'] / base[0]:.2f}",
      f"{run.least / base[1]:.2f}",
      f"{run.temporary / base[2]:.2f}",
      f"{got['share']:.3f}",
    )
    # Nothing of one shape is left in the memory of the next.
    del run
    jax.clear_caches()
    gc.collect()
  Console().print(table)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--pair", choices=pairs.PAIRS, default="small")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rows", type=int, default=BATCH)
  parser.add_argument("--length", type=int, default=LENGTH)
  parser.add_argument("--no_cap", action="store_true")
  parser.add_argument("--weighted", type=float, default=1.0)
  parser.add_argument("--matmul", type=int, help="size of its squares")
  parser.add_argument("--torch", action="store_true")
  parser.add_argument("--growth", action="store_true")
  parser.add_argument("--devices", action="store_true")
  parser.add_argument("--cpu", action="store_true")
  for name in HOW:
    default = getattr(Asked, name)
    parser.add_argument(f"--{name}", type=type(default), default=default)
  options = parser.parse_args(arguments)
  if options.growth and options.pair != "small":
    parser.error("--growth is of the small pair")
  if options.devices:
    from benchmarks import devices  # Before JAX looks for any.

    devices.main(options.pair, options.rows, options.length)
    return
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  options.matmul = options.matmul or machine.matmul_size()
  asked = Asked(**{name: getattr(options, name) for name in HOW})
  clock = time.process_time if options.cpu else time.perf_counter
  if options.growth:
    growth(asked, options, clock)
    return
  changes = {"attention_cap": None} if options.no_cap else {}
  pair = pairs.pair(options.pair, **changes)
  spec = pairs.computed(pair, dtype=options.dtype)
  spec = pairs.chosen(spec, options.rows, options.length, asked)
  report_step(spec, options, clock)


if __name__ == "__main__":
  main()
