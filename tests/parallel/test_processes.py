"""Several processes; that they compute together is in test_mesh.py."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax._src import xla_bridge

from calm_jax.core.errors import InputError
from calm_jax.parallel import processes


def test_processes_are_told_apart(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
  monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
  with pytest.raises(InputError, match="JAX_NUM_PROCESSES=''"):
    processes.start()


@pytest.mark.parametrize(
  ("environment", "said"),
  [
    ({}, "coordinator_address should be defined"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "coordinator_address"),
    ({"JAX_COORDINATOR_ADDRESS": "localhost"}, "index out of range"),
    ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "2"}, "process_id=2"),
    ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:2"}, "OMPI_COMM_WORLD_SIZE"),
  ],
)
def test_a_process_that_knows_of_no_others(environment, said, monkeypatch):
  # Other tests have used JAX by now, as a process that starts has not.
  monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
  numbers = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
  monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
  if "JAX_COORDINATOR_ADDRESS" in environment:
    environment = numbers | environment
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(InputError, match=said) as caught:
    processes.start()
  assert "set JAX_COORDINATOR_ADDRESS=HOST:PORT" in str(caught.value)


def test_only_the_first_writes_and_prints(monkeypatch, tmp_path, capsys):
  run = tmp_path / "run"
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  scratch = processes.own_folder(run)
  assert scratch.is_dir() and scratch != run and not run.exists()
  with processes.quiet_but_first():
    print("second")
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  assert processes.own_folder(run) == run and run.is_dir()
  with processes.quiet_but_first():
    print("first")
  assert capsys.readouterr().out == "first\n"


def test_fetch_gives_numpy():
  got = processes.fetch({"a": jax.numpy.arange(3), "b": [np.float32(2)]})
  assert isinstance(got["a"], np.ndarray)
  assert got["a"].tolist() == [0, 1, 2] and got["b"] == [2]
