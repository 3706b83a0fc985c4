"""Runs a small stage again and again, killed at random, until it is through.

  python tests/kill_driver.py WORKDIR PROGRAMS SEED

WORKDIR gets the run, PROGRAMS the compiled programs, and standard output one
JSON line for each process: when it was killed and what it was at. Processes
are forked from one that has imported everything but started no backend, which
is as good as new and saves the seconds of importing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny

STEPS, KILLS = 120, 8


def run(workdir: Path, programs: Path) -> dict:
  """The run itself, from wherever it was left."""
  stage = tiny.stage(steps=STEPS, log_every=2, checkpoint_every=2)
  with tiny.compilation_cache(programs):
    return tiny.Run(workdir, stage)()


def _saves(workdir: Path) -> set[str]:
  """Checkpoints that are being written."""
  try:
    names = os.listdir(workdir / "checkpoints")
  except FileNotFoundError:
    return set()
  return {name for name in names if "tmp" in name}


def _newest(workdir: Path) -> int:
  try:
    names = os.listdir(workdir / "checkpoints")
  except FileNotFoundError:
    return 0
  return max((int(name) for name in names if name.isdigit()), default=0)


def _wait(pid: int, ready) -> bool:
  """Waits until ready(), or until the process ends: False."""
  while not ready():
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
      return False
    time.sleep(0.0005)
  return True


def _life(workdir: Path, programs: Path, kill, choose) -> dict:
  """One process: what became of it."""
  # What an earlier process left half saved is swept when a run starts.
  before, old = _newest(workdir), _saves(workdir)
  pid = os.fork()
  if pid == 0:
    code = 1
    try:
      run(workdir, programs)
      code = 0
    finally:
      sys.stdout.flush()
      os._exit(code)
  began = time.monotonic()
  if kill == "starting":
    pause, alive = choose.uniform(0, 0.5), True
  elif kill == "saving":
    nth = choose.randrange(1, 4)
    alive = _wait(
      pid,
      lambda: _newest(workdir) >= before + 2 * nth and _saves(workdir) - old,
    )
    pause = choose.uniform(0, 0.02)
  else:
    alive = _wait(pid, lambda: _newest(workdir) > before)
    pause = choose.uniform(0, 0.2)
  if kill and alive:
    time.sleep(pause)
    os.kill(pid, signal.SIGKILL)
  _, status = os.waitpid(pid, 0)
  return {
    "planned": kill,
    "killed": os.WIFSIGNALED(status),
    "exit": os.waitstatus_to_exitcode(status),
    "seconds": round(time.monotonic() - began, 3),
    "from_step": before,
    "newest": _newest(workdir),
    "half_saved": sorted(_saves(workdir) - old),
    "complete": (workdir / "complete.json").exists(),
  }


def main() -> None:
  workdir, programs, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
  choose = random.Random(int(seed))
  for i in range(KILLS):
    kinds = ("saving", "running", "saving", "starting")
    life = _life(workdir, programs, kinds[i % len(kinds)], choose)
    print(json.dumps(life), flush=True)
    if not life["killed"]:
      break
  else:
    print(json.dumps(_life(workdir, programs, None, choose)), flush=True)


if __name__ == "__main__":
  main()
