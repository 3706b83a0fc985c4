"""Trains and generates on meshes of simulated devices, for test_mesh.

  python tests/mesh_driver.py FOLDER '{"name": ["run", {"axes": ...}], ...}'

FOLDER gets, by name, a folder with what `run` and the like leave.
The devices are those of XLA_FLAGS; with JAX_COORDINATOR_ADDRESS and its like,
of several processes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import sys
from pathlib import Path
from unittest import mock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.experimental.pallas.ops.tpu import splash_attention

from calm_jax import train
from calm_jax.composition import model as model_lib
from calm_jax.composition.connections import Composition
from calm_jax.core import trees
from calm_jax.core.batch import Batch
from calm_jax.data import packing
from calm_jax.experiments import sharded_models
from calm_jax.generation import decode
from calm_jax.generation.sampling import Sampler
from calm_jax.language_model import LanguageModel, load_model
from calm_jax.models import attention, decoder, masks
from calm_jax.models.hf import export
from calm_jax.parallel import mesh, placement, processes, sharding
from calm_jax.parallel.rules import SHARDING
from calm_jax.training import optimizer, trainer
from calm_jax.training import step as step_lib
from calm_jax.training.metrics import read_metrics
from calm_jax.training.stage import Stage
from configs import kv

STEPS, ROWS, LENGTH, VOCABULARY = 20, 16, 12, 61
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [60, 2], [5, 5, 5, 8, 9]]


class Source:
  """Packed random rows, of which `share` are this process's."""

  fingerprint = "mesh"

  def __init__(self, share=(0, 1), broken: int | None = None):
    self.rows, self.broken = packing.host_rows(ROWS, *share), broken

  def __len__(self) -> int:
    return 1000

  def __getitem__(self, index: int) -> Batch:
    if index == self.broken:
      raise OSError(f"no batch {index}")
    random = np.random.default_rng(index)
    lengths = random.integers(2, LENGTH // 2 + 1, 2 * ROWS)
    rows = np.repeat(np.arange(ROWS), 2)
    tokens = random.integers(0, VOCABULARY, lengths.sum())
    batch = packing.make_batch(
      packing.TokenLists(tokens, lengths),
      random.integers(1, lengths),
      rows,
      batch_size=ROWS,
      length=LENGTH,
    )
    return jax.tree.map(lambda array: array[self.rows], batch)

  def describe(self, index: int) -> str:
    return f"batch {index}"


def stage(**changes) -> Stage:
  return Stage(
    **{
      "steps": STEPS, "batch_size": ROWS, "length": LENGTH, "warmup": 2,
      "log_every": 1, "eval_every": 20, "checkpoint_every": 20,
      "learning_rate": 1e-2,
      # Adam makes steps of full size of rounding errors, where eps lets it.
      "eps": 1e-4,
    }
    | changes
  )  # fmt: skip


def layout_of(axes: dict) -> sharding.Layout | None:
  made = mesh.make_mesh(dict.fromkeys(mesh.AXES, 1) | axes)
  return made and sharding.Layout(made, SHARDING)


def compose() -> tuple[Composition, dict]:
  """Widths of 32 and 24, MLPs of 40, 61 tokens, three heads or four."""
  spec, params = helpers.compose(connections=((2, 2),))
  return helpers.retype(spec, loss_chunk=7), params


def run(
  folder: Path, axes: dict, broken=None, generates=False, **changes
) -> None:
  """A stage, and a few texts: metrics, "trained.npz" and "texts.json"."""
  layout = layout_of(axes)
  model = sharded_models.shard(LanguageModel(*compose()), layout)
  asked = stage(**changes)
  share = layout.share(ROWS, asked.accumulate) if layout else (0, 1)
  source = Source(share, broken)
  try:
    params, _ = trainer.run_stage(
      "compose", asked, model.spec, model.params, source,
      [Source()[900]], folder, tiny.tracked(folder), origins={}, seed=0,
      layout=layout,
    )  # fmt: skip
  except OSError:
    return
  trained, _ = trees.partition(params, trees.mask(params, asked.trainable))
  trained = processes.fetch(trees.flatten(trained))
  if jax.process_index() == 0:
    np.savez(folder / "trained.npz", **trained)
  if generates:
    texts = decode.generate(
      dataclasses.replace(model, params=params), PROMPTS, max_new_tokens=24,
      sampler=Sampler(temperature=1.0), seeds=range(len(PROMPTS)),
    )  # fmt: skip
    if jax.process_index() == 0:
      (folder / "texts.json").write_text(json.dumps(texts))


def memory(folder: Path, axes: dict) -> None:
  """What a compiled step is given and gathers: "memory.json"."""
  layout = layout_of(axes)
  shape = {"width": 64, "mlp_width": 136, "tie_embeddings": True}
  anchor = helpers.model(1, num_layers=7, **shape)[0]
  other = helpers.model(2, num_layers=5, **shape)[0]

  def shapes(config):
    params = {"anchor": decoder.param_shapes(config)}
    return LanguageModel(Composition(config), params)

  model = model_lib.untrained(
    shapes(anchor), {"kv": shapes(other)}, ((2, 3), (5, 5))
  )
  spec = model.spec.with_compute(placement.placements(layout))
  spec = spec.with_compute(lambda _: {"loss_chunk": 7})
  asked = stage()
  mask = trees.mask(model.params, asked.trainable)
  made = optimizer.make_optimizer(asked, mask)
  trainable, frozen = trees.partition(model.params, mask)
  state = jax.eval_shape(lambda p: step_lib.initial_state(made, p), trainable)

  def at(shapes, places):
    return jax.tree.map(
      lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p),
      shapes,
      places,
    )

  state = at(state, layout.following(state))
  frozen = at(frozen, layout.shardings(frozen))
  batch = layout.batch(Source()[0], ROWS)
  step = step_lib.make_step(spec, asked, made, layout)
  compiled = step.lower(state, frozen, batch).compile()
  # No step needs m_A's last norm, nor this one where prompts end: they are no
  # arguments of the program.
  batch = batch._replace(prompt_ends=None)
  used = {
    name: leaf
    for name, leaf in trees.flatten(frozen).items()
    if name != "augmenting/kv/final_norm/scale"
  }
  found = {
    "arguments": compiled.memory_analysis().argument_size_in_bytes,
    "beside": sum(map(_bytes_here, jax.tree.leaves((state, batch)))),
    "states": ROWS * LENGTH * shape["width"],
    "frozen": sum(leaf.size * 4 for leaf in used.values()),
    "stacks": {
      name: list(leaf.shape)
      for name, leaf in used.items()
      if "/layers/" in name
    },
    "gathered": [
      [int(n) for n in shape.split(",")]
      for line in compiled.as_text().splitlines()
      if " all-gather" in line
      for shape in re.findall(r"\w\[([\d,]+)\]", line.split(" all-gather")[0])
    ],
  }
  (folder / "memory.json").write_text(json.dumps(found))


