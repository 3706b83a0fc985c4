"""Trains and generates on meshes of simulated devices, for test_sharding.

  python tests/mesh_driver.py FOLDER '{"name": {"fsdp": 8}, ...}'

FOLDER gets, by name, a folder with what `run` leaves. The devices are those of
XLA_FLAGS; with JAX_COORDINATOR_ADDRESS and its like, of several processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import helpers
import jax
import numpy as np

from calm_jax import decode, mesh, processes, sharding, trainer, tree
from calm_jax.data import packing
from calm_jax.language_model import LanguageModel
from calm_jax.metrics import read_metrics
from calm_jax.placing import place
from calm_jax.sampling import Sampler
from configs import common

STEPS, ROWS, LENGTH, VOCABULARY = 20, 16, 12, 61
PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6], [60, 2], [5, 5, 5, 8, 9]]


class Source:
  """Packed random rows, of which `share` are this process's."""

  fingerprint = "mesh"

  def __init__(self, share=(0, 1), broken: int | None = None):
    self.rows, self.broken = packing.host_rows(ROWS, *share), broken

  def __len__(self) -> int:
    return 1000

  def __getitem__(self, index: int) -> packing.Batch:
    if index == self.broken:
      raise OSError(f"no batch {index}")
    random = np.random.default_rng(index)
    lengths = random.integers(2, LENGTH // 2 + 1, 2 * ROWS)
    rows = np.repeat(np.arange(ROWS), 2)
    batch = packing.assemble(
      random.integers(0, VOCABULARY, lengths.sum()),
      lengths,
      random.integers(1, lengths),
      rows,
      packing.row_offsets(lengths, rows),
      batch_size=ROWS,
      length=LENGTH,
    )
    return {name: array[self.rows] for name, array in batch.items()}

  def describe(self, index: int) -> str:
    return f"batch {index}"


def stage(**changes) -> trainer.Stage:
  return trainer.Stage(
    **common.stage(
      data={}, steps=STEPS, batch_size=ROWS, length=LENGTH, warmup=2,
      log_every=1, eval_every=10, checkpoint_every=8, learning_rate=1e-2,
      # Adam makes steps of full size of rounding errors, where eps lets it.
      eps=1e-4,
    ).to_dict()
    | changes
  )  # fmt: skip


def layout_of(axes: dict) -> sharding.Layout | None:
  made = mesh.make_mesh(common.get_config().mesh.to_dict() | axes)
  return made and sharding.Layout(made, common.SHARDING)


def run(folder: Path, axes: dict, broken=None, **changes) -> dict | None:
  """Twenty steps and a few texts: "theta.npz", metrics and "texts.json"."""
  layout = layout_of(axes)
  spec, params = helpers.compose(output_init="zeros")
  params = helpers.fresh(spec, params)
  model = place(LanguageModel(spec, params), layout)
  share = layout.share(ROWS) if layout else (0, 1)
  try:
    trained, _ = trainer.run_stage(
      "compose", stage(**changes), model.spec, model.params,
      Source(share, broken), [Source()[900]], folder, origins={}, seed=0,
      layout=layout,
    )  # fmt: skip
  except OSError:
    return None
  texts = {
    kind: decode.generate(
      trained, model.spec, PROMPTS, max_new_tokens=24, sampler=sampler,
      seeds=range(len(PROMPTS)),
    )
    for kind, sampler in (
      ("greedy", Sampler()), ("sampled", Sampler(temperature=1.0))
    )
  }  # fmt: skip
  theta = processes.fetch(tree.flatten(trained["composition"]))
  if jax.process_index() == 0:
    np.savez(folder / "theta.npz", **theta)
    (folder / "texts.json").write_text(json.dumps(texts))
  return trained


def results(folder: Path) -> tuple[list, dict, dict]:
  """(losses, Θ_C, texts) of a run."""
  losses = [r["loss"] for r in read_metrics(folder) if "loss" in r]
  losses += [r["eval_loss"] for r in read_metrics(folder) if "eval_loss" in r]
  with np.load(folder / "theta.npz") as theta:
    texts = json.loads((folder / "texts.json").read_text())
    return losses, dict(theta), texts


def main() -> None:
  folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
  if "JAX_COORDINATOR_ADDRESS" in os.environ:
    processes.start()
  for name, asked in runs.items():
    run(folder / name, **asked)


if __name__ == "__main__":
  main()
