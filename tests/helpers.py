"""Layouts of token rows, small random models and damage, for the tests."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.composition import cross_attention, forward
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.core.batch import Batch, Sequence
from calm_jax.models import decoder, masks
from calm_jax.models.config import Compute, ModelConfig
from calm_jax.models.rope import Rope
from calm_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
# For tests whose reference is transformers 5; calm_jax reads 4's files too.
transformers_5 = pytest.mark.skipif(
  importlib.metadata.version("transformers").startswith("4."),
  reason="transformers 4 differs from 5 here",
)


def rows(*rows_of_parts, length: int) -> Sequence:
  """Rows of parts: an array is a segment, an int that many pads."""
  shape = (len(rows_of_parts), length)
  out = Sequence(*(np.zeros(shape, np.int32) for _ in range(3)))
  for row, parts in enumerate(rows_of_parts):
    at = segment = 0
    for part in parts:
      if isinstance(part, int):
        at += part
        continue
      segment += 1
      here = slice(at, at + len(part))
      out.tokens[row, here] = part
      out.segments[row, here] = segment
      out.positions[row, here] = np.arange(len(part))
      at += len(part)
  return out


def layouts(a, b, length: int) -> dict[str, tuple[Sequence, dict]]:
  """Two sequences in every layout, with where each then is.

  Returns:
    {layout: (rows [2, length], {(row, first slot): the sequence there})}.
  """
  A, B = length - len(a), length - len(b)
  return {
    "right": (rows([a, A], [b, B], length=length), {(0, 0): a, (1, 0): b}),
    "left": (rows([A, a], [B, b], length=length), {(0, A): a, (1, B): b}),
    "packed": (
      rows([a, b], [b, a], length=length),
      {(0, 0): a, (0, len(a)): b, (1, 0): b, (1, len(b)): a},
    ),
  }


@functools.partial(jax.jit, static_argnames="config")
def decode_rows(params, config: ModelConfig, sequence: Sequence):
  """Logits [B, L, V] of one model by itself."""
  mask = masks.self_attention_mask(sequence.segments, sequence.segments)
  context = masks.make_context(config, sequence.positions, mask)
  x = decoder.embed(params, config, sequence.tokens, sequence.positions)
  x, _ = decoder.run_layers(params, config, x, context)
  return decoder.logits(params, config, x)


@functools.partial(jax.jit, static_argnums=1)
def composed(
  params, spec, sequence, augmenting=None, visible=None, prompt_ends=None
):
  """Logits [B, L, V] of rows that all models read, or these."""
  batch = Batch(sequence, augmenting or {}, visible or {}, prompt_ends)
  return forward.forward(params, spec, batch)[0]


def random_params(shapes, seed: int):
  """What `init` does, from numpy: it compiles nothing."""
  random = np.random.default_rng(seed)

  def one(path, leaf):
    noise = random.standard_normal(leaf.shape)
    if path[-1].key == "scale":
      value = 1 + 0.1 * noise
    else:
      value = noise / leaf.shape[-2 if path[-1].key == "kernel" else -1] ** 0.5
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, shapes)


def model(seed: int, **changes) -> tuple[ModelConfig, dict]:
  """A small random decoder: 4 layers, grouped heads, odd vocabulary."""
  shape = {
    "vocab_size": 61, "width": 32, "num_layers": 4, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 8, "mlp_width": 40,
  } | changes  # fmt: skip
  compute = {"dtype": shape.pop("dtype")} if "dtype" in shape else {}
  shape["compute"] = Compute(**compute)
  shape.setdefault("rope", Rope(shape["head_dim"], theta=100.0))
  config = ModelConfig(**shape)
  return config, random_params(decoder.param_shapes(config), seed)


def numbers(size: int, stop_ids=()) -> Tokenizer:
  """A tokenizer of the pieces "0" to str(size - 1), which encodes nothing."""
  pieces = tuple(map(str, range(size)))
  backend = types.SimpleNamespace(vocab={p: i for i, p in enumerate(pieces)})
  return Tokenizer(
    pieces, None, None, tuple(stop_ids), frozenset(), "numbers", backend
  )


def compose(
  names=("kv",),
  connections=((2, 2), (3, 4)),
  seed: int = 0,
  layers=(4, 3),
  **options,
) -> tuple[Composition, dict]:
  """A composition; the augmenting models, of width 24, have layers[1] layers.

  W^O is random too, unlike that of `composition.init`: a trained one.
  """
  anchor, anchor_params = model(1, num_layers=layers[0])
  parts, subtrees = [], {}
  for i, name in enumerate(names):
    config, subtrees[name] = model(
      10 + i, width=24, num_layers=layers[1], num_heads=3, num_kv_heads=1
    )
    pairs = tuple(Connection(*c) for c in connections)
    parts.append((name, Augmenting(config, pairs, **options)))
  spec = Composition(anchor, tuple(parts))
  params = {
    "anchor": anchor_params,
    "augmenting": subtrees,
    "composition": random_params(theta_shapes(spec), seed),
  }
  return spec, params


def theta_shapes(spec: Composition):
  """The composition subtree as ShapeDtypeStructs."""
  return cross_attention.param_shapes(spec)


def fresh(spec: Composition, params: dict) -> dict:
  """The tree before training: a composition subtree from `init`."""
  init = jax.jit(cross_attention.init, static_argnums=1)
  return params | {"composition": init(jax.random.key(3), spec)}


def in_dtype(params, dtype: str):
  """All leaves in another dtype."""
  return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


def retype(spec: Composition, **changes) -> Composition:
  """The composition with other fields in each model's config or `compute`."""
  names = {field.name for field in dataclasses.fields(Compute)}
  compute = {n: changes.pop(n) for n in names & changes.keys()}
  spec = spec.with_compute(lambda _: compute)
  return Composition(
    dataclasses.replace(spec.anchor, **changes),
    tuple(
      (
        n,
        dataclasses.replace(a, config=dataclasses.replace(a.config, **changes)),
      )
      for n, a in spec.augmenting
    ),
  )


def lives(driver: str, *arguments) -> list[dict]:
  """What a driver, a file that runs processes and kills them, says of each."""
  done = subprocess.run(
    [sys.executable, driver, *map(str, arguments)],
    env=os.environ
    | {
      "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
      "JAX_PLATFORMS": "cpu",
    },
    capture_output=True,
    text=True,
  )
  print(done.stdout, done.stderr)
  assert done.returncode == 0
  return [json.loads(r) for r in done.stdout.splitlines() if r[:1] == "{"]


def truncate(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
  """Changes one bit."""
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 1
  path.write_bytes(content)


def empty(path: Path) -> None:
  path.write_bytes(b"")
