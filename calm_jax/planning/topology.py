"""Finds the devices that a named topology has, to compile programs for them."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from calm_jax.composition.execution import Device
from calm_jax.core.errors import InputError
from calm_jax.parallel.chips import GPUS, TPUS, Chip
from calm_jax.planning import gpu_topology

FORMS = "v5e:4x4, v5p:2x2x2, v6e:8x8, gpu:8xH100, cpu or cpu:8"


class Target(NamedTuple):
  """The devices of a topology that a program is compiled for.

  If not `exact`, the CPU's compiler stands in for that which the devices run
  with, and its temporaries and fusions differ.
  """

  name: str
  chip: Chip
  devices: list[jax.Device]
  exact: bool

  @property
  def kind(self) -> Device:
    """The devices as `composition.execution` knows them."""
    platform, _, _ = parse(self.name)
    return kind(platform, self.chip)


def kind(platform: str, chip: Chip) -> Device:
  """Returns a chip as `composition.execution` knows it."""
  if platform == "cpu":
    return Device("cpu")
  # JAX takes three quarters of a GPU's memory, unless it is told otherwise.
  share = 3 / 4 if platform == "gpu" else 1
  return Device(platform, chip.compute_capability, int(share * chip.hbm))


def parse(name: str) -> tuple[str, str, int]:
  """Returns (platform, kind of chip, how many) of "v5e:4x4" and the like.

  InputError if it is no topology, or its chips are not in the table.
  """
  if match := re.fullmatch(r"(v\d\w*):([1-9]\d*(?:x[1-9]\d*){1,2})", name):
    kind, shape = match.groups()
    if kind in TPUS:
      return "tpu", kind, math.prod(map(int, shape.split("x")))
  elif match := re.fullmatch(r"gpu:([1-9]\d*)x(\w+)", name):
    if match[2] in GPUS:
      return "gpu", match[2], int(match[1])
  elif match := re.fullmatch(r"cpu(?::([1-9]\d*))?", name):
    return "cpu", "cpu", int(match[1] or 1)
  raise InputError(
    f"topology={name!r} is none of the forms {FORMS}; chips are "
    f"{[*TPUS, *GPUS]}"
  )


def prepare(name: str, effort: float = 0.0) -> None:
  """Lets this process compile for a topology.

  Call it before JAX looks for devices: from then on it has only CPUs, as many
  as they have to stand in for. `effort` is that of the TPU's compiler to make
  programs fast: from -1 to 0, a run's.
  """
  platform, _, count = parse(name)
  jax.config.update("jax_platforms", "cpu")
  if platform == "tpu":
    jax.config.update("jax_exec_time_optimization_effort", effort)
    # Otherwise libtpu asks the network what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "true")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  elif count > 1:
    jax.config.update("jax_num_cpu_devices", count)


def target(name: str) -> Target:
  """Returns the devices of a topology.

  InputError as `parse`, if libtpu is missing or does not know the topology, or
  if this process has fewer CPU devices, see `prepare`.
  """
  platform, kind, count = parse(name)
  if platform == "gpu" and gpu_topology.cuda_version():
    return Target(name, GPUS[kind], gpu_topology.devices(kind, count), True)
  if platform != "tpu":
    devices = jax.devices("cpu")
    if len(devices) < count:
      raise InputError(
        f"topology={name!r} needs {count} devices to stand in for it, and this "
        f"process has {len(devices)}: set jax_num_cpu_devices={count}"
      )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = GPUS[kind] if platform == "gpu" else Chip("cpu", memory // count)
    return Target(name, chip, devices[:count], platform == "cpu")
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f"topology={name!r} needs the TPU compiler, which needs no TPU: "
      "pip install 'calm_jax[tpu]'"
    )
  try:
    devices = topologies.get_topology_desc(name, "tpu").devices
  except (RuntimeError, ValueError) as error:
    raise InputError(f"topology={name!r}: libtpu says {error}") from error
  return Target(name, TPUS[kind], list(devices), True)
