"""Options of XLA with which the tests' programs, which run for moments, compile
sooner: fused operations are slowest to compile by way of MLIR."""

import jax

# From 0.11.1 on there is no other way.
QUICK = {"xla_cpu_use_fusion_emitters": False}
if jax.__version_info__ >= (0, 11, 1):
  QUICK = {}
FLAGS = " ".join(f"--{name}={value}".lower() for name, value in QUICK.items())
