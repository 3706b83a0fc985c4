"""Measures everything that matters on one GPU, in one table.

  python -m benchmarks.gpu [--minutes 7] [--json gpu.json] [--only decode]

Each row is a process of its own with a time limit, so that none holds memory
that another needs; a row that fails says why, and the rest goes on. Needed are
JAX with the package's dependencies and no network; rows of PyTorch need torch
and transformers, kernel tests need pytest. The models are the gemma pair of
benchmarks.pairs in bfloat16, without Gemma 2's soft cap where PyTorch's SDPA,
which has none, is compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import generate, machine, pairs, startup, steps
from calm_jax.composition.execution import Asked

ROOT = Path(__file__).parents[1]
DTYPE = "bfloat16"
Found = dict[str, float | str]


@dataclasses.dataclass(frozen=True)
class Row:
  """One measurement, made in a process of its own.

  Attributes:
    measure: makes it, with the options, and returns numbers by name.
    seconds: after which it is stopped.
  """

  measure: Callable[[argparse.Namespace], Found]
  seconds: int


def speeds(options) -> Found:
  """Measures the limits: a matmul, and a copy."""
  matmul = machine.make_matmul(options.matmul, DTYPE)
  copy = machine.make_copy(options.copy_megabytes)
  return {
    "device": jax.devices()[0].device_kind,
    "matmul_flops": max(matmul() for _ in range(3)),
    "copy_bytes": max(copy() for _ in range(3)),
  }


def kernels(options) -> Found:
  """Runs the tests of kernels, some of which need a GPU."""
  run = subprocess.run(
    [
      sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
      "tests/models/test_attention.py", "tests/models/test_joined.py",
    ],
    cwd=ROOT,
    env=os.environ
    | {
      "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
      # Else the reference rounds float32 to TensorFloat-32.
      "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    },
    capture_output=True,
    text=True,
  )  # fmt: skip
  lines = (run.stdout.strip() or run.stderr.strip()).splitlines()
  if run.returncode:
    failed = [line for line in lines if line.startswith("FAILED")]
    raise RuntimeError("; ".join([*failed, lines[-1]]))
  return {"result": lines[-1]}


def _training_pair(options):
  return pairs.pair(options.pair, attention_cap=None)


def train(options) -> Found:
  """Trains Θ_C by the package's step and defaults."""
  rows, length = options.shape
  spec = _training_pair(options).with_compute(lambda _: {"dtype": DTYPE})
  spec = pairs.chosen(spec, rows, length, Asked())
  run = steps.Timed(spec, rows, length)
  matmul = machine.make_matmul(options.matmul, DTYPE)
  got = steps.measure({"": run}, run.least, matmul, 5, time.perf_counter)[""]
  return got | {"temporary_bytes": run.temporary}


def train_torch(options) -> Found:
  """Trains Θ_C by the plainest PyTorch loop."""
  from benchmarks import torch_loop

  spec, (rows, length) = _training_pair(options), options.shape
  anchor, augmenting = pairs.jsons(options.pair)
  ((_, joined),) = spec.augmenting
  device = torch_loop.device()
  run = torch_loop.Loop(
    torch_loop.random_model(anchor, DTYPE, device),
    torch_loop.random_model(augmenting, DTYPE, device, head=False),
    joined.connections,
    steps.batch_of(rows, length, spec.anchor.vocab_size),
  )
  run()
  return {"seconds": float(np.median([run() for _ in range(5)]))}


def _decode(kind: str, rows: int, torch: bool = False):
  """Makes a row that decodes, the anchor alone and composed."""

  def measure(options) -> Found:
    chosen = [
      f"--pair={options.pair}", f"--dtype={DTYPE}", f"--rows={rows}",
      f"--quantise={kind}", f"--new={options.new}", "--bandwidth",
      f"--copy_megabytes={options.copy_megabytes}", "--repeats=3",
      "--torch" if torch else "--no-torch",
    ]  # fmt: skip
    found = generate.main(chosen)[rows]
    return {
      f"{name.split(',')[0]} {what}": number
      for name, numbers in found.items()
      for what, number in numbers.items()
      if what != "whole"
    }

  return measure


def _key_values(stage: str):
  """Makes a row that trains a stage of the key-value experiment."""

  def measure(options) -> Found:
    from calm_jax.experiments import recipe
    from calm_jax.experiments.config_files import read_settings
    from calm_jax.training.metrics import read_metrics
    from configs import kv

    config = kv.get_config("paper" if options.pair == "gemma" else "tiny")
    config.recipe, config.alternatives = (stage,), ()
    config.stages[stage].update(
      steps=60, warmup=5, log_every=20, eval_every=10**6
    )
    with tempfile.TemporaryDirectory() as folder:
      config.workdir = folder
      settings = read_settings(config)
      with recipe.make_trackers(settings) as trackers:
        run = recipe.run_recipe(settings, trackers)
      line = [x for x in read_metrics(Path(folder, stage)) if "loss" in x][-1]
      source = run.experiment.source(run.settings.last, run.untrained, 0)
      began, count = time.perf_counter(), 10
      slots = sum(source[i].anchor.tokens.size for i in range(count))
      pipeline = slots / (time.perf_counter() - began)
    return {
      "tokens_per_second": line["tokens_per_second"],
      "utilisation": line["utilisation"],
      "pipeline_tokens_per_second": pipeline,
    }

  return measure


