"""Lives of a small run that faults end, for benchmarks/faults.py.

A life is one or more processes that train the same stage together, each
forked from a process that has imported everything but started no backend:
that is as good as new, and saves the seconds of importing. They end as the
command lines do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import tiny

from calm_jax import cli
from calm_jax.core import trees
from calm_jax.core.batch import Batch
from calm_jax.data import packing
from calm_jax.parallel import mesh, processes, sharding
from calm_jax.parallel.rules import SHARDING
from calm_jax.training import signals, trainer

STEPS, EVERY, BATCH = 40, 5, 8
HEARTBEAT, GRACE = 5, 20


class Source(tiny.Source):
  """A process's share of rows, one batch in a while; one batch may hang."""

  def __init__(self, share, hangs: int | None, **options):
    super().__init__(batch_size=BATCH, **options)
    self.share, self.hangs = packing.host_rows(BATCH, *share), hangs

  def __getitem__(self, index: int) -> Batch:
    time.sleep(0.05)  # Long enough to be hit.
    if index == self.hangs:
      time.sleep(1000)
    batch = super().__getitem__(index)
    return jax.tree.map(lambda array: array[self.share], batch)


def train(
  folder: Path, *, hangs=None, watchdog=0.0, broken=(), poisoned=(), every=EVERY
) -> None:
  """The stage, from wherever it was left, on all devices; "trained.npz"."""
  axes = mesh.make_mesh(dict.fromkeys(mesh.AXES, 1) | {"fsdp": -1})
  layout = axes and sharding.Layout(axes, SHARDING)
  share = layout.share(BATCH, 1) if layout else (0, 1)
  stage = tiny.stage(
    steps=STEPS, checkpoint_every=every, batch_size=BATCH,
    # Adam makes steps of full size of rounding errors, where eps lets it.
    eps=1e-4,
  )  # fmt: skip
  spec, params = tiny.compose()
  params, _ = trainer.run_stage(
    "compose", stage, spec, params,
    Source(share, hangs, broken=broken, poisoned=poisoned), [], folder,
    tiny.tracked(folder), origins={}, seed=0, layout=layout, watchdog=watchdog,
  )  # fmt: skip
  trained, _ = trees.partition(params, trees.mask(params, stage.trainable))
  trained = processes.fetch(trees.flatten(trained))
  if jax.process_index() == 0:
    np.savez(folder / "trained.npz", **trained)


@dataclasses.dataclass
class Life:
  """One start of all processes of a run.

  Attributes:
    folder: of the run.
    pids: of its processes.
    logs: what each prints.
  """

  folder: Path
  pids: list[int]
  logs: list[Path]

  def __post_init__(self):
    self._codes: dict[int, int] = {}  # Of those that have ended.

  def newest(self) -> int:
    """The last step with a checkpoint; 0 without one."""
    try:
      names = os.listdir(self.folder / "checkpoints")
    except FileNotFoundError:
      return 0
    return max((int(name) for name in names if name.isdigit()), default=0)

  def logged(self) -> int:
    """The last step that is known to have been made."""
    try:
      lines = (self.folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
      return 0
    for line in reversed(lines):
      try:
        return json.loads(line)["step"]
      except ValueError:
        continue  # Cut short.
    return 0

  def until(self, step: int, timeout: float = 120) -> None:
    """Waits until a step is made, or a process ends."""
    end = time.monotonic() + timeout
    while self.logged() < step and time.monotonic() < end:
      for pid in self.pids:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
          return
      time.sleep(0.002)

  def wait(self, timeout: float = 240) -> tuple[list[int], float]:
    """(exit codes, seconds until the last process was gone)."""
    began, codes = time.monotonic(), self._codes
    while len(codes) < len(self.pids):
      for pid in self.pids:
        if pid not in codes:
          done, status = os.waitpid(pid, os.WNOHANG)
          if done:
            codes[pid] = os.waitstatus_to_exitcode(status)
      if time.monotonic() - began > timeout:
        self.end()
      time.sleep(0.005)
    return [codes[pid] for pid in self.pids], time.monotonic() - began

  def end(self) -> None:
    """Kills what is left."""
    for pid in self.pids:
      if pid not in self._codes:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._codes[pid] = -signal.SIGKILL

  def said(self, process: int = 0) -> str:
    """What a process has printed."""
    return self.logs[process].read_text(errors="replace")


def start(
  folder: Path, programs: Path, *, count=1, devices=1, number=0, **options
) -> Life:
  """Starts `count` processes with `devices` each.

  Args:
    folder: of the run.
    programs: where compiled programs are kept.
    count, devices: processes, and devices of each.
    number: of this life, for its logs.
    **options: of `train`; {"hangs": {process: step}} for one process.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  life = Life(folder, [], [])
  hangs = options.pop("hangs", {})
  for process in range(count):
    log = folder.parent / f"{folder.name}.{number}.{process}.log"
    life.logs.append(log)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
      if count > 1:
        os.environ |= {
          "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
          "JAX_NUM_PROCESSES": str(count),
          "JAX_PROCESS_ID": str(process),
        }
      _live(folder, programs, log, devices, hangs=hangs.get(process), **options)
    life.pids.append(pid)
  return life


def _live(folder: Path, programs: Path, log: Path, devices: int, **options):
  """What a forked process does; never returns."""
  code = 1
  try:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
      os.dup2(out, descriptor)
    jax.config.update("jax_num_cpu_devices", devices)
    several = "JAX_COORDINATOR_ADDRESS" in os.environ

    def main():
      with signals.raised(GRACE, lambda: "the checkpoints are kept"):
        if several:
          processes.start(HEARTBEAT)
        with tiny.compilation_cache(programs):
          train(folder, **options)
        if several:
          jax.distributed.shutdown()

    cli.guarded(main)
    code = 0
  except SystemExit as error:
    code = error.code
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
