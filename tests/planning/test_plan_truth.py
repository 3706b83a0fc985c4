"""Plans against the steps that runs compile, on eight devices and on one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import cached_runs
import jax
import plan_driver
import pytest
import tiny

from calm_jax import plan
from calm_jax.composition import forward as forward_lib
from calm_jax.core.errors import InputError
from calm_jax.experiments import recipe
from calm_jax.plan import Options
from calm_jax.planning import flops, programs, shapes, topology
from calm_jax.train import plain
from configs import common, compose, kv

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
      " --xla_backend_optimization_level=0"
      " --xla_cpu_use_fusion_emitters=false",
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


# Cached states.


def test_a_step_on_cached_states_is_that_of_a_run(tmp_path):
  """m_A reads tokens of its own, and its states have another length."""
  settings = common.get_config().to_dict()
  stage = tiny.stage(length=cached_runs.LENGTH, cache_states="int8")
  run = tiny.Run(tmp_path, stage, cached_runs.source(names=("kv",)))
  run.spec = recipe.configured(run.spec, settings)
  told = plan_driver.by_compiler(plan_driver.first_step(run))
  params = jax.eval_shape(lambda: run.params)
  own = {"kv": cached_runs.OTHER_LENGTH}
  job = shapes.Job(settings, stage, run.spec, params, own)
  found = plan_driver.by_plan(job, plan_driver.ONE, 1)
  for kind in ("arguments", "results", "temporaries"):
    assert found[kind] == told[kind] > 0, kind
  # Without the cache m_A's forward pass is what comes to it.
  runs_all = dataclasses.replace(stage, cache_states="")
  cached, uncached = (
    programs.training_flops(
      programs.place(j, topology.target("cpu"), plan_driver.ONE), 8
    )
    for j in (job, job._replace(stage=runs_all))
  )
  joined = dict(run.spec.augmenting)["kv"]
  tokens = jax.ShapeDtypeStruct((8, cached_runs.OTHER_LENGTH), "int32")
  forward = flops.count(
    lambda p, x: forward_lib.tap(p, joined, forward_lib.Sequence(x, x, x))[0],
    params["augmenting"]["kv"],
    tokens,
  )
  assert uncached - cached == forward > 0


def shape_files(folder: Path) -> dict[str, str]:
  """Files of two small models, for a config."""
  given = json.loads(Path("configs/shapes/gemma2-2b.json").read_text())
  small = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 99,
  }  # fmt: skip
  path = folder / "small.json"
  path.write_text(json.dumps(given | small))
  return {"anchor": str(path), "augmenting": str(path)}


def test_a_plan_says_what_cached_states_save(tmp_path, capsys):
  config = compose.get_config()
  config.update(shape_files(tmp_path))
  config.stages.compose.update(length=32, batch_size=4, cache_states="bfloat16")
  result = plan.main(config, Options("cpu", largest_batch=False, decode_rows=0))
  found = result["best"]["found"]
  assert 0 < found["flops"] < result["uncached_flops"]
  # m_A lies there for measurements, and no step reads it.
  job = shapes.job(plain(config))
  size = sum(x.size * 4 for x in jax.tree.leaves(job.params["augmenting"]))
  assert size <= found["unread"] < 1.1 * size
  assert "m_A's forward pass would make it" in capsys.readouterr().out
  config.stages.compose.trainable = ("augmenting/.*",)
  with pytest.raises(InputError, match="for frozen augmenting models"):
    shapes.job(plain(config))


def test_data_that_do_not_come_again_have_no_cached_states():
  config = kv.get_config("tiny")
  config.stages.compose.cache_states = "int8"
  with pytest.raises(InputError, match="made afresh"):
    shapes.job(plain(config))


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
