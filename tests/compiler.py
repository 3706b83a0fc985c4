"""Options of XLA with which the tests' programs, which run for moments, compile
sooner: fused operations are slowest to compile by way of MLIR, and each of the
parts in which LLVM takes a program costs milliseconds."""

import jax

QUICK = {"xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11, 1):  # Later there is no other way.
  QUICK["xla_cpu_use_fusion_emitters"] = False
FLAGS = " ".join(f"--{name}={value}".lower() for name, value in QUICK.items())
