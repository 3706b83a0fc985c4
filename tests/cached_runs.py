"""Small runs on cached states, for tests; as a program, killed ones.

  python tests/cached_runs.py WORKDIR PROGRAMS FILES ...

runs a stage whose states are cached, killed for each FILES as soon as it has
written so many files of states, and then to its end. Standard output gets a
JSON line for each life.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import tiny

from calm_jax.data import packing
from calm_jax.data.rows import Epochs, RowTable, TextSource
from calm_jax.data.segments import Aligned, Segments, Truncation
from calm_jax.training import state_cache
from calm_jax.training.state_store import StateStore

LENGTH, OTHER_LENGTH, STEPS = 12, 16, 12


def source(
  *,
  examples: int = 60,
  names: tuple[str, ...] = (),
  share: tuple[int, int] = (0, 1),
  batch_size: int = 8,
) -> TextSource:
  """Packed random examples; the models of these names read other tokens."""
  random = np.random.default_rng(0)

  def tokens(lengths):
    return random.integers(0, tiny.SHAPE["vocab_size"], lengths.sum())

  lengths = random.integers(2, LENGTH // 2 + 3, examples)
  augmenting = {}
  for name in names:
    own = random.integers(1, OTHER_LENGTH // 2 + 1, examples)
    # All of its tokens are seen by the last of the anchor's.
    seen = -(-np.repeat(own, lengths) * (packing.ragged_range(lengths) + 1)
             // np.repeat(lengths, lengths))  # fmt: skip
    augmenting[name] = Aligned(tokens(own).astype(np.int32), own, seen)
  segments = Segments(
    tokens(lengths).astype(np.int32),
    lengths,
    random.integers(1, lengths),
    tuple(f"example {i}" for i in range(examples)),
    Truncation(examples, int(lengths.sum())),
    augmenting,
  )
  table = RowTable(
    {"": segments},
    length=LENGTH,
    augmenting_length=OTHER_LENGTH if names else 0,
    pack=True,
  )
  return TextSource(
    table,
    Epochs(table.ranges[""], 0),
    batch_size=batch_size,
    seed=0,
    rows=packing.host_rows(batch_size, *share),
    weights={},
    truncation={"": segments.truncation},
  )


class Stopping:
  """A source that has no batch of one number."""

  def __init__(self, made: TextSource, at: int):
    self.made, self.at = made, at

  def __len__(self) -> int:
    return len(self.made)

  def __getitem__(self, index: int) -> packing.Batch:
    if index == self.at:
      raise OSError(f"no batch {index}")
    return self.made[index]

  def __getattr__(self, name: str):
    return getattr(self.made, name)


def run(directory: Path, kind: str, made=None, **changes) -> dict:
  """A stage on cached states, or without a cache; returns the whole tree."""
  stage = tiny.stage(
    steps=STEPS, length=LENGTH, cache_states=kind, checkpoint_every=5, **changes
  )
  return tiny.Run(directory, stage, made or source())()


def run_in_many_files(workdir: Path) -> dict:
  """Takes long enough to be killed while the states are written."""
  state_cache.StateStore = functools.partial(StateStore, shard_bytes=300)
  return run(workdir, "float32")


def _files(workdir: Path, kind: str) -> int:
  return len(list((workdir / "states" / "kv").glob(f"*.{kind}")))


def _life(workdir: Path, programs: Path, more: int) -> dict:
  """One process, killed when it has written `more` files; to its end for 0."""
  before = _files(workdir, "index")
  pid = os.fork()
  if pid == 0:
    code = 1
    try:
      with tiny.compilation_cache(programs):
        run_in_many_files(workdir)
      code = 0
    finally:
      sys.stdout.flush()
      os._exit(code)
  while more and _files(workdir, "index") < before + more:
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
      break
    time.sleep(0.0005)
  if more:
    os.kill(pid, signal.SIGKILL)
  _, status = os.waitpid(pid, 0)
  return {
    "exit": os.waitstatus_to_exitcode(status),
    "before": before,
    "after": _files(workdir, "index"),
    "half": _files(workdir, "tmp"),
  }


def main() -> None:
  workdir, programs, *files = sys.argv[1:]
  for more in (*map(int, files), 0):
    print(json.dumps(_life(Path(workdir), Path(programs), more)), flush=True)


if __name__ == "__main__":
  main()
