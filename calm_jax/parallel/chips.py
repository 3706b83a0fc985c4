"""Memory and speed of chips, by their makers' public specifications."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
  """One chip, by the name that a topology gives to it; a 0 is not known."""

  name: str
  hbm: int  # bytes of memory
  flops: float = 0  # per second, of dense matrix products in bfloat16
  bandwidth: float = 0  # bytes per second of its memory
  links: float = 0  # bytes per second sent to other chips, over all links
  # FLOPs per second of products of float32 at JAX's default precision, which is
  # bfloat16 on TPUs and TensorFloat-32 on GPUs.
  float32_flops: float = 0
  compute_capability: str = ""  # of a GPU


# https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e: HBM capacity, peak compute
# per chip, HBM bandwidth, inter-chip interconnect bandwidth (Gbit/s, here / 8).
TPUS = {
  "v5e": Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, 197e12),
  "v5p": Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, 459e12),
  "v6e": Chip("v6e", 32 * GIB, 918e12, 1640e9, 448e9, 918e12),
}
# NVIDIA's data sheets, SXM: without sparsity; NVLink's two directions, halved.
GPUS = {
  "A100": Chip("A100", 80 * 10**9, 312e12, 2039e9, 300e9, 156e12, "8.0"),
  "H100": Chip("H100", 80 * 10**9, 989e12, 3350e9, 450e9, 494e12, "9.0"),
  "H200": Chip("H200", 141 * 10**9, 989e12, 4800e9, 450e9, 494e12, "9.0"),
}
_L4 = Chip("L4", 24 * 10**9, 121e12, 300e9, float32_flops=60e12)
# It has neither bfloat16 nor TensorFloat-32: its first number is float16's.
_T4 = Chip("T4", 16 * 10**9, 65e12, 320e9, float32_flops=8.1e12)
# The names that JAX has for devices of these speeds (`Device.device_kind`).
# A part of a GPU, or another form of it, has a name that is not among them.
DEVICE_KINDS = {
  "TPU v5 lite": TPUS["v5e"],
  "TPU v5e": TPUS["v5e"],
  "TPU v5": TPUS["v5p"],
  "TPU v5p": TPUS["v5p"],
  "TPU v6 lite": TPUS["v6e"],
  "TPU v6e": TPUS["v6e"],
  "NVIDIA A100-SXM4-40GB": GPUS["A100"],
  "NVIDIA A100-SXM4-80GB": GPUS["A100"],
  "NVIDIA A100-PCIE-40GB": GPUS["A100"],
  "NVIDIA A100 80GB PCIe": GPUS["A100"],
  "NVIDIA H100 80GB HBM3": GPUS["H100"],
  "NVIDIA H200": GPUS["H200"],
  "NVIDIA L4": _L4,
  "NVIDIA T4": _T4,
  "Tesla T4": _T4,
}
