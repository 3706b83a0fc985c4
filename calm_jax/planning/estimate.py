"""Estimates what a compiled program needs of a chip, and its least time."""

import dataclasses
from typing import Any

import jax

from calm_jax.planning import hlo
from calm_jax.planning.programs import CompiledProgram, Placed, bytes_here


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The needs of one program on one chip, in bytes and seconds.

  In decoding, `flops` and what follows are of one token of each row.
  """

  # By kind: programs.KINDS of what is given, "alignment", "results" (that take
  # no argument's place), "temporaries" (activations and all else), "code".
  memory: dict[str, int]
  total: int  # of `memory`; if the compiler gave up, what it asked for
  fits: bool  # whether that is the chip's memory or less
  unread: int = 0  # bytes given in vain, such as m_A's head
  flops: int = 0  # of matrix products, each counted once
  # FLOPs that one chip does. All chips together do more than `flops` where
  # they do the same work, or do it again to save memory.
  worked: float = 0
  moved: float = 0  # bytes read from and written to the chip's memory
  sent: dict[str, float] = dataclasses.field(default_factory=dict)  # see `hlo`
  unknown_loops: int = 0  # see `hlo`
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)  # as above
  # That "compute", "memory" and "links" each alone would take; None if the
  # chip's speed is not known.
  seconds: dict[str, float] | None = None
  bound: str = ""  # the longest of them
  step: float = 0.0  # its seconds: what the program takes at the least


def estimate(
  placed: Placed, program: CompiledProgram, tokens: int = 1
) -> Estimate:
  """Estimates what a program needs.

  Its loops of unknown length make a token in each of `tokens` turns; FLOPs,
  bytes moved and seconds are those of one.
  """
  chip, devices = placed.target.chip, placed.target.devices
  memory, flops = program.given.resident(), program.flops // tokens
  if program.compiled is None:
    needed = max(program.needed, sum(memory.values()), chip.hbm + 1)
    return Estimate(memory, needed, False, flops=flops)
  read = _bytes_read(program)
  unread = sum(memory.values()) - read
  memory |= _allocated(program.compiled, devices[0].platform, read)
  total, text = sum(memory.values()), program.compiled.as_text()
  counts = hlo.count(text, tokens)
  worked = (counts.flops + program.in_kernels / len(devices)) / tokens
  moved = counts.memory / tokens
  sent = {kind: n / tokens for kind, n in counts.sent.items()}
  work: dict[str, Any] = {"flops": flops, "worked": worked, "moved": moved}
  work |= {"sent": sent, "unknown_loops": counts.unknown_loops}
  work["kernels"] = hlo.kernels(text)
  if chip.flops:
    seconds = {
      "compute": worked / chip.flops,
      "memory": moved / chip.bandwidth,
      "links": sum(sent.values()) / chip.links,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    work |= {"seconds": seconds, "bound": bound, "step": seconds[bound]}
  return Estimate(memory, total, total <= chip.hbm, unread, **work)


def _bytes_read(program: CompiledProgram) -> int:
  """Counts the bytes of what is given that the program reads."""
  arguments = program.given.arguments, program.compiled.input_shardings[0]
  # Of an argument that the program does not read there is no sharding.
  leaves, shardings = (
    jax.tree.leaves(tree, is_leaf=lambda x: x is None) for tree in arguments
  )
  pairs = zip(leaves, shardings, strict=True)
  return sum(bytes_here(leaf) for leaf, s in pairs if s is not None)


def _allocated(compiled, platform: str, read: int) -> dict[str, int]:
  """Counts the bytes that the compiler reserves besides, by kind."""
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
