"""Seconds to compile a composition's training step, by depth of the anchor.

  python -m benchmarks.compile_time [--width 256] [--repeats 3]

Layers run in a scan, so 48 should cost about what 12 do; the target is a
ratio of 1.5 at most.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp

from calm_jax import composition, losses
from calm_jax.connections import Augmenting, Composition, Connection
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig

DEPTHS = (12, 48)
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


def seconds(width: int, layers: int) -> float:
  """Traces, lowers and compiles the step once; nothing is allocated."""
  augmenting = model(width // 2, 8)
  connections = (Connection(4, layers // 2), Connection(8, layers))
  joined = Augmenting(augmenting, connections)
  spec = Composition(model(width, layers), (("kv", joined),))
  frozen = {
    "anchor": decoder.param_shapes(spec.anchor),
    "augmenting": {"kv": decoder.param_shapes(augmenting)},
  }
  theta = jax.eval_shape(lambda: composition.init(jax.random.key(0), spec))

  def loss(theta, frozen, tokens):
    logits, _ = composition.forward(
      frozen | {"composition": theta}, spec, composition.plain_sequence(tokens)
    )
    weights = jnp.ones(tokens.shape, jnp.float32)
    return losses.cross_entropy(logits, tokens, weights)[0].sum()

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
  seconds(options.width, 2)  # the first compilation also starts the backend
  # Depths take turns, and the best counts: the machine may be busy.
  rounds = []
  for _ in range(options.repeats):
    jax.clear_caches()
    rounds.append([seconds(options.width, depth) for depth in DEPTHS])
  best = [min(times) for times in zip(*rounds, strict=True)]
  for depth, time_taken in zip(DEPTHS, best, strict=True):
    print(f"{depth} layers: {time_taken:.2f} s")
  print(f"ratio {best[1] / best[0]:.2f}, target {TARGET} at most")


if __name__ == "__main__":
  main()
