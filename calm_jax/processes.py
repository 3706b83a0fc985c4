"""Several processes that compute together, of which the first one writes."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from calm_jax.errors import InputError

PyTree = Any

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"
_NUMBERS = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start() -> None:
  """Joins the other processes; before anything else is asked of JAX.

  TPU pods, Slurm, Open MPI and Kubernetes tell each process what it is. Where
  nothing does, the environment has to: JAX_COORDINATOR_ADDRESS (host:port of
  the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID, from 0.

  Raises:
    InputError: the environment gives some of them only, or no number.
  """
  if jax.distributed.is_initialized():
    return
  numbers: dict[str, int] = {}
  if _COORDINATOR in os.environ:
    for argument, name in zip(
      ("num_processes", "process_id"), _NUMBERS, strict=True
    ):
      value = os.environ.get(name, "")
      if not value.isdigit():
        raise InputError(
          f"{_COORDINATOR} is set, and {name}={value!r} is no number: give "
          f"both of {_NUMBERS}"
        )
      numbers[argument] = int(value)
  jax.distributed.initialize(**numbers)


@contextlib.contextmanager
def quiet_but_first() -> Iterator[None]:
  """What all but the first process print is thrown away."""
  if jax.process_index() == 0:
    yield
    return
  with (
    open(os.devnull, "w") as nowhere,
    contextlib.redirect_stdout(nowhere),
  ):
    yield


def own_folder(folder: Path) -> Path:
  """The folder for the first process; one to be thrown away for others.

  All processes run the same program: what they would all write, the others
  write there.
  """
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
  scratch = Path(tempfile.mkdtemp(prefix="calm_jax_"))
  atexit.register(shutil.rmtree, scratch, ignore_errors=True)
  return scratch


def fetch(values: PyTree) -> PyTree:
  """Arrays of all processes as numpy arrays; all processes call it together.

  A leaf that other processes hold a part of is gathered, one after the other.
  """

  if jax.process_count() == 1:
    return jax.device_get(values)

  def one(x):
    if isinstance(x, jax.Array) and not (
      x.is_fully_addressable or x.is_fully_replicated
    ):
      return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(one, values)
