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


# https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e: HBM capacity, peak compute
# per chip, HBM bandwidth, inter-chip interconnect bandwidth (Gbit/s, here / 8).
TPUS = {
  "v5e": Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9),
  "v5p": Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9),
  "v6e": Chip("v6e", 32 * GIB, 918e12, 1640e9, 448e9),
}
# NVIDIA's data sheets, SXM: without sparsity; NVLink's two directions, halved.
GPUS = {
  "A100": Chip("A100", 80 * 10**9, 312e12, 2039e9, 300e9),
  "H100": Chip("H100", 80 * 10**9, 989e12, 3350e9, 450e9),
  "H200": Chip("H200", 141 * 10**9, 989e12, 4800e9, 450e9),
}