def _bytes_here(leaf) -> int:
  """Of one device; a typed key is two numbers."""
  size = math.prod(leaf.sharding.shard_shape(leaf.shape))
  is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return size * (8 if is_key else leaf.dtype.itemsize)


def load(folder: Path, axes: dict) -> None:
  """A checkpoint is read in pieces, and is the same model."""
  layout = layout_of(axes)
  config, params = helpers.model(1, num_layers=2)
  export.save_params(folder / "model", config, params)
  whole, cut = (
    load_model(
      str(folder / "model"), shardings=sharded_models.shardings(of, "anchor")
    )
    for of in (None, layout)
  )
  places = layout.shardings(cut.params)
  placed = sharded_models.shard(cut, layout)
  for name, leaf in trees.flatten(cut.params).items():
    assert leaf.sharding == trees.flatten(places)[name], name
    assert trees.flatten(placed.params)[name] is leaf
  tokens = np.arange(12).reshape(2, 6)
  np.testing.assert_allclose(
    processes.fetch(placed.logits(tokens)), whole.logits(tokens), atol=1e-5
  )
  joined = model_lib.compose(whole, whole, 1, output_init="normal")
  saved = folder / f"composed_{jax.process_index()}"
  joined.save(saved)
  np.testing.assert_allclose(
    processes.fetch(sharded_models.load(saved, layout).logits(tokens)),
    joined.logits(tokens),
    atol=1e-5,
  )


