"""What a compiled program needs of a chip, and how fast it can be at best."""

from __future__ import annotations

import dataclasses

import jax

from calm_jax.planning import hlo
from calm_jax.planning.programs import Placed, Program, bytes_here


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one program on one chip; bytes, seconds.

  Attributes:
    memory: by kind: programs.KINDS of what is given, "alignment", "results"
      (that take no argument's place), "temporaries" (activations and all
      else), "code".
    unread: how much of what is given the program does not read, such as m_A's
      head; it lies there all the same.
    total: the sum of `memory`; if the compiler gave up, what it asked for.
    fits: whether that is the chip's memory or less.
    flops: of matrix products, each counted once; of one token of each row if
      it decodes, as are all that follow.
    worked: FLOPs that one chip does. Of all chips together they are more than
      `flops` where chips do the same work, or do it again to save memory.
    moved: bytes read from and written to a chip's memory.
    sent: bytes sent by a chip, by kind of collective.
    unknown_loops: see `hlo.Moved`.
    kernels: see `hlo.kernels`.
    seconds: by "compute", "memory", "links": what each alone would take. None
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


def of(placed: Placed, program: Program, tokens: int = 1) -> Estimate:
  """The estimate of a program.

  Args:
    placed: what it computes.
    program: the program.
    tokens: times that its loops of unknown length run; FLOPs, what it moves and
      its seconds are divided by it.
  """
  chip, count = placed.target.chip, len(placed.target.devices)
  memory, flops = program.given.resident(), program.flops // tokens
  if program.compiled is None:
    needed = max(program.needed, sum(memory.values()), chip.hbm + 1)
    return Estimate(memory, needed, False, flops=flops)
  found = program.compiled.memory_analysis()
  # Of an argument that the program does not read there is no sharding.
  flat, shardings = (
    jax.tree.leaves(x, is_leaf=lambda leaf: leaf is None)
    for x in (program.given.arguments, program.compiled.input_shardings[0])
  )
  read = [
    bytes_here(x) for x, s in zip(flat, shardings, strict=True) if s is not None
  ]
  unread = sum(memory.values()) - sum(read)
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  temporaries = found.temp_size_in_bytes
  if placed.target.devices[0].platform == "tpu":
    # Programs compile whose temporaries by that count exceed a TPU's memory;
    # the peak, which has what is given and the results in it, does not.
    given = found.argument_size_in_bytes + results
    temporaries = found.peak_memory_in_bytes - given
  memory |= {
    "alignment": found.argument_size_in_bytes - sum(read),
    "results": results,
    "temporaries": temporaries,
    "code": found.generated_code_size_in_bytes,
  }
  total = sum(memory.values())
  text = program.compiled.as_text()
  moved = hlo.moved(text, tokens)
  worked = (moved.flops + program.in_kernels / count) / tokens
  sent = {kind: n / tokens for kind, n in moved.sent.items()}
  seconds = None
  if chip.flops:
    seconds = {
      "compute": worked / chip.flops,
      "memory": moved.memory / tokens / chip.bandwidth,
      "links": sum(sent.values()) / chip.links,
    }
  bound = max(seconds, key=seconds.get) if seconds else ""
  return Estimate(
    memory,
    total,
    total <= chip.hbm,
    unread,
    flops,
    worked,
    moved.memory / tokens,
    sent,
    moved.unknown_loops,
    hlo.kernels(text),
    seconds,
    bound,
    seconds[bound] if seconds else 0.0,
  )
