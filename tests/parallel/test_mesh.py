"""Meshes: the same numbers on one device, on eight, and on two times four."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import compiler
import jax
import mesh_driver
import numpy as np
import pytest

from calm_jax import language_model
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.parallel import mesh
from calm_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ONE = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
MESHES = {
  "data": {"data": 8},
  "fsdp": {"fsdp": 8},
  "tensor": {"tensor": 8},
  "all": {"data": 2, "fsdp": 2, "tensor": 2},
  "sequence": {"fsdp": 2, "sequence": 4},
}
FINETUNED = {
  "model": "anchor", "trainable": ("anchor/.*",), "steps": 4,
  "optimizer": "muon",
}  # fmt: skip


# What is run in processes of its own, all of it at once.


def start(folder: Path, jobs: dict, devices: int, **variables):
  return subprocess.Popen(
    [sys.executable, mesh_driver.__file__, folder, json.dumps(jobs)],
    env=os.environ | variables | {
      "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
      "JAX_PLATFORMS": "cpu",
      # Quick to compile, for programs that run for moments.
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
      f" --xla_backend_optimization_level=0 {compiler.FLAGS}",
    },
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The folder of all runs, and what each process printed."""
  folder = tmp_path_factory.mktemp("meshes")
  on_eight = {
    name: ("run", {"axes": axes, "generates": name == "all"})
    for name, axes in MESHES.items()
  }
  on_eight["stopped"] = (
    "run", {"axes": {"fsdp": 8}, "broken": 13, "checkpoint_every": 8}
  )  # fmt: skip
  on_eight["load"] = ("load", {"axes": MESHES["all"]})
  on_eight["finetuned"] = (
    "run",
    {"axes": {"data": 2, "fsdp": 2, "tensor": 2}, "accumulate": 2} | FINETUNED,
  )
  on_eight["kernel"] = (
    "kernel", {"axes": {"data": 2, "tensor": 2, "sequence": 2}}
  )  # fmt: skip
  on_eight["memory"] = ("memory", {"axes": {"fsdp": 8}})
  on_both = {
    "two": ("run", {"axes": MESHES["all"], "generates": True}),
    "command": ("command", {"axes": {"fsdp": -1}}),
  }
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  children = [start(folder, on_eight, 8)] + [
    start(
      folder, on_both, 4, JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
      JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    mesh_driver.run(folder / "one", {}, generates=True)
    mesh_driver.run(folder / "finetuned_on_one", {}, accumulate=2, **FINETUNED)
    mesh_driver.command(folder / "command_on_one", {})
    said = [child.communicate()[0] for child in children]
  finally:
    for child in children:
      child.kill()  # Of those that have ended it does nothing.
  for child, text in zip(children, said, strict=True):
    assert child.returncode == 0, text[-5000:]
  return folder, said


def assert_same(folder: Path, got: str, want: str):
  """Losses, and leaves by their largest element, to 1e-5."""
  (losses, leaves), (losses_1, leaves_1) = (
    mesh_driver.results(folder / name) for name in (got, want)
  )
  assert len(losses) == len(losses_1) > 4
  np.testing.assert_allclose(losses, losses_1, rtol=1e-5)
  assert leaves.keys() == leaves_1.keys() and leaves
  for name, leaf in leaves_1.items():
    np.testing.assert_allclose(
      leaves[name], leaf, rtol=0, atol=1e-5 * np.abs(leaf).max(), err_msg=name
    )


@pytest.mark.parametrize("name", [*MESHES, "two"])
def test_twenty_steps_are_those_of_one_device(name, finished):
  assert_same(finished[0], name, "one")


def test_the_twenty_steps_train(finished):
  _, trained = mesh_driver.results(finished[0] / "one")
  for name, leaf in trees.flatten(mesh_driver.compose()[1]).items():
    if name in trained:
      assert np.abs(trained[name] - leaf).max() > 1e-2


def test_a_sharded_model_is_finetuned_as_on_one_device(finished):
  assert_same(finished[0], "finetuned", "finetuned_on_one")


@pytest.mark.parametrize("name", ["all", "two"])
def test_generation_is_that_of_one_device(name, finished):
  texts, want = (
    json.loads((finished[0] / n / "texts.json").read_text())
    for n in (name, "one")
  )
  assert texts == want
  assert [len(t) for t in texts] == [24] * len(mesh_driver.PROMPTS)


def test_eight_devices_go_on_as_one(finished):
  folder = finished[0]
  assert not (folder / "stopped" / "trained.npz").exists()
  mesh_driver.run(folder / "stopped", {})
  assert_same(folder, "stopped", "one")
  steps = [r["step"] for r in read_metrics(folder / "stopped") if "loss" in r]
  assert steps == list(range(1, 21))


def test_the_command_on_two_processes(finished):
  folder, said = finished
  both = [
    json.loads((folder / name / "results.json").read_text())
    for name in ("command", "command_on_one")
  ]
  assert both[0]["table1"] == both[1]["table1"]
  assert both[0]["parameters"] == both[1]["parameters"]
  predictions = [
    {
      path.name: path.read_text()
      for path in (folder / name / "predictions").glob("*.jsonl")
    }
    for name in ("command", "command_on_one")
  ]
  assert predictions[0] == predictions[1] and predictions[0]
  losses = [
    [r["loss"] for r in read_metrics(folder / name / "compose") if "loss" in r]
    for name in ("command", "command_on_one")
  ]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  files = [
    sorted(p.name for p in (folder / name).rglob("*.*"))
    for name in ("command", "command_on_one")
  ]
  assert {n for n in files[1] if "tfevents" not in n} - {*files[0]} == set()
  # The model that was written is the one that was trained.
  one, two = (
    language_model.load_any(str(folder / name / "composition")).params
    for name in ("command_on_one", "command")
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two
  )
  # The first process prints.
  assert "KV-MATH" in said[1] and "KV-MATH" not in said[2]


@pytest.fixture(scope="module")
def of_memory(finished):
  return json.loads((finished[0] / "memory" / "memory.json").read_text())


def test_a_device_holds_an_eighth_of_the_frozen_models(of_memory):
  here = of_memory["arguments"] - of_memory["beside"]
  share = here / (of_memory["frozen"] / 8)
  print(f"{here:,} bytes of {of_memory['frozen']:,}: {share:.4f} of an eighth")
  assert 1 <= share <= 1.05


def test_no_stack_is_gathered_whole(of_memory):
  stacks, gathered = of_memory["stacks"], of_memory["gathered"]
  wholes = {math.prod(shape) for shape in stacks.values() if len(shape) > 2}
  layers = {math.prod(shape[1:]) for shape in stacks.values() if len(shape) > 2}
  sizes = [math.prod(shape) for shape in gathered]
  assert not wholes & {*sizes}
  assert not [shape for shape in gathered if shape[0] in (5, 7)]
  # Every matrix of a layer is, by itself.
  assert layers <= {*sizes}
  assert len([size for size in sizes if size in layers]) >= 14


def test_no_row_leaves_its_device_for_the_loss(of_memory):
  sizes = {math.prod(shape) for shape in of_memory["gathered"]}
  assert of_memory["states"] not in sizes


# What cannot be.


@pytest.mark.parametrize(
  ("axes", "said"),
  [
    ({"fsdp": 3}, "3 devices, and there are 8"),
    ({}, "1 devices, and there are 8"),
    ({"fsdp": -1, "data": -1}, "only one axis"),
    ({"fsdp": -1, "data": 3}, "8 devices are not a multiple of 3"),
    ({"fsdp": 0}, "1 or more"),
    ({"expert": 8}, "does not have the axes"),
  ],
)
def test_a_mesh_that_cannot_be(axes, said):
  class Device:
    def __init__(self, process_index):
      self.process_index = process_index

  devices = [Device(i // 4) for i in range(8)]
  with pytest.raises(InputError, match=said):
    mesh.make_mesh(ONE | axes, devices)


def test_one_device_has_no_mesh():
  assert mesh.make_mesh(dict.fromkeys(mesh.AXES, 1)) is None
