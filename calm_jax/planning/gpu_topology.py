"""Describes NVIDIA GPUs to their compiler, which needs no GPU then."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies

from calm_jax.core.errors import InputError


class _Architecture(NamedTuple):
  """A GPU's properties that its compiler reads, by NVIDIA's white papers."""

  name: str
  capability: int  # the major compute capability
  processors: int  # streaming multiprocessors
  shared_memory: int  # KiB of one of them
  cache: int  # MiB, level 2
  clock: float  # GHz
  memory: int  # bytes
  bandwidth: int  # bytes a second of it


_ARCHITECTURES = {
  "A100": _Architecture(
    "NVIDIA A100-SXM4-80GB", 8, 108, 164, 40, 1.41, 85_049_933_824, 2039 * 10**9
  ),
  "H100": _Architecture(
    "NVIDIA H100 80GB HBM3", 9, 132, 228, 50, 1.98, 84_942_979_072, 3352 * 10**9
  ),
  "H200": _Architecture(
    "NVIDIA H200", 9, 132, 228, 50, 1.98, 150_109_028_352, 4800 * 10**9
  ),
}
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: 2048
  core_count: {gpu.processors}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: {cuda} }}
device_description_str: "{gpu.name}"
"""


def cuda_version() -> int:
  """Returns the major CUDA version of the installed compiler, 0 without one.

  Its programs call cuDNN, which has to be installed too.
  """
  # A name with a dot can only be looked for where its package is there.
  if not all(map(importlib.util.find_spec, ("jax_plugins", "nvidia"))):
    return 0
  for version in (13, 12):
    names = f"jax_plugins.xla_cuda{version}", "nvidia.cudnn"
    if all(map(importlib.util.find_spec, names)):
      return version
  return 0


def devices(kind: str, count: int) -> list[jax.Device]:
  """Returns GPUs of a kind, on one host, that programs can be compiled for.

  InputError if the compiler, of `cuda_version`, does not take them.
  """
  gpu = _ARCHITECTURES[kind]
  config = _CONFIG.format(
    gpu=gpu,
    shared=gpu.shared_memory * 2**10,
    optin=(gpu.shared_memory - 1) * 2**10,
    cache=gpu.cache * 2**20,
    fpus=64 if gpu.capability == 8 else 128,
    cuda=cuda_version(),
  )
  shape = f"1x1x{count}"  # slices, hosts of each, devices of each
  try:
    found = topologies.get_topology_desc(
      shape, "cuda", topology=shape, target_config=config
    )
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise InputError(f"topology=gpu:{count}x{kind}: {error}") from error
  return list(found.devices)


@contextlib.contextmanager
def capability_of(device: jax.Device) -> Iterator[None]:
  """Lets JAX trace cuDNN's attention for a GPU that this process has not.

  JAX asks the GPU of the process how wide heads may be, and takes those of the
  oldest one, 128, where there is none.
  """
  if device.platform != "gpu" or jax.default_backend() == "gpu":
    yield
    return
  from jax._src.cudnn import fused_attention_stablehlo

  def is_at_least(capability: str) -> bool:
    return float(device.compute_capability) >= float(capability)

  name = "check_compute_capability"
  with mock.patch.object(fused_attention_stablehlo, name, is_at_least):
    yield
