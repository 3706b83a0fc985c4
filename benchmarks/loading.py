"""Measures memory and time of loading a sharded checkpoint.

  python -m benchmarks.loading [--gigabytes 2] [--shards 4] [--folder DIR]

Writes a random Llama of that size in bfloat16, and loads it in fresh
processes: whose peak of resident memory, less what the same process needs
before it loads, should be at most 1.25 times the model. Cold: the files are
dropped from the page cache first (posix_fadvise), so that the disk is read;
its own speed is that of reading the same files in order by the same means.
Targets hold for bfloat16 and cold files. Growth is that of --gigabytes: depth
and width count only as bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from calm_jax.core import hub
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families, tensor_tables, weight_files

MEMORY, SPEED = 1.25, 0.5
CHUNK = 16 << 20

LOAD = """
import resource, sys, time
import jax
import calm_jax
jax.device_put(jax.numpy.zeros(8)).block_until_ready()  # starts the backend
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start, cpu = peak(), time.perf_counter(), time.process_time()
model = calm_jax.load_model(sys.argv[1], sys.argv[2])
jax.block_until_ready(model.params)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
size = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(before, peak(), seconds, size, cpu)
"""


def llama(gigabytes: float) -> ModelConfig:
  """A Llama of about that size in bfloat16."""
  width, vocab = 2048, 32_000
  # 4 D^2 of attention and 3 x 2.75 D^2 of the MLP; embedding and head.
  layer = 12.25 * width**2
  layers = round((gigabytes * 1e9 / 2 - 2 * vocab * width) / layer)
  return ModelConfig(
    vocab_size=vocab,
    width=width,
    num_layers=max(layers, 1),
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    mlp_width=width * 11 // 4,
  )


def write(folder: pathlib.Path, gigabytes: float, shards: int) -> int:
  """Writes the checkpoint, never whole in memory; returns its bytes."""
  config = llama(gigabytes)
  random = np.random.default_rng(0)
  noise = random.integers(0, 1 << 14, 1 << 22, np.uint16)
  shapes = {
    name: parts[0].shape
    for name, parts in tensor_tables.entries(
      tensor_tables.FAMILIES["llama"], config
    ).items()
  }
  size = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
  bfloat16 = weight_files.FLOATS["BF16"]
  weight_files.write_tensors(
    folder,
    shapes,
    "bfloat16",
    lambda name: np.resize(noise, shapes[name]).view(bfloat16),
    # The last shard is the smallest: tensors are not cut.
    int(size / (shards - 0.1)),
  )
  text = json.dumps(families.to_hf(config, "bfloat16"))
  (folder / hub.CONFIG).write_text(text)
  return size


def drop_from_cache(files: list[pathlib.Path]) -> None:
  for file in files:
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def read_in_order(files: list[pathlib.Path]) -> float:
  """Seconds to read the files and do nothing with them."""
  buffer = np.empty(CHUNK, np.uint8)
  start = time.perf_counter()
  for path in files:
    with path.open("rb", buffering=0) as file:
      while file.readinto(buffer):
        pass
  return time.perf_counter() - start


def load(folder: pathlib.Path, dtype: str) -> list[float]:
  """[bytes before, peak bytes, seconds, bytes of the model, CPU seconds]."""
  run = subprocess.run(
    [sys.executable, "-c", LOAD, str(folder), dtype],
    check=True,
    capture_output=True,
    text=True,
  )
  return [float(x) for x in run.stdout.split()]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--gigabytes", type=float, default=2.0)
  parser.add_argument("--shards", type=int, default=4)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--folder", help="on the disk to be measured")
  options = parser.parse_args()
  table = Table(
    "files", "dtype", "model GB", "peak GB", f"<= {MEMORY}", "disk GB/s",
    "load GB/s", f">= {SPEED}", "CPU s",
  )  # fmt: skip
  with tempfile.TemporaryDirectory(dir=options.folder) as name:
    folder = pathlib.Path(name)
    size = write(folder, options.gigabytes, options.shards)
    files = weight_files.weight_files(folder)
    for state in ("cold", "warm"):
      for dtype in ("bfloat16", "float32"):
        # Taking turns, and the best of each: the machine may be busy.
        disk, loads = [], []
        for _ in range(options.repeats):
          if state == "cold":
            drop_from_cache(files)
          disk.append(read_in_order(files))
          if state == "cold":
            drop_from_cache(files)
          loads.append(load(folder, dtype))
        before, peak, _, held, _ = max(loads, key=lambda found: found[1])
        seconds = min(found[2] for found in loads)
        speeds = size / min(disk) / 1e9, size / seconds / 1e9
        numbers = (
          held / 1e9, (peak - before) / 1e9, (peak - before) / held,
          *speeds, speeds[1] / speeds[0], min(found[4] for found in loads),
        )  # fmt: skip
        table.add_row(state, dtype, *(f"{x:.2f}" for x in numbers))
  console = Console()
  console.print(f"{len(files)} shards, baseline {before / 1e9:.2f} GB")
  console.print(table)


if __name__ == "__main__":
  main()
