"""Measures tokens a second of the data pipeline, and of the step that it feeds.

  python -m benchmarks.data [--repeats 5]
  python -m benchmarks.data --kv

Packed rows through `BatchIterator`, for a pair that shares a tokenizer, one
that does not, and a mixture of plain text and prompts for the latter. The
training step is the composition's, of the small pair of benchmarks.pairs.
Tokenisation comes once, when a run starts, and is timed apart. Nothing of the
text is real: words of random letters, the frequent ones short. Growth is not
measured: a token costs the pipeline the same whatever models and shapes are.

--kv measures the stages of configs/kv.py:paper instead, without a step: what
the pipeline could feed to a device.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import pairs, steps
from benchmarks.pairs import NAME, V
from calm_jax.composition.connections import Composition
from calm_jax.data import pipeline
from calm_jax.data.documents import RowOptions
from calm_jax.data.examples import TextExample
from calm_jax.experiments import config_files
from calm_jax.experiments.key_values import KeyValueExperiment
from calm_jax.text.alignment import ChunkEncoder
from calm_jax.text.tokenizer import Tokenizer, train_sentencepiece
from configs import kv

GOAL = 10
BATCH, LENGTH = 8, 256
BATCHES, LARGE = 300, 40  # of which a rate is; LARGE of the key-value task


def texts(count: int) -> list[str]:
  """Lines of 40 words out of 20,000, by Zipf's law."""
  rng = np.random.default_rng(0)
  letters = np.array(list("etaoinshrdlucmfwypvbgk"))
  words = [
    "".join(rng.choice(letters, 2 + int(rank**0.2))) for rank in range(20_000)
  ]
  chances = 1 / np.arange(1, len(words) + 1)
  drawn = rng.choice(words, (count, 40), p=chances / chances.sum())
  return [" ".join(line) for line in drawn]


def make_step(spec: Composition) -> Callable:
  """batch -> the loss of one update of the composition."""
  step, make = steps.parts(spec)
  state, frozen = make()

  def update(batch):
    nonlocal state
    state, metrics = step(state, frozen, batch)
    return metrics["loss"].block_until_ready()

  return update


def tokens_of(batch) -> int:
  return int((batch.anchor.segments > 0).sum())


def pipeline_rate(source, batches: int = BATCHES) -> float:
  """Tokens of the anchor a second, read ahead as in training."""
  iterator = pipeline.BatchIterator(source)
  next(iterator)
  began, tokens = time.perf_counter(), 0
  for _ in range(batches):
    tokens += tokens_of(next(iterator))
  rate = tokens / (time.perf_counter() - began)
  iterator.close()
  return rate


def step_rate(step: Callable, source, index: int) -> float:
  batch = source[index]
  began = time.perf_counter()
  step(batch)
  return tokens_of(batch) / (time.perf_counter() - began)


def sources(lines: list[str], anchor: Tokenizer, other: Tokenizer) -> dict:
  """By name: (source, tokens a second of its tokenisation)."""
  plain = [
    TextExample("", line, f"line {i}") for i, line in enumerate(lines[::2])
  ]
  asked = [
    TextExample(line[:80], line[80:], f"line {i}")
    for i, line in enumerate(lines[1::2])
  ]
  alone = RowOptions(tokenizer=anchor, batch_size=BATCH, length=LENGTH, seed=0)
  both = dataclasses.replace(alone, augmenting={NAME: ChunkEncoder(other)})
  all_parts = {"": (plain + asked, 1.0)}
  mixture = {"plain": (plain, 3.0), "asked": (asked, 1.0)}
  made = {}
  for name, parts, options in (
    ("one tokenizer", all_parts, alone),
    ("two tokenizers", all_parts, both),
    ("two tokenizers, a mixture", mixture, both),
  ):
    began = time.perf_counter()
    source = pipeline.text_source(parts, options)
    seconds = time.perf_counter() - began
    tokens = sum(part.tokens for part in source.truncation.values())
    made[name] = source, tokens / seconds
  return made


def report_key_values(repeats: int) -> None:
  """Prints tokens a second of the key-value experiment's batches."""
  settings = config_files.read_settings(kv.get_config("paper"))
  with tempfile.TemporaryDirectory() as folder:
    task = KeyValueExperiment(settings.task, settings.seed, Path(folder), {})
  table = Table("stage", "shape", "tokens/s")
  for name in settings.recipe:
    stage = settings.stages[name]
    source = task.source(stage, None, settings.seed)
    rates = [pipeline_rate(source, LARGE) for _ in range(repeats)]
    shape = f"{stage.batch_size} x {stage.length}"
    table.add_row(name, shape, f"{statistics.median(rates):,.0f}")
  Console().print(table)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--kv", action="store_true")
  options = parser.parse_args()
  repeats = options.repeats
  if options.kv:
    report_key_values(repeats)
    return
  lines = texts(4000)
  with tempfile.TemporaryDirectory() as folder:
    anchor, other = (
      train_sentencepiece(lines, Path(folder) / f"{size}", vocab_size=size)
      for size in (V, 2000)
    )
    made = sources(lines, anchor, other)
  step = make_step(pairs.small())
  for source, _ in made.values():
    step(source[0])  # compiles
  rates: dict[str, list] = {name: [] for name in made}
  for i in range(repeats):
    # They take turns, so that a busy machine slows all of them.
    for name, (source, _) in made.items():
      rates[name].append((pipeline_rate(source), step_rate(step, source, i)))
  table = Table(
    "tokens/s", "tokenised once", "pipeline", "training step", "ratio",
    f"goal {GOAL}",
  )  # fmt: skip
  for name, (_, tokenised) in made.items():
    fed, step_speed = map(statistics.median, zip(*rates[name], strict=True))
    ratio = fed / step_speed
    table.add_row(
      name,
      f"{tokenised:,.0f}",
      f"{fed:,.0f}",
      f"{step_speed:,.0f}",
      f"{ratio:,.0f}",
      "reached" if ratio >= GOAL else "missed",
    )
  Console().print(table)


if __name__ == "__main__":
  main()
