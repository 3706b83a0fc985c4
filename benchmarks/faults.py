"""Runs every fault of docs/faults.md at random moments, repeatedly.

  python -m benchmarks.faults [--repeats 10] [--only kill,SIGTERM] [--json FILE]

A small run is started, meets a fault, and is started again until it is
through. What it trained is compared with an uninterrupted run: bit by bit on
the same devices, to 1e-5 of each leaf's largest element on others. "Lost" is
how many steps had to be made again; checkpoints are 5 steps apart. A kill may
hit a save in flight, which then does not count. A process that falls silent
counts as gone after 5 s here (config.heartbeat). Needs Linux; the rows of a
full disk need the right to mount a tmpfs, and are skipped without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

import fault_driver  # noqa: E402
from fault_driver import EVERY, STEPS, Life  # noqa: E402

TWO = {"count": 2, "devices": 2}
Choose = random.Random
# What a life of the run needs to go on; and what each row finds.
Row = dict[str, Any]


class Runs:
  """Starts lives in one folder, and knows what they should come to."""

  def __init__(self, folder: Path):
    self.folder, self.programs = folder, folder / "programs"
    self._whole: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    self._losses: dict[tuple[int, int], list] = {}

  def whole(self, count: int = 1, devices: int = 1):
    """(leaves, losses) of the run that nothing interrupts."""
    shape = count, devices
    if shape not in self._whole:
      folder = self.folder / f"whole_{count}x{devices}"
      life = self.start(folder, count=count, devices=devices)
      codes, _ = life.wait()
      assert codes == [0] * count, life.said()
      self._whole[shape] = _trained(folder)
      self._losses[shape] = _losses(folder)
    return self._whole[shape], self._losses[shape]

  def start(self, folder: Path, **options) -> Life:
    return fault_driver.start(folder, self.programs, **options)


def _trained(folder: Path) -> dict[str, np.ndarray]:
  with np.load(folder / "trained.npz") as trained:
    return dict(trained)


def _losses(folder: Path) -> list[tuple[int, float]]:
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [(r["step"], r["loss"]) for r in map(json.loads, lines)]


def _finish(runs: Runs, folder: Path, life: Life, **shape) -> Row:
  """Starts the run again, and compares what comes of it.

  Args:
    runs: what to compare with: the run on the shape of the first life.
    folder: of the run.
    life: that a fault has ended.
    **shape: count and devices of the next life, "before" those of the first.
  """
  before = shape.pop("before", shape)
  kept, made = life.newest(), life.logged()
  again = runs.start(folder, number=1, **shape)
  codes, _ = again.wait()
  assert codes == [0] * len(codes), again.said()
  want, losses = runs.whole(**before)
  got = _trained(folder)
  assert got.keys() == want.keys()
  if shape == before:
    equal = all(got[n].tobytes() == want[n].tobytes() for n in want)
    equal = equal and _losses(folder) == losses
  else:
    equal = all(
      np.abs(got[n] - want[n]).max() <= 1e-5 * np.abs(want[n]).max()
      for n in want
    )
    equal = equal and [s for s, _ in _losses(folder)] == [s for s, _ in losses]
  return {"lost": made - kept, "equal": equal, "said": again.said()}


def _moment(choose: Choose, life: Life) -> None:
  """Some moment after the first steps, of no regard to any step."""
  life.until(choose.randrange(2, STEPS - 12))
  time.sleep(choose.uniform(0, 0.1))


def _kill(victim: int):
  def row(runs: Runs, folder: Path, choose: Choose) -> Row:
    life = runs.start(folder, **TWO)
    _moment(choose, life)
    os.kill(life.pids[victim], signal.SIGKILL)
    codes, seconds = life.wait()
    assert codes[victim] == -signal.SIGKILL
    survivor = 1 - victim
    said = life.said(survivor)
    assert "another process" in said or "another task" in said, said
    found = {"code": codes[survivor], "seconds": seconds}
    return found | _finish(runs, folder, life, **TWO)

  return row


def silent(runs: Runs, folder: Path, choose: Choose) -> Row:
  """The machine of one process of two is gone without a word."""
  life = runs.start(folder, **TWO)
  _moment(choose, life)
  victim, survivor = life.pids[1], life.pids[0]
  os.kill(victim, signal.SIGSTOP)
  began = time.monotonic()
  os.waitid(os.P_PID, survivor, os.WEXITED | os.WNOWAIT)
  seconds = time.monotonic() - began
  os.kill(victim, signal.SIGKILL)
  codes, _ = life.wait()
  assert "another process" in life.said() or "another task" in life.said()
  found = {"code": codes[0], "seconds": seconds}
  return found | _finish(runs, folder, life, **TWO)


def _signal(number: signal.Signals, **shape):
  def row(runs: Runs, folder: Path, choose: Choose) -> Row:
    life = runs.start(folder, **shape)
    _moment(choose, life)
    os.kill(choose.choice(life.pids), number)
    codes, seconds = life.wait()
    assert "is saved" in life.said(), life.said()
    [code] = set(codes)
    found = {"code": code, "seconds": seconds}
    return found | _finish(runs, folder, life, **shape)

  return row


def _devices(**shape):
  """A run of two processes of two devices each goes on with others."""

  def row(runs: Runs, folder: Path, choose: Choose) -> Row:
    life = runs.start(folder, **TWO)
    _moment(choose, life)
    for pid in life.pids:
      os.kill(pid, signal.SIGKILL)
    codes, seconds = life.wait()
    found = {"code": codes[0], "seconds": seconds}
    return found | _finish(runs, folder, life, before=TWO, **shape)

  return row


def _damage(change: Callable[[Path, Choose], None]):
  """A file of the newest checkpoint is not what it was."""

  def row(runs: Runs, folder: Path, choose: Choose) -> Row:
    life = runs.start(folder)
    life.until(EVERY + 2)
    _moment(choose, life)
    os.kill(life.pids[0], signal.SIGTERM)
    codes, seconds = life.wait()
    newest, made = life.newest(), life.logged()
    step = folder / "checkpoints" / str(newest)
    sealed = json.loads((step / "checksums.json").read_text())["files"]
    name = choose.choice(sorted(n for n in sealed if sealed[n]["bytes"]))
    change(step / name, choose)
    found = {"code": codes[0], "seconds": seconds}
    found |= _finish(runs, folder, life)
    assert f"{step / name} " in found["said"], found["said"]
    aside = step.with_name(f"{step.name}.corrupt")
    assert aside.is_dir() and str(aside) in found["said"]
    [used] = re.findall(r"step (\d+) is used", found["said"])
    return found | {"lost": made - int(used)}

  return row


def truncate(path: Path, choose: Choose) -> None:
  os.truncate(path, choose.randrange(1, max(2, path.stat().st_size)))


def flip(path: Path, choose: Choose) -> None:
  content = bytearray(path.read_bytes())
  content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
  path.write_bytes(content)


def empty(path: Path, choose: Choose) -> None:
  os.truncate(path, 0)


def disk_full(runs: Runs, folder: Path, choose: Choose) -> Row:
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
  done = subprocess.run(mount, capture_output=True, text=True)
  if done.returncode:
    return {"skipped": done.stderr.strip()}
  life = runs.start(folder)
  try:
    _moment(choose, life)
    ballast = folder / "ballast"
    _fill(ballast)
    # Some room, so that it is a save that fails, anywhere in its course.
    room = choose.randrange(0, 12) * 4096
    os.truncate(ballast, max(0, ballast.stat().st_size - room))
    began = time.monotonic()
    for _ in range(20):
      life.until(STEPS, timeout=0.1)
      # An old checkpoint that goes would leave room for all that come.
      _fill(ballast)
    codes, _ = life.wait()
    seconds = time.monotonic() - began
    assert "No space left" in life.said(), life.said()
    ballast.unlink()
    found = {"code": codes[0], "seconds": seconds}
    return found | _finish(runs, folder, life)
  finally:
    life.end()
    subprocess.run(["umount", str(folder)], check=True)


def _fill(ballast: Path) -> None:
  with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
    while True:
      file.write(bytes(4096))


def missing_data(runs: Runs, folder: Path, choose: Choose) -> Row:
  step = choose.randrange(EVERY, STEPS)
  life = runs.start(folder, broken=(step,))
  codes, seconds = life.wait()
  assert f"step {step + 1}: its batch, rows {step}.0" in life.said()
  assert f"no batch {step};" in life.said()
  found = {"code": codes[0], "seconds": seconds}
  return found | _finish(runs, folder, life)


def not_finite(runs: Runs, folder: Path, choose: Choose) -> Row:
  step = choose.randrange(EVERY, STEPS)
  life = runs.start(folder, poisoned=(step,))
  codes, seconds = life.wait()
  assert f"step {step + 1}: loss nan" in life.said(), life.said()
  found = {"code": codes[0], "seconds": seconds}
  return found | _finish(runs, folder, life)


def hang(runs: Runs, folder: Path, choose: Choose) -> Row:
  """Of one process of two: the other waits for it in a collective."""
  step = choose.randrange(EVERY, STEPS)
  life = runs.start(folder, hangs={1: step}, watchdog=2.0, **TWO)
  life.until(step)
  codes, seconds = life.wait()
  assert "watchdog: step" in "".join(map(life.said, (0, 1)))
  assert "most recent call first" in "".join(map(life.said, (0, 1)))
  # The first process to end takes the other with it.
  code = next(code for code in codes if code == 77)
  return {"code": code, "seconds": seconds} | _finish(runs, folder, life, **TWO)


ROWS: dict[str, Callable[[Runs, Path, Choose], Row]] = {
  "kill -9, first of two processes": _kill(0),
  "kill -9, second of two processes": _kill(1),
  "a process falls silent, of two": silent,
  "SIGTERM": _signal(signal.SIGTERM),
  "SIGTERM to one of two processes": _signal(signal.SIGTERM, **TWO),
  "SIGINT": _signal(signal.SIGINT),
  "disk full": disk_full,
  "truncated file": _damage(truncate),
  "bit-flipped file": _damage(flip),
  "empty file": _damage(empty),
  "goes on with half the devices": _devices(count=1, devices=2),
  "goes on with double the devices": _devices(count=2, devices=4),
  "data missing": missing_data,
  "loss not finite": not_finite,
  "a process hangs, of two": hang,
}


def run(repeats: int, only: str, seed: int, folder: Path) -> dict[str, Row]:
  """All rows; an assertion fails where a fault does not end as it should."""
  runs, found = Runs(folder), {}
  for name, row in ROWS.items():
    if only and not any(part in name for part in only.split(",")):
      continue
    made = []
    for repeat in range(repeats):
      choose = Choose(f"{seed} {name} {repeat}")
      made.append(
        row(runs, folder / f"{name}.{repeat}".replace(" ", "_"), choose)
      )
      print(f"{name}, {repeat + 1}: {_short(made[-1])}", file=sys.stderr)
    found[name] = _summary(made)
  return found


def _short(row: Row) -> str:
  return ", ".join(f"{k} {v}" for k, v in row.items() if k != "said")


def _summary(made: list[Row]) -> Row:
  if "skipped" in made[0]:
    return made[0]
  return {
    "repeats": len(made),
    "codes": sorted({row["code"] for row in made}),
    "seconds": round(max(row["seconds"] for row in made), 1),
    "lost": max(row["lost"] for row in made),
    "equal": sum(row["equal"] for row in made),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--only", default="", help="parts of names, by commas")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--json", type=Path)
  asked = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="calm_jax_faults_") as folder:
    found = run(asked.repeats, asked.only, asked.seed, Path(folder))
  if asked.json:
    asked.json.write_text(json.dumps(found))
  table = Table(
    "fault", "repeats", "exit codes", "ended after, s (max)",
    "steps lost (max)", "as if nothing had happened", title="Faults",
  )  # fmt: skip
  for name, row in found.items():
    if "skipped" in row:
      table.add_row(name, "skipped", row["skipped"])
      continue
    table.add_row(
      name, str(row["repeats"]), ", ".join(map(str, row["codes"])),
      str(row["seconds"]), str(row["lost"]),
      f"{row['equal']} of {row['repeats']}",
    )  # fmt: skip
  Console().print(table)


if __name__ == "__main__":
  main()
