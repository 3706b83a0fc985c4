"""Plans against the steps that runs compile, on eight devices and on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import compiler
import jax
import numpy as np
import plan_driver
import pytest
import tiny

from calm_jax.composition import execution
from calm_jax.composition.model import Model
from calm_jax.core.batch import Sequence
from calm_jax.experiments import run_models
from calm_jax.experiments.settings import Settings
from calm_jax.experiments.text_task import TextTask
from calm_jax.generation import decode, decode_steps
from calm_jax.planning import programs, shapes, topology

ALL = {
  "axes": {"fsdp": 2, "tensor": 2, "sequence": 2},
  "quantise.anchor": "int4", "quantise.augmenting": "int8",
  "dtype": "bfloat16", "remat": "full",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def child(tmp_path_factory):
  """`plan_driver` on eight devices, while the tests on one device run."""
  folder = tmp_path_factory.mktemp("plans")
  jobs = {
    "all": ("truth", ALL),
    "long": ("long_row", {"chips": 4, "length": 512}),
  }
  process = subprocess.Popen(
    [sys.executable, plan_driver.__file__, folder, json.dumps(jobs)],
    env=os.environ | {
      "PYTHONPATH": os.pathsep.join(sys.path),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8"
      f" --xla_backend_optimization_level=0 {compiler.FLAGS}",
    },
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  yield process
  process.kill()  # Of one that has ended it does nothing.


@pytest.fixture(scope="module")
def on_eight(child):
  """What it prints."""
  out, errors = child.communicate()
  assert child.returncode == 0, errors[-5000:]
  return json.loads(out.splitlines()[-1])


# One device.


class OtherTokens(tiny.Source):
  """Rows in which m_A reads 16 tokens of its own."""

  def __getitem__(self, index):
    batch = super().__getitem__(index)
    own_BM = np.ones((self.batch_size, 16), np.int32)
    return batch._replace(
      augmenting={"kv": Sequence(own_BM, own_BM, own_BM)},
      visible={"kv": batch.anchor.positions},
    )


def test_a_step_with_other_tokens_is_that_of_a_run(tmp_path):
  settings = Settings("text", None)
  run = tiny.Run(tmp_path, tiny.stage(), OtherTokens())
  work = run_models.stage_work(run.stage, run.params)
  run.spec = execution.for_training(
    run.spec, settings.asked, execution.Device("cpu"), work
  )
  told = plan_driver.by_compiler(plan_driver.first_step(run))
  params = jax.eval_shape(lambda: run.params)
  job = shapes.Job(settings, run.stage, run.spec, params, {"kv": 16})
  found = plan_driver.by_plan(job, plan_driver.ONE, 1)
  for kind in ("arguments", "results", "temporaries"):
    assert found[kind] == told[kind] > 0, kind


def test_an_evaluation_is_read_and_decoded_as_it_is_planned(monkeypatch):
  task = TextTask(evals={"asked": {"max_new_tokens": 30}}, prompt_tokens=20)
  (spec, params), settings = tiny.compose(), Settings("text", task)
  work = run_models.stage_work(tiny.stage(), params)
  spec = execution.for_training(
    spec, settings.asked, execution.Device("cpu"), work
  )
  told = []

  def recorded(program):
    def record(*arguments, **options):
      compiled = program.lower(*arguments, **options).compile()
      told.append(plan_driver.by_compiler(compiled))
      return program(*arguments, **options)

    return record

  start, advance_on = decode_steps.start, decode_steps.advance_on
  monkeypatch.setattr(decode_steps, "start", recorded(start))
  monkeypatch.setattr(
    decode_steps, "advance_on", lambda *on: recorded(advance_on(*on))
  )
  prompts = np.ones((4, 20), np.int32)
  decode.generate(Model(spec, params), prompts.tolist(), max_new_tokens=30)
  monkeypatch.undo()
  job = shapes.Job(
    settings, tiny.stage(), spec, jax.eval_shape(lambda: params), {}
  )
  placed = programs.place(job, topology.target("cpu"), plan_driver.ONE)
  asked = programs.longest_prompts(job, 4)
  for program, compiled in zip(
    (programs.reading, programs.decoding), told[:2], strict=True
  ):
    found = plan_driver.estimated(placed, program(placed, asked))
    for kind in ("arguments", "results", "temporaries"):
      assert found[kind] == compiled[kind] > 0, (program, kind)


# Eight devices.


def test_bytes_and_flops_are_those_of_the_step_that_a_run_compiles(on_eight):
  found = on_eight["all"]
  for kind in ("arguments", "results", "temporaries"):
    assert found["plan"][kind] == found["compiler"][kind] > 0, kind
  # The compiler counts sums, exponentials and the work of few bits too.
  assert 0.85 < found["plan"]["flops"] / found["compiler"]["flops"] <= 1


def test_a_search_cuts_a_long_row_into_pieces(on_eight):
  """One row and two heads are no work for four chips without that."""
  found = on_eight["long"]
  assert found["fits"][0]
  assert found["fits"].count(None) == len(found["fits"]) - 1
  assert {axes["sequence"] for axes in found["axes"]} == {2, 4}
