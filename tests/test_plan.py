"""Plans of tiny models, by the CPU's compiler and by the TPU's."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from calm_jax import plan
from calm_jax.errors import InputError
from calm_jax.plan import Options
from calm_jax.planning import estimate, hlo, programs, search, shapes, topology
from calm_jax.planning.chips import TPUS
from calm_jax.train import plain
from configs import kv

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}


def tiny():
  config = kv.get_config("tiny")
  config.unroll = 1
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(num_layers=3, width=32, num_heads=4)
  config.composition.num_connections = 1
  return config


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """The plan of one device, as printed JSON."""
  file = tmp_path_factory.mktemp("plan") / "plan.json"
  options = Options("cpu", json=str(file), largest_batch=False, decode_rows=4)
  result = plan.main(tiny(), options)
  return result, json.loads(file.read_text())


@pytest.fixture(scope="module")
def job():
  return shapes.job(plain(tiny()))


def test_json_is_what_was_found(planned):
  result, read = planned
  assert json.loads(json.dumps(result)) == read
  assert read["best"]["found"]["fits"]
  assert read["decode"]["memory"]["caches"] > 0


def test_memory_by_kind_adds_up_to_what_the_compiler_says(job):
  placed = programs.place(job, topology.target("cpu"), ONE)
  program = programs.training(placed, 4)
  found = estimate.of(placed, program)
  says = program.compiled.memory_analysis()
  given = sum(found.memory[kind] for kind in programs.KINDS)
  read = given - found.unread + found.memory["alignment"]
  assert read == says.argument_size_in_bytes
  assert found.memory["alignment"] == 0
  assert found.memory["temporaries"] == says.temp_size_in_bytes > 0
  assert found.total == sum(found.memory.values())
  # Of m_A's head nothing is read, and Adam keeps two of each trainable.
  assert found.unread > 0
  theta = found.memory["trainable"]
  assert 2 * theta <= found.memory["optimizer"] < 2 * theta + 64
  assert found.memory["frozen"] == sum(
    x.size * x.dtype.itemsize
    for part in ("anchor", "augmenting")
    for x in jax.tree.leaves(job.params[part])
  )
