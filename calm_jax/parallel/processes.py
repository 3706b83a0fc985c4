"""Processes that compute together, of which the first one writes."""

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from calm_jax.core.errors import InputError, LostProcess

PyTree = Any

_COORDINATOR = "JAX_COORDINATOR_ADDRESS"


def start(heartbeat: int = 100) -> None:
  """Joins the other processes; called before any other use of JAX.

  TPU pods, Slurm, Open MPI and Kubernetes tell each process its number.
  Elsewhere the environment has to: JAX_COORDINATOR_ADDRESS (host:port of the
  first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID, from 0; InputError if
  not. JAX ends all processes when one is silent for `heartbeat` seconds, and
  LostProcess is raised if not all come.
  """
  if jax.distributed.is_initialized():
    return
  numbers: dict[str, Any] = {}
  if _COORDINATOR in os.environ:
    for argument in ("num_processes", "process_id"):
      name = f"JAX_{argument.upper()}"
      value = os.environ.get(name, "")
      if not value.isdigit():
        raise InputError(
          f"{_COORDINATOR} is set, and {name}={value!r} is no number: give "
          "both JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
      numbers[argument] = int(value)
  # It would take SIGTERM for itself, from before the training to after it.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat, **numbers)
  except jax.errors.JaxRuntimeError as error:
    raise LostProcess(f"not all processes came together: {error}") from error
  except (ValueError, LookupError, RuntimeError, OSError) as error:
    raise InputError(
      "--config.distributed: nothing tells this process of the others (JAX: "
      f"{error}). Start all of them on a TPU pod, by Slurm, Open MPI or as an "
      f"indexed job of Kubernetes, or set {_COORDINATOR}=HOST:PORT of the "
      "first one, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each. A run of one "
      "process leaves --config.distributed out"
    ) from error


class Poll:
  """Asks all processes whether any says yes; all get the same answers.

  Each call answers the call before, so that no device waits. All processes
  call it equally often.
  """

  def __init__(self):
    if jax.process_count() > 1:
      mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
      self._votes = NamedSharding(mesh, PartitionSpec("all"))
      replicated = NamedSharding(mesh, PartitionSpec())
      self._any = jax.jit(jnp.any, out_shardings=replicated)
    self._last: jax.Array | None = None

  def __call__(self, mine: bool) -> bool:
    """Asks, and answers the call before; a single process answers `mine`."""
    if jax.process_count() == 1:
      return mine
    before = self._last
    votes = jax.make_array_from_callback(
      (jax.device_count(),), self._votes, lambda _: np.array([mine])
    )
    self._last = self._any(votes)
    return before is not None and bool(before)


@contextlib.contextmanager
def quiet_but_first() -> Iterator[None]:
  """Discards what all but the first process print."""
  if jax.process_index() == 0:
    yield
    return
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    yield


def own_folder(folder: Path) -> Path:
  """The folder for the first process; a temporary one for the others."""
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
  scratch = Path(tempfile.mkdtemp(prefix="calm_jax_"))
  atexit.register(shutil.rmtree, scratch, ignore_errors=True)
  return scratch


def fetch(values: PyTree) -> PyTree:
  """Arrays as numpy arrays, gathered leaf by leaf from all processes."""
  if jax.process_count() == 1:
    return jax.device_get(values)

  def gather(x):
    is_whole = not isinstance(x, jax.Array) or x.is_fully_addressable
    if is_whole or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(gather, values)