def kernel(folder: Path, axes: dict) -> None:
  """Kernels shared by devices: one key head for two that share heads.

  TPU's is interpreted, and for cuDNN's stands JAX's plain path.
  """
  # Queries of causal attention by cuDNN are not cut into pieces.
  layout, whole = layout_of(axes), layout_of({"data": 2, "tensor": 4})
  random = np.random.default_rng(0)
  q, weights = (random.standard_normal((2, 200, 4, 8)) for _ in range(2))
  k, v = (random.standard_normal((2, 200, 1, 8)) for _ in range(2))
  ids = np.repeat([[1, 2, 0], [1, 1, 2]], [70, 101, 29], 1)
  mask = masks.self_attention_mask(ids, ids)[:, None]
  packed = attention.SegmentMask(ids, ids, None)

  def attend(q_BLNH, k_BSKH, v_BSKH, mask, **how):
    keys_values = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    return attention.attend(q_BLNH, [(*keys_values, mask)], **how)

  def splash(*qkv):
    place = placement.ModelPlacement(layout, "anchor/")
    return attend(*qkv, packed, kernel="splash", place=place)

  def pieces(*qkv):
    place = placement.ModelPlacement(whole, "anchor/")
    return attend(*qkv, packed, kernel="pieces", place=place)

  def plain(*qkv, **how):
    return attend(*qkv, mask, **how)

  def cudnn(*qkv):
    return plain(
      *qkv, kernel="cudnn", place=placement.ModelPlacement(layout, "anchor/")
    )

  unpacked = np.repeat([[1, 1, 0], [1, 0, 0]], [70, 101, 29], 1)
  by_segments = attention.SegmentMask(unpacked, unpacked, None)
  weights = weights * (unpacked > 0)[..., None, None]

  def causal(*qkv):
    place = placement.ModelPlacement(whole, "anchor/")
    return attend(*qkv, by_segments, kernel="cudnn", window=33, place=place)

  def plain_causal(*qkv):
    mask = masks.self_attention_mask(unpacked, unpacked)
    return attend(*qkv, masks.window_mask(mask, 33)[:, None])

  def run(function):
    loss = jax.jit(
      jax.grad(lambda *a: (function(*a) * weights).sum(), (0, 1, 2))
    )
    return loss(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))

  def stand_in(*qkv, implementation, **how):
    assert implementation == "cudnn"
    return by_jax(*qkv, implementation="xla", **how)

  make, by_jax = splash_attention.make_splash_mha, jax.nn.dot_product_attention
  interpreted = functools.partial(make, interpret=True)
  with (
    mock.patch.object(splash_attention, "make_splash_mha", interpreted),
    mock.patch.object(jax.nn, "dot_product_attention", stand_in),
    mock.patch.object(attention, "_PIECE", 64),
  ):
    found = run(splash), run(cudnn), run(pieces), run(causal)
  expected = run(plain), run(plain), run(plain), run(plain_causal)
  for ours, theirs in zip(found, expected, strict=True):
    for one, other in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(one, other, atol=2e-5)


def command(folder: Path, axes: dict) -> None:
  """The whole training command: one stage of two steps, and its report."""
  config = kv.get_config("tiny")
  config.workdir = str(folder)
  config.recipe, config.alternatives = ("compose",), ()
  config.distributed = jax.distributed.is_initialized()
  config.mesh.update(axes)
  config.task.update(num_keys=80, num_examples=8)
  config.audit.update(examples=4, draws=1)
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(
      width=8, num_heads=2, num_kv_heads=1, mlp_width=8
    )
  config.stages.compose.update(
    steps=2, warmup=1, log_every=1, eval_every=2, checkpoint_every=2
  )
  train.main(config)


def results(folder: Path) -> tuple[list[float], dict]:
  """(losses, what was trained) of a run."""
  lines = read_metrics(folder)
  losses = [r[k] for k in ("loss", "eval_loss") for r in lines if k in r]
  with np.load(folder / "trained.npz") as trained:
    return losses, dict(trained)


def main() -> None:
  folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
  if "JAX_COORDINATOR_ADDRESS" in os.environ:
    processes.start()
  for name, (kind, asked) in jobs.items():
    (folder / name).mkdir(exist_ok=True)
    kinds = {
      "run": run,
      "memory": memory,
      "load": load,
      "command": command,
      "kernel": kernel,
    }
    kinds[kind](folder / name, **asked)


if __name__ == "__main__":
  main()
