"""Measures seconds from the start of a process to the first token.

  python -m benchmarks.startup

A composition of 51 M and 10 M parameters with random weights is saved, and
`python -m calm_jax.generate` continues a prompt with it in one process after
another. The first compiles; the others find its programs in the cache, and
should take less than a third of its time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

import calm_jax
from benchmarks.pairs import V, model
from calm_jax.models import decoder
from calm_jax.models.hf import export
from calm_jax.text.tokenizer import train_sentencepiece

GOAL = 1 / 3


def save_composition(folder: Path) -> Path:
  """Random models that share a tokenizer, and their composition."""
  init = jax.jit(decoder.init, static_argnums=1)
  texts = [f"{i} some words of number {i * i}" for i in range(500)]
  for name, shape in (
    ("anchor", (512, 12, 1632)), ("augmenting", (256, 8, 600))
  ):  # fmt: skip
    config = model(*shape)
    params = init(jax.random.key(0), config)
    export.save_params(folder / name, config, params)
    # Every id that the random weights may pick spells something.
    train_sentencepiece(
      texts,
      folder / name / "tokenizer",
      vocab_size=V,
      user_defined_symbols=[f"word{i}_" for i in range(V - 60)],
    )
  anchor, augmenting = (
    calm_jax.load_model(folder / name) for name in ("anchor", "augmenting")
  )
  calm_jax.compose(anchor, augmenting).save(folder / "composed")
  return folder / "composed"


def seconds_to_first_token(composed: Path, cache: Path) -> float:
  began = time.perf_counter()
  with subprocess.Popen(
    [
      sys.executable, "-m", "calm_jax.generate", f"--model={composed}",
      "--prompt=some words", "--max_new_tokens=4",
    ],
    env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
    stdout=subprocess.PIPE,
  ) as process:  # fmt: skip
    process.stdout.read(1)
    took = time.perf_counter() - began
    process.stdout.read()
  if process.returncode:
    raise RuntimeError(f"generate ended with {process.returncode}")
  return took


def main():
  table = Table("start", "first token, s", "of the first start")
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    composed = save_composition(folder)
    took = [seconds_to_first_token(composed, folder / "cache") for _ in "123"]
  for i, seconds in enumerate(took, start=1):
    table.add_row(str(i), f"{seconds:.1f}", f"{seconds / took[0]:.2f}")
  Console().print(table)
  print(f"goal: at most {GOAL:.2f} from the second on")


if __name__ == "__main__":
  main()
