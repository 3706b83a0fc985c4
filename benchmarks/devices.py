"""Compares what one device of 1, 2, 4 or 8 does and holds in a training step.

  python -m benchmarks.train_step --devices

No clock: simulated devices share the cores of this machine. What counts is the
program that each of them would run, as XLA compiled it for the CPU. Layers are
unrolled and logits made at once, so that there is no loop, whose body XLA would
count once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import pairs
from calm_jax.composition.connections import Composition
from calm_jax.experiments.settings import Settings
from calm_jax.parallel import mesh as mesh_lib
from calm_jax.planning import estimate, programs, topology
from calm_jax.planning.shapes import Job
from calm_jax.training.stage import Stage

COUNTS = 1, 2, 4, 8
ALONG = "data", "fsdp"


class Device(NamedTuple):
  """The work of one device in a step of training.

  Attributes:
    flops: that XLA counts.
    arguments: bytes that it is given.
    temporaries: bytes that it needs besides.
    sent: bytes that it sends to others.
  """

  flops: float
  arguments: int
  temporaries: int
  sent: float


def job(spec: Composition, rows: int, length: int) -> Job:
  """Makes the job of training Θ_C with the default settings."""
  layers = [a.config.num_layers for _, a in spec.augmenting]
  stage = Stage(batch_size=rows, length=length)
  settings = Settings(
    "text",
    None,
    unroll=max([spec.anchor.num_layers, *layers]),
    loss_chunk=rows * length,
    stages={"compose": stage},
  )
  params = jax.eval_shape(lambda: pairs.parameters(spec, "float32"))
  return Job(settings, stage, spec, params, {})


def compile_step(job: Job, count: int, axis: str) -> Device:
  """Compiles a step for `count` devices along one axis of the mesh."""
  axes = dict.fromkeys(mesh_lib.AXES, 1) | {axis: count}
  placed = programs.place(job, topology.target(f"cpu:{count}"), axes)
  program = programs.training(placed, job.stage.batch_size)
  text = program.compiled.as_text()
  if " while(" in text:
    raise RuntimeError("the program has a loop, whose FLOPs XLA counts once")
  found = estimate.estimate(placed, program)
  return Device(
    program.compiled.cost_analysis()["flops"],
    sum(program.given.resident().values()),
    found.memory["temporaries"],
    sum(found.sent.values()),
  )


def table(job: Job, counts=COUNTS, along=ALONG) -> tuple[Table, dict]:
  """The table, and what is in it: {(axis, count): Device}."""
  found = {("", 1): compile_step(job, 1, along[0])}
  found |= {
    (axis, n): compile_step(job, n, axis)
    for axis in along
    for n in counts
    if n > 1
  }
  base = found["", 1]
  made = Table(
    "devices", "FLOPs of one", "arguments", "temporaries", "sent MB",
    "of 1's arguments",
  )  # fmt: skip
  for (axis, n), got in found.items():
    made.add_row(
      f"{n} {axis}" if axis else "1",
      f"{got.flops / base.flops:.3f}",
      f"{got.arguments / base.arguments:.3f}",
      f"{got.temporaries / base.temporaries:.3f}",
      f"{got.sent / 1e6:,.1f}",
      f"{got.sent / base.arguments:.3f}",
    )
  return made, found


def main(name: str, rows: int, length: int) -> None:
  topology.prepare(f"cpu:{max(COUNTS)}")
  console = Console()
  console.print(
    f"the {name} pair, a step of {rows} x {length} tokens, of 1 device's"
  )
  console.print(table(job(pairs.pair(name), rows, length))[0])
