"""Measures the time to compile a training step, and how it grows with depth.

  python -m benchmarks.compile_time [--width 256] [--repeats 3]

Layers run in a scan, so 48 should cost about what 12 do; the target is a
ratio of 1.5 at most. A connection ends one scan and begins another, in both
models, so that time grows with their number.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from calm_jax.composition import cross_attention, forward
from calm_jax.composition.connections import (
  Augmenting,
  Composition,
  default_connections,
)
from calm_jax.core.batch import plain_batch
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig
from calm_jax.training import loss as loss_lib

# (layers of the anchor, connections); ratios are to the first.
SHAPES = ((12, 2), (48, 2), (12, 4), (12, 8))
TARGET = 1.5


def model(width: int, layers: int) -> ModelConfig:
  return ModelConfig(
    vocab_size=1000,
    width=width,
    num_layers=layers,
    num_heads=4,
    num_kv_heads=4,
    head_dim=width // 4,
    mlp_width=3 * width,
  )


def seconds(width: int, layers: int, connections: int) -> float:
  """Traces, lowers and compiles the step once; nothing is allocated."""
  augmenting = model(width // 2, 8)
  joined = Augmenting(augmenting, default_connections(8, layers, connections))
  spec = Composition(model(width, layers), (("kv", joined),))
  frozen = {
    "anchor": decoder.param_shapes(spec.anchor),
    "augmenting": {"kv": decoder.param_shapes(augmenting)},
  }
  theta = cross_attention.param_shapes(spec)

  def loss(theta, frozen, tokens):
    logits, _ = forward.forward(
      frozen | {"composition": theta}, spec, plain_batch(tokens)
    )
    weights = jnp.ones(tokens.shape, jnp.float32)
    return loss_lib.cross_entropy(logits, tokens, weights)[0].sum()

  tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
  step = jax.jit(jax.value_and_grad(loss))
  start = time.perf_counter()
  step.lower(theta, frozen, tokens).compile()
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--repeats", type=int, default=3)
  options = parser.parse_args()
  # The first compilation also starts the backend.
  seconds(options.width, 2, 2)
  # Shapes take turns, and the best counts: the machine may be busy.
  rounds = []
  for _ in range(options.repeats):
    jax.clear_caches()
    rounds.append([seconds(options.width, *shape) for shape in SHAPES])
  best = [min(times) for times in zip(*rounds, strict=True)]
  table = Table("layers", "connections", "seconds", "ratio")
  for (layers, connections), taken in zip(SHAPES, best, strict=True):
    ratio = f"{taken / best[0]:.2f}"
    if layers != SHAPES[0][0]:
      ratio += f" (target {TARGET} at most)"
    table.add_row(f"{layers}", f"{connections}", f"{taken:.2f}", ratio)
  Console().print(table)


if __name__ == "__main__":
  main()
