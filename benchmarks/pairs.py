"""Builds the pairs of models that the benchmarks measure, with random weights.

"small" is 51 M and 10 M parameters, plain decoders. "gemma" has the shapes of
Gemma-2-2b and Gemma-3-270m (configs/shapes), and "tiny" is the same families
at a size for tests. Gemma-3's own vocabulary has 262,144 tokens; here it has
the anchor's 256,000, so that both models read the same tokens.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from calm_jax.composition import cross_attention, execution
from calm_jax.composition.connections import (
  Augmenting,
  Composition,
  default_connections,
)
from calm_jax.models import attention, decoder
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families

SHAPES = Path(__file__).parents[1] / "configs" / "shapes"
PAIRS = ("small", "gemma", "tiny")
V = 8192  # of the small pair
NAME = "augmenting"
_TINY = {
  "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96,
  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
  "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
}  # fmt: skip
_SMALLER = {
  "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
  "sliding_window_pattern": 2,
}  # fmt: skip


def model(width: int, layers: int, mlp_width: int) -> ModelConfig:
  return ModelConfig(
    vocab_size=V,
    width=width,
    num_layers=layers,
    num_heads=8,
    num_kv_heads=8,
    head_dim=width // 8,
    mlp_width=mlp_width,
  )


def small(deep: int = 1, wide: int = 1, connections: int = 0) -> Composition:
  """51 M parameters and 10 M beside them, or more; Θ_C at each 4th layer."""
  return join(
    model(512 * wide, 12 * deep, 1632 * wide),
    model(256 * wide, 8 * deep, 600 * wide),
    connections,
  )


def jsons(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """The config.json of the anchor and of the augmenting model of a pair."""
  if name == "small":
    spec = small()
    both = spec.anchor, dict(spec.augmenting)[NAME].config
    return tuple(families.to_hf(config, "float32") for config in both)
  anchor, other = (
    json.loads((SHAPES / f"{file}.json").read_text())
    for file in ("gemma2-2b", "gemma3-270m")
  )
  if name == "tiny":
    anchor, other = anchor | _TINY, other | _TINY | _SMALLER
  return anchor, other | {"vocab_size": anchor["vocab_size"]}


def pair(name: str, **changes: Any) -> Composition:
  """Builds one of PAIRS, with the connections that it has by default.

  Args:
    name: of the pair.
    **changes: fields of `ModelConfig` that are changed in both models.
  """
  # Else the tiny one would have a single connection.
  connections = 2 if name == "tiny" else 0
  models = (
    dataclasses.replace(families.from_hf(config), **changes)
    for config in jsons(name)
  )
  return join(*models, connections)


def join(
  anchor: ModelConfig, other: ModelConfig, connections: int = 0
) -> Composition:
  """Composes two models, at `connections` or the default number of them."""
  pairs = default_connections(
    other.num_layers, anchor.num_layers, connections or None
  )
  return Composition(anchor, ((NAME, Augmenting(other, pairs)),))


def computed(spec: Composition, kernel: str = "xla", **how: Any) -> Composition:
  """The pair with `how` it is computed, fields of `Compute`.

  Args:
    spec: the pair.
    kernel: of attention, see `attention.choose`; by the first device.
    **how: other fields, of both models.
  """

  spec = spec.with_compute(lambda _: how)
  models = {"anchor": spec.anchor}
  models |= {f"augmenting/{n}": a.config for n, a in spec.augmenting}
  device = jax.devices()[0]
  return spec.with_compute(
    lambda part: {"attention": attention.choose(kernel, device, models[part])}
  )


def chosen(
  spec: Composition, rows: int, length: int, asked: execution.Asked
) -> Composition:
  """Returns the pair as a run would train it here on `rows` x `length`."""
  shapes = jax.eval_shape(lambda: parameters(spec, "float32"))
  composition = shapes.pop("composition")
  resident = execution.resident_bytes(composition, shapes)
  work = execution.Work("composed", rows, length, resident, packed=False)
  device = execution.Device.here()
  return execution.for_training(spec, asked, device, work)


def parameters(spec: Composition, dtype: str) -> dict:
  """Random weights: of the models in their own dtype, of Θ_C in `dtype`."""

  def made(init, key, described, dtype):
    whole = jax.jit(
      lambda key: jax.tree.map(lambda x: x.astype(dtype), init(key, described))
    )
    return whole(key)

  first, second, third = jax.random.split(jax.random.key(0), 3)
  params = {
    "anchor": made(decoder.init, first, spec.anchor, spec.anchor.compute.dtype)
  }
  if spec.augmenting:
    params["augmenting"] = {
      name: made(
        decoder.init, second, joined.config, joined.config.compute.dtype
      )
      for name, joined in spec.augmenting
    }
    params["composition"] = made(cross_attention.init, third, spec, dtype)
  return params
