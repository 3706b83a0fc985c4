"""The smallest runs of the training loop, for tests and for kill_driver."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import helpers
import jax
import numpy as np
from jax.experimental.compilation_cache import (
  compilation_cache as compilation_cache_lib,
)

from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.core import trees
from calm_jax.core.batch import Batch
from calm_jax.data import packing
from calm_jax.training import trainer
from calm_jax.training.stage import Stage
from calm_jax.training.trackers import Trackers

SHAPE = {
  "vocab_size": 17, "width": 8, "num_layers": 2, "num_heads": 2,
  "num_kv_heads": 1, "head_dim": 4, "mlp_width": 8, "max_length": 64,
}  # fmt: skip
LENGTH = 6


def compose(dtype: str = "float32") -> tuple[Composition, dict]:
  """Two models of two layers and one connection, with a fresh Θ_C."""
  anchor, anchor_params = helpers.model(1, **SHAPE, dtype=dtype)
  other, other_params = helpers.model(2, **SHAPE, dtype=dtype)
  spec = Composition(anchor, (("kv", Augmenting(other, (Connection(2, 1),))),))
  params = {
    "anchor": anchor_params,
    "augmenting": {"kv": other_params},
    "composition": cross_attention.init(jax.random.key(3), spec),
  }
  return spec, params


class Source:
  """Ragged random rows; `broken` raise when read, `poisoned` are NaN."""

  def __init__(self, *, batch_size=8, broken=(), poisoned=(), name="tests"):
    self.batch_size, self.broken, self.poisoned = batch_size, broken, poisoned
    self.fingerprint = f"{name} {batch_size}"

  def __len__(self) -> int:
    return 1000

  def __getitem__(self, index: int) -> Batch:
    if index in self.broken:
      raise OSError(f"no batch {index}")
    random = np.random.default_rng(index)
    rows = np.arange(self.batch_size)
    lengths = random.integers(2, LENGTH + 1, self.batch_size)
    tokens = random.integers(0, SHAPE["vocab_size"], lengths.sum())
    batch = packing.make_batch(
      packing.TokenLists(tokens, lengths),
      random.integers(1, lengths),
      rows,
      batch_size=self.batch_size,
      length=LENGTH,
    )
    if index in self.poisoned:
      batch.weights[0] = np.nan
    return batch

  def describe(self, index: int) -> str:
    return f"rows {index}.0 to {index}.{self.batch_size - 1} of tests"


def stage(**changes) -> Stage:
  """Six steps, a checkpoint after every second."""
  return Stage(
    **{
      "steps": 6, "batch_size": 8, "length": LENGTH, "warmup": 1,
      "log_every": 1, "eval_every": 3, "checkpoint_every": 2,
      "learning_rate": 1e-2,
    }
    | changes
  )  # fmt: skip


def tracked(directory: Path, names: str = "jsonl", steps: int = 0):
  """Trackers of a run whose only stage is in its own folder."""
  if jax.process_index() != 0:
    return Trackers()
  return Trackers(names, directory, {}, {"compose": steps})


@dataclasses.dataclass
class Run:
  """The arguments of `trainer.run_stage` that tests do not care about."""

  directory: Path
  stage: Stage = dataclasses.field(default_factory=stage)
  source: Source = dataclasses.field(default_factory=Source)
  dtype: str = "float32"
  eval_batches: tuple = ()
  seed: int = 0
  profile: str = ""
  trackers: str = "jsonl"

  def __post_init__(self):
    self.spec, self.params = compose(self.dtype)

  def __call__(self) -> dict:
    """Runs the stage; returns the whole tree."""
    return self.result()[0]

  def result(self) -> tuple:
    """Runs the stage; returns the whole tree and the cost."""
    with tracked(self.directory, self.trackers, self.stage.steps) as log:
      return trainer.run_stage(
        "compose",
        self.stage,
        self.spec,
        self.params,
        self.source,
        list(self.eval_batches),
        self.directory,
        log,
        origins={"anchor": "models/anchor"},
        seed=self.seed,
        profile=self.profile,
      )


def leaves(params: dict) -> dict[str, np.ndarray]:
  """By name, as numpy."""
  return {n: np.asarray(x) for n, x in trees.flatten(params).items()}


@contextlib.contextmanager
def compilation_cache(directory):
  """Programs compiled within are kept: a run that starts again is quick."""
  changes = {
    "jax_compilation_cache_dir": str(directory),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in changes}
  for name, value in changes.items():
    jax.config.update(name, value)
  compilation_cache_lib.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache_lib.reset_cache()
