"""The memory of training: its peak, and a step's by kind where there is not
enough."""

import contextlib
import math
import os
import re
import resource
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from calm_jax.composition.connections import Composition
from calm_jax.core.errors import OutOfMemory
from calm_jax.training.stage import Stage

_GIB = 2**30


class MemoryWatch(contextlib.AbstractContextManager):
  """Raises JAX's error that memory ran out as one that says what took it.

  Args:
    spec: the model or composition that is trained.
    name: the stage's.
    kept: says which checkpoint is kept.
  """

  def __init__(
    self, spec: Composition, stage: Stage, name: str, kept: Callable[[], str]
  ):
    self._spec, self._stage, self._name, self._kept = spec, stage, name, kept
    self._given: tuple[jax.stages.Wrapped, Any] | None = None

  def note(self, step: jax.stages.Wrapped, *arguments: Any) -> None:
    """Keeps the first step and the shapes of its (state, frozen, batch)."""
    if self._given is None:
      self._given = step, jax.tree.map(_shape, arguments)

  def __exit__(self, kind, error, traceback) -> None:
    is_jax = isinstance(error, jax.errors.JaxRuntimeError)
    # JAX 0.8 calls it INTERNAL on a CPU.
    if not is_jax or not re.search("RESOURCE_EXHAUSTED|Out of mem", str(error)):
      return
    lines = [f"stage {self._name!r}: the memory of a device is not enough"]
    if self._given is not None:
      parts = step_memory(*self._given, str(error))
      lines += ["a step has on each device:", *_table(parts), ""]
      lines += _advice(parts, self._spec, self._stage, self._name)
    lines += [f"{self._kept()}; JAX said: {str(error).splitlines()[0]:.300}"]
    raise OutOfMemory("\n".join(lines)) from error


def peak_gib() -> float:
  """Returns the most memory that was in use at once, in GiB.

  It is that of a device of this process, or, where devices do not count it as
  on a CPU, that of this process.
  """
  devices = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [x["peak_bytes_in_use"] for x in devices if "peak_bytes_in_use" in x]
  if peaks:
    return max(peaks) / _GIB
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def step_memory(
  step: jax.stages.Wrapped, arguments: tuple, said: str = ""
) -> dict[str, int | None]:
  """Counts the bytes that a step takes of each device, by kind.

  The activations are all that its program keeps besides what it is given; None
  if it does not compile, or if `said`, JAX's error, is of the compiler of TPUs,
  which checks itself whether a program fits.
  """
  state, frozen, batch = arguments
  rest = {name: x for name, x in state.items() if name != "trainable"}
  parts = {
    "frozen": frozen,
    "trainable": state["trainable"],
    "optimizer": rest,
    "batch": batch,
  }
  sizes: dict[str, int | None] = {
    kind: sum(map(_bytes_here, jax.tree.leaves(part)))
    for kind, part in parts.items()
  }
  sizes["activations"] = None
  if " hbm" not in said:
    # A program that ran before is not compiled again.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      found = step.lower(*arguments).compile().memory_analysis()
      if found is not None:
        sizes["activations"] = found.temp_size_in_bytes
  return sizes


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  if not isinstance(sharding, NamedSharding):
    sharding = None  # An array on one device, which JAX puts there itself.
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes_here(leaf: jax.ShapeDtypeStruct) -> int:
  shape = leaf.shape
  if leaf.sharding is not None:
    shape = leaf.sharding.shard_shape(shape)
  return math.prod(shape) * leaf.dtype.itemsize


def _limit() -> int:
  """Returns the bytes of memory of a device, or of the whole machine."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _table(parts: dict[str, int | None]) -> list[str]:
  rows = [*parts.items(), ("its memory", _limit())]
  return [
    f"  {kind:<12}" + ("unknown" if x is None else f"{x / _GIB:10,.3f} GiB")
    for kind, x in rows
  ]


def _advice(
  parts: dict[str, int | None], spec: Composition, stage: Stage, name: str
) -> list[str]:
  """Says what to change, first for what takes most."""
  compute = spec.anchor.compute
  chunk = compute.loss_chunk or "all"
  activations, weights = [], []
  if compute.remat != "full":
    activations.append("--config.remat=full")
  activations += [
    f"a smaller --config.stages.{name}.batch_size (now {stage.batch_size}), or "
    f"more pieces, --config.stages.{name}.accumulate (now {stage.accumulate})",
    f"a smaller --config.loss_chunk (now {chunk} positions)",
  ]
  if compute.dtype == "float32":
    weights.append("--config.dtype=bfloat16")
  if parts["frozen"]:
    weights.append("--config.quantise.anchor=int8, or int4")
  weights.append("--config.mesh.fsdp=-1 on several devices")
  given = sum(parts[kind] or 0 for kind in parts.keys() - {"activations"})
  order = activations + weights
  if parts["activations"] is not None and parts["activations"] < given:
    order = weights + activations
  return ["what helps, in this order:", *(f"  {change}" for change in order)]
