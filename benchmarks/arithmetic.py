"""Measures how many expressions of the key-value data one core makes a second.

  python -m benchmarks.arithmetic

Counts the expressions that land in batches, tokens, targets and packing
included, per second of this process's CPU time.
"""

import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from calm_jax.data.key_value_source import KeyValueSource
from calm_jax.data.key_value_text import TASKS, train_tokenizer
from calm_jax.data.key_values import ExpressionOptions, make_dictionary

GOAL = 50_000
SIZES = {
  "999 keys, 2 terms, +-": (999, 2, 2, "+-"),
  "25,000 keys, 3 to 6 terms, +-*": (25_000, 3, 6, "+-*"),
}


def expressions_per_second(size, task: str, folder: Path) -> float:
  """The rate of one task over about two seconds."""
  num_keys, low, high, operators = size
  kv = make_dictionary(num_keys, 0.2, seed=0)
  source = KeyValueSource(
    kv,
    train_tokenizer(kv, folder / "tokenizer"),
    {task: 1.0},
    ExpressionOptions(low, high, operators),
    seed=0,
    batch_size=256,
    length=128,
  )
  count, batch, began = 0, 0, time.process_time()
  while time.process_time() - began < 2:
    # The examples of a row are numbered from 1.
    count += source[batch].anchor.segments.max(axis=1).sum()
    batch += 1
  return count / (time.process_time() - began)


def main():
  table = Table("size", "task", "expressions/s", f"ratio to {GOAL:,}")
  with tempfile.TemporaryDirectory() as folder:
    for name, size in SIZES.items():
      for task in TASKS:
        rate = expressions_per_second(size, task, Path(folder))
        table.add_row(name, task, f"{rate:,.0f}", f"{rate / GOAL:.1f}")
  Console().print(table)


if __name__ == "__main__":
  main()