def first_token(options) -> Found:
  """Starts processes until their first token, without and with programs."""
  del options
  with tempfile.TemporaryDirectory() as name:
    composed = startup.save_composition(Path(name))
    took = [
      startup.seconds_to_first_token(composed, Path(name, "cache"))
      for _ in range(2)
    ]
  return {"cold": took[0], "cached": took[1], "ratio": took[1] / took[0]}


ROWS = {
  "speeds": Row(speeds, 60),
  "kernels": Row(kernels, 120),
  "train": Row(train, 180),
  "train, PyTorch": Row(train_torch, 120),
  "decode 1": Row(_decode("", 1), 120),
  "decode 8": Row(_decode("", 8), 120),
  "decode 1 int8": Row(_decode("int8", 1), 120),
  "decode 1 int4": Row(_decode("int4", 1), 120),
  "decode 1, transformers": Row(_decode("", 1, torch=True), 180),
  "key-value m_A": Row(_key_values("augmenting"), 120),
  "key-value m_B": Row(_key_values("anchor"), 120),
  "first token": Row(first_token, 120),
}


def in_a_process(name: str, options, seconds: float) -> Found:
  """Makes a row in a process of its own; {"failed": why} if it fails."""
  command = [
    sys.executable, "-m", "benchmarks.gpu", f"--row={name}",
    f"--pair={options.pair}",
  ]  # fmt: skip
  try:
    run = subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
  except subprocess.TimeoutExpired:
    return {"failed": f"not done after {seconds:.0f} s"}
  if run.returncode:
    lines = run.stderr.strip().splitlines() or [f"exit {run.returncode}"]
    return {"failed": lines[-1]}
  return json.loads(run.stdout.splitlines()[-1])


def ratios(found: dict[str, Found]) -> dict[str, tuple[float, str]]:
  """Computes the ratios that have a goal, of the rows that were made."""
  goals = {
    "training, of a matmul": (("train", "share"), None, ">= 0.55"),
    "training, PyTorch's time over ours": (
      ("train, PyTorch", "seconds"), ("train", "seconds"), ">= 1.5",
    ),
    "decoding 1 row, of a copy": (
      ("decode 1", "anchor alone share"), None, ">= 0.70",
    ),
    "decoding 8 rows, of a copy": (
      ("decode 8", "anchor alone share"), None, ">= 0.70",
    ),
    "composed over the anchor alone, 1 row": (
      ("decode 1", "composed token"), ("decode 1", "anchor alone token"),
      "<= 1.15",
    ),
    "bfloat16's time over int8's": (
      ("decode 1", "anchor alone token"),
      ("decode 1 int8", "anchor alone token"), ">= 1.6",
    ),
    "bfloat16's time over int4's": (
      ("decode 1", "anchor alone token"),
      ("decode 1 int4", "anchor alone token"), "",
    ),
    "key-value m_A, of the peak": (
      ("key-value m_A", "utilisation"), None, ">= 0.25",
    ),
    "key-value m_B, of the peak": (
      ("key-value m_B", "utilisation"), None, ">= 0.25",
    ),
    "first token, cached over cold": (
      ("first token", "ratio"), None, "<= 0.33",
    ),
  }  # fmt: skip
  made = {}
  for name, (above, below, goal) in goals.items():
    values = [
      found.get(row, {}).get(number)
      for row, number in filter(None, (above, below))
    ]
    if None not in values:
      made[name] = (values[0] / (values[1] if below else 1), goal)
  return made


def show(found: dict[str, Found]) -> None:
  """Prints what was found, then the ratios."""
  table = Table("row", "found", title="on this GPU")
  for name, numbers in found.items():
    cells = [
      f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
      for key, value in numbers.items()
    ]
    table.add_row(name, "\n".join(cells))
  Console().print(table)
  table = Table("ratio", "", "goal")
  for name, (ratio, goal) in ratios(found).items():
    table.add_row(name, f"{ratio:.3f}", goal)
  Console().print(table)


def main(arguments: list[str] | None = None) -> dict[str, Found]:
  """Makes all rows, or with --row one of them in this process."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--minutes", type=float, default=7)
  parser.add_argument("--json", default="gpu.json", help="file to write")
  parser.add_argument("--only", default="", help="rows whose names hold this")
  parser.add_argument("--pair", choices=pairs.PAIRS, default="gemma")
  parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
  options = parser.parse_args(arguments)
  is_full = options.pair == "gemma"
  options.shape = (4, 2048) if is_full else (2, 16)
  options.new = 208 if is_full else 48
  options.copy_megabytes = 512 if is_full else 1
  options.matmul = machine.matmul_size() if is_full else 64
  if options.row:
    found = ROWS[options.row].measure(options)
    print(json.dumps(found))
    return {options.row: found}
  until = time.monotonic() + 60 * options.minutes
  found = {}
  for name, row in ROWS.items():
    if options.only not in name:
      continue
    left = until - time.monotonic()
    if left < 10:
      found[name] = {"failed": f"no time left of {options.minutes} minutes"}
      continue
    found[name] = in_a_process(name, options, min(left, row.seconds))
    print(f"{name}: {found[name]}", flush=True)
    # After each row, so that nothing is lost if the machine goes.
    Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
  show(found)
  return found


if __name__ == "__main__":
  main()
