"""Estimates what a compiled program needs of a chip, and its least time."""

from __future__ import annotations

import dataclasses

import jax

from calm_jax.planning import hlo
from calm_jax.planning.programs import CompiledProgram, Placed, bytes_here


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The needs of one program on one chip, in bytes and seconds.

  Attributes:
    memory: by kind: programs.KINDS of what is given, "alignment", "results"
      (that take no argument's place), "temporaries" (activations and all
      else), "code".
    total: the sum of `memory`; if the compiler gave up, what it asked for.
    fits: whether that is the chip's memory or less.
    unread: how much of what is given the program does not read, such as m_A's
      head.
    flops: of matrix products, each counted once. In decoding this and what
      follows are of one token of each row.
    worked: FLOPs that one chip does. All chips together do more than `flops`
      where they do the same work, or do it again to save memory.
    moved: bytes read from and written to a chip's memory.
    sent: bytes sent by a chip, by kind of collective.
    unknown_loops, kernels: see `hlo`.
    seconds: that "compute", "memory" and "links" each alone would take; None
      if the chip's speed is not known.
    bound: the longest of them.
    step: its seconds: what the program takes at the least.
  """

  memory: dict[str, int]
  total: int
  fits: bool
  unread: int = 0
  flops: int = 0
  worked: float = 0
  moved: float = 0
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  seconds: dict[str, float] | None = None
  bound: str = ""
  step: float = 0


def estimate(
  placed: Placed, program: CompiledProgram, tokens: int = 1
) -> Estimate:
  """Estimates what a program needs.

  Args:
    placed: what it computes.
    program: the program.
    tokens: turns of its loops of unknown length, in each of which it makes a
      token; FLOPs, bytes moved and seconds are those of one.
  """
  chip, devices = placed.target.chip, placed.target.devices
  memory, flops = program.given.resident(), program.flops // tokens
  if program.compiled is None:
    needed = max(program.needed, sum(memory.values()), chip.hbm + 1)
    return Estimate(memory, needed, False, flops=flops)
  read = _bytes_read(program)
  unread = sum(memory.values()) - read
  memory |= _allocated(program.compiled, devices[0].platform, read)
  total = sum(memory.values())
  text = program.compiled.as_text()
  counts = hlo.count(text, tokens)
  worked = (counts.flops + program.in_kernels / len(devices)) / tokens
  moved = counts.memory / tokens
  sent = {kind: n / tokens for kind, n in counts.sent.items()}
  seconds, bound = None, ""
  if chip.flops:
    seconds = {
      "compute": worked / chip.flops,
      "memory": moved / chip.bandwidth,
      "links": sum(sent.values()) / chip.links,
    }
    bound = max(seconds, key=seconds.get)
  return Estimate(
    memory=memory,
    total=total,
    fits=total <= chip.hbm,
    unread=unread,
    flops=flops,
    worked=worked,
    moved=moved,
    sent=sent,
    unknown_loops=counts.unknown_loops,
    kernels=hlo.kernels(text),
    seconds=seconds,
    bound=bound,
    step=seconds[bound] if seconds else 0.0,
  )


def _bytes_read(program: CompiledProgram) -> int:
  """Bytes of what is given that the program reads."""
  arguments = program.given.arguments, program.compiled.input_shardings[0]
  # Of an argument that the program does not read there is no sharding.
  leaves, shardings = (
    jax.tree.leaves(tree, is_leaf=lambda x: x is None) for tree in arguments
  )
  pairs = zip(leaves, shardings, strict=True)
  return sum(bytes_here(leaf) for leaf, s in pairs if s is not None)


def _allocated(compiled, platform: str, read: int) -> dict[str, int]:
  """Bytes that the compiler reserves beside the `read` bytes, by kind."""
  found = compiled.memory_analysis()
  arguments = found.argument_size_in_bytes
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  temporaries = found.temp_size_in_bytes
  if platform == "tpu":
    # Programs compile whose temporaries by that count exceed a TPU's memory;
    # the peak, which has what is given and the results in it, does not.
    temporaries = found.peak_memory_in_bytes - (arguments + results)
  return {
    "alignment": arguments - read,
    "results": results,
    "temporaries": temporaries,
    "code": found.generated_code_size_in_bytes,
  }
