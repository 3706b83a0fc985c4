"""What is said when the memory of a device is not enough."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from calm_jax.core.errors import OutOfMemory
from calm_jax.training import memory
from calm_jax.training import step as step_lib

HUGE = 10**6, 10**7, 48  # no address space holds as many floats


@jax.jit
def too_large(state, frozen, batch):
  """A step whose program compiles, and asks for too much when it runs."""
  row = batch.anchor.tokens.reshape(-1).astype(jnp.float32)
  loss = jnp.sort(jnp.broadcast_to(row, HUGE)).sum()
  return state, {"loss": loss, "grad_norm": loss, "tokens": row.size}


def shown(message: str) -> dict[str, float]:
  """The rows of the table in a message, in GiB."""
  rows = re.findall(r"^  ([a-z ]+?) +([\d.,]+) GiB$", message, re.MULTILINE)
  return {kind: float(size.replace(",", "")) for kind, size in rows}


def failed(run, monkeypatch, step) -> str:
  monkeypatch.setattr(step_lib, "make_step", lambda *_: step)
  with pytest.raises(OutOfMemory) as caught:
    run()
  return str(caught.value)


def test_a_step_that_is_too_large(tmp_path, monkeypatch):
  run = tiny.Run(tmp_path)
  # Large enough to be seen in GiB.
  run.params["anchor"]["embed"]["embedding"] = np.zeros((17, 2**20), np.float32)
  monkeypatch.setattr(memory, "_limit", lambda: 3 * 2**30)
  message = failed(run, monkeypatch, too_large)
  assert message.startswith("stage 'compose': the memory of a device is not")
  rows = shown(message)
  assert list(rows) == [
    "frozen", "trainable", "optimizer", "batch", "activations", "its memory"
  ]  # fmt: skip
  assert rows["frozen"] == pytest.approx(17 * 4 / 2**10, abs=2e-3)
  size = 4 * np.prod(HUGE, dtype=float) / 2**30
  assert size * 0.999 < rows["activations"] < size * 3
  assert rows["its memory"] == 3
  # Activations are what takes most.
  helps = re.findall(r"--config\.([\w.]+)", message)
  assert helps[0] == "remat"
  assert "stages.compose.batch_size (now 8)" in message
  assert re.search("has no checkpoint yet; JAX said: .*Out of memory", message)


def test_weights_that_are_too_large(tmp_path, monkeypatch):
  def step(state, frozen, batch):
    raise AssertionError("it is only compiled")

  step.lower = jax.jit(lambda state, frozen, batch: state).lower
  arguments = {"trainable": {}, "step": np.int32(0)}, {"x": np.ones(8)}, ()
  parts = memory.step_memory(step, jax.tree.map(memory._shape, arguments))
  assert parts["frozen"] == 8 * 8 and parts["optimizer"] == 4
  assert parts["activations"] == 0
  run = tiny.Run(tmp_path)
  helps = memory._advice(parts, run.spec, run.stage, "compose")
  assert "dtype=bfloat16" in helps[1] and "quantise.anchor" in helps[2]
  compute = {"remat": "full", "dtype": "bfloat16", "loss_chunk": 5}
  spec = run.spec.with_compute(lambda _: compute)
  helps = memory._advice(parts, spec, run.stage, "compose")
  assert "loss_chunk (now 5 positions)" in helps[-1]
  assert "quantise.anchor" in helps[1]
  assert not [line for line in helps if "remat" in line or "dtype" in line]


class Unfetchable:
  """A metric of a step that failed after it was dispatched."""

  def __init__(self, said):
    self.said = said

  def item(self):
    raise jax.errors.JaxRuntimeError(self.said)


def late(said):
  """A step whose error comes with its metrics."""

  def step(state, frozen, batch):
    return state, {"loss": Unfetchable(said)}

  def lower(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: again")

  step.lower = lower
  return step


def test_an_error_that_comes_with_the_metrics(tmp_path, monkeypatch):
  monkeypatch.setattr("calm_jax.training.utilisation.model_flops", lambda *_: 1)
  step = late("RESOURCE_EXHAUSTED: Out of memory while trying\nto allocate")
  message = failed(tiny.Run(tmp_path), monkeypatch, step)
  assert re.search(r"^  activations +unknown$", message, re.MULTILINE)
  assert message.endswith("RESOURCE_EXHAUSTED: Out of memory while trying")


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
  monkeypatch.setattr("calm_jax.training.utilisation.model_flops", lambda *_: 1)
  monkeypatch.setattr(step_lib, "make_step", lambda *_: late("INTERNAL: no"))
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: no"):
    tiny.Run(tmp_path)()


def test_what_tpus_refuse_to_compile_is_not_compiled_again():
  step = late("")
  step.lower = None
  arguments = {"trainable": {}}, {}, ()
  said = "RESOURCE_EXHAUSTED: Ran out of memory. Used 20G of 15.7G hbm."
  assert memory.step_memory(step, arguments, said)["activations"] is None


def test_the_share_of_one_device():
  mesh = AbstractMesh((4,), ("fsdp",))
  cut = NamedSharding(mesh, PartitionSpec("fsdp"))
  frozen = {
    "cut": jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=cut),
    "whole": jax.ShapeDtypeStruct((8, 3), jnp.float32),
  }
  said = "Used 20G of 15.7G hbm"
  parts = memory.step_memory(None, ({"trainable": {}}, frozen, ()), said)
  assert parts["frozen"] == 2 * 3 * 2 + 8 * 3 * 4
