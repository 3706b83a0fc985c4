"""What a compiled program moves, from its text.

XLA's own `cost_analysis` has the body of a loop once, however often it runs,
and layers are run by a loop. Here a loop counts as often as the compiler knows
that it runs.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from typing import NamedTuple

from calm_jax.planning import products

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_START = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
  r"\b(calls|body|condition|to_apply|true_computation|false_computation"
  r"|branch_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_BITS = re.compile(r"[a-z]+(\d+)")
_KERNEL = re.compile(
  r'%([A-Za-z_]\w*?)(?:\.\d+)* = .* custom-call\(.*target="tpu_custom_call"'
)
COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
  "ragged-all-to-all", "collective-permute",
)  # fmt: skip
# They move nothing, or what the computation that they call moves.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
  "conditional", "call", "after-all", "opt-barrier", "partition-id",
  "replica-id", "async-start", "async-update", "async-done", "domain",
  "optimization-barrier", "add-dependency",
}  # fmt: skip


class Moved(NamedTuple):
  """What one device moves in one call of a program.

  Attributes:
    memory: bytes read from and written to its memory, by what each fusion
      reads and writes.
    sent: bytes sent to other devices, by kind of collective: of an array of n
      bytes that g devices share, n (g - 1) / g, twice that in an all-reduce.
    unknown_loops: loops that were counted as `trips`.
    flops: of its matrix products, but for those of kernels.
  """

  memory: float
  sent: dict[str, float]
  unknown_loops: int
  flops: float


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  kind: str
  type: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool


def moved(text: str, trips: int = 1) -> Moved:
  """Counts a compiled program.

  Args:
    text: of `compiled.as_text()`.
    trips: of loops that run for as long as their data say.
  """
  computations, entry = _parse(text)
  everyone = re.search(r"num_partitions=(\d+)", text)
  count = _Count(computations, trips, int(everyone[1]) if everyone else 1)
  memory, sent, unknown, flops = count.total(entry)
  return Moved(memory, dict(sent), unknown, flops)


def kernels(text: str) -> dict[str, int]:
  """Kernels of its own that a program has for a TPU, and in how many places."""
  return dict(collections.Counter(_KERNEL.findall(text)))


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  computations: dict[str, list[Instruction]] = {}
  entry, here = "", None
  for line in text.splitlines():
    if here is None:
      if found := _START.match(line):
        here = computations.setdefault(found[1], [])
        entry = found[1] if line.startswith("ENTRY") else entry
    elif line.rstrip() == "}":  # Kernels have others, in their text.
      here = None
    elif found := _INSTRUCTION.match(line):
      here.append(_instruction(*found.groups()))
  return computations, entry


def _instruction(root, name: str, line: str) -> Instruction:
  end = _closing(line, 0) if line.startswith("(") else line.index(" ")
  kind, _, after = line[end:].strip().partition("(")
  close = _closing(after, 1)
  # Of a parameter its number, of a constant its value.
  is_number = kind in ("parameter", "constant")
  pattern = r"^-?\d+" if is_number else r"(?<=%)[\w.\-]+"
  operands = tuple(re.findall(pattern, after[:close]))
  return Instruction(
    name, kind, line[:end], operands, after[close:], root is not None
  )


def _closing(text: str, depth: int) -> int:
  """The index after the bracket that closes all that are open."""
  for i, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      return i + 1
  return len(text)


def _arrays(type_: str) -> list[float]:
  """Bytes of each array of a type that lies in main memory."""
  found = []
  for kind, dims, layout in _ARRAY.findall(type_):
    if "S(" in layout:  # On chip, or on the host.
      continue
    bits = _BITS.match(kind)
    size = int(bits[1]) / 8 if bits else 1
    found.append(size * math.prod(int(d) for d in dims.split(",") if d))
  return found


class _Count:
  """Totals of computations, each with those that it calls."""

  def __init__(self, computations, trips: int, devices: int):
    self.computations, self.trips = computations, trips
    self.devices = devices
    self.total = functools.cache(self._total)
    self.users = functools.cache(self._users)

  def _total(self, name: str):
    memory, unknown, flops = 0.0, 0, 0.0
    sent: collections.Counter = collections.Counter()
    instructions = self.computations[name]
    types = {i.name: i.type for i in instructions}
    for one in instructions:
      kind = one.kind.removesuffix("-start")
      called = {
        role: re.findall(r"[\w.\-]+", names)
        for role, names in _CALLED.findall(one.rest)
      }
      if kind in COLLECTIVES:
        scattered = name.startswith("all-reduce-scatter")
        kind = "reduce-scatter" if scattered else kind
        sent[kind] += self._sent(kind, one, scattered)
      memory += self._memory(one, types, called)
      flops += products.flops(one, types)
      times, inner = 1, []
      if kind == "while":
        known = self._trips(one, called["condition"][0])
        times = known or self.trips
        unknown += not known
        inner = [self.total(n) for n in called["body"]]
      elif kind == "conditional":
        names = [n for ns in called.values() for n in ns]
        branches = [self.total(n) for n in names]
        inner = [max(branches, key=lambda t: t[0])]
      elif kind in ("fusion", "async"):
        # What a fusion touches in between stays on the chip.
        inner = [self.total(n) for n in called.get("calls", [])]
        inner = [((kind == "async") * m, *rest) for m, *rest in inner]
      elif kind == "call":
        inner = [self.total(n) for n in called["to_apply"]]
      for more, more_sent, more_unknown, more_flops in inner:
        memory += times * more
        flops += times * more_flops
        unknown += more_unknown
        for key, value in more_sent.items():
          sent[key] += times * value
    return memory, sent, unknown, flops

  def _trips(self, one: Instruction, condition: str) -> int:
    """How often a loop from 0 runs; 0 if that is not known."""
    if known := _TRIPS.search(one.rest):
      return int(known[1])
    inner = {i.name: i for i in self.computations[condition]}
    root = next(i for i in inner.values() if i.is_root)
    limits = [
      inner[o].operands[0]
      for o in root.operands
      if o in inner and inner[o].kind == "constant"
    ]
    if root.kind == "compare" and "direction=LT" in root.rest and limits:
      return int(limits[0])
    return 0

  def _sent(self, kind: str, one: Instruction, scattered: bool) -> float:
    if kind == "collective-permute":
      return max(_arrays(one.type), default=0)
    size = self._group(one.rest)
    sizes = _arrays(re.sub(r"S\(\d+\)", "", one.type)) or [0]
    # That of a start holds what goes in and what comes out.
    whole = max(sizes) if one.kind.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter" and not scattered:
      whole *= size
    return whole * (size - 1) / size * (2 if kind == "all-reduce" else 1)

  def _group(self, rest: str) -> int:
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
      return int(found[2])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
      return math.prod(int(sizes[n]) for n in re.findall(r"\w+", found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
      return found[1].count(",") + 1
    return self.devices

  def _memory(self, one: Instruction, types, called) -> float:
    if one.kind in _FREE or one.kind.endswith("-done"):
      return 0
    inputs = [sum(_arrays(types[o])) for o in one.operands if o in types]
    out = sum(_arrays(one.type))
    if one.kind in ("dynamic-slice", "slice", "gather"):
      return 2 * out
    if one.kind == "dynamic-update-slice":
      return 2 * inputs[1]
    if one.kind == "copy-start":
      return sum(inputs)
    if one.kind == "fusion":
      return self._fusion(called["calls"][0], inputs, out)
    return out + sum(inputs)

  def _fusion(self, name: str, inputs: list[float], out: float) -> float:
    """What it reads of each operand, and what it writes."""
    total = self._written(name, out)
    for one in self.computations[name]:
      if one.kind == "parameter":
        total += self._read(name, one.name, inputs[int(one.operands[0])])
    return total

  def _users(self, name: str) -> dict[str, list[tuple[int, Instruction]]]:
    users = collections.defaultdict(list)
    for one in self.computations[name]:
      for place, operand in enumerate(one.operands):
        users[operand].append((place, one))
    return users

  def _read(self, name: str, value: str, whole: float) -> float:
    """What a fusion, and those within it, read of an array of `whole` bytes."""
    total = 0.0
    for place, user in self.users(name)[value]:
      if user.kind == "bitcast":
        total += self._read(name, user.name, whole)
      elif user.kind in ("dynamic-slice", "slice", "gather") and place == 0:
        total += sum(_arrays(user.type))
      elif user.kind == "fusion":
        inner = _CALLED.search(user.rest)[2].strip("%")
        parameter = next(
          one.name for one in self.computations[inner]
          if one.kind == "parameter" and int(one.operands[0]) == place
        )  # fmt: skip
        total += self._read(inner, parameter, whole)
      elif user.kind != "dynamic-update-slice" or place != 0:
        return whole
    return min(total, whole)

  def _written(self, name: str, out: float) -> float:
    inner = self.computations[name]
    by_name = {one.name: one for one in inner}
    root = next(one for one in inner if one.is_root)
    ends = [root]
    if root.kind == "tuple":
      ends = [by_name[o] for o in root.operands]
    total, updates = 0.0, False
    for end in ends:
      while end.kind == "bitcast":
        end = by_name[end.operands[0]]
      if end.kind == "dynamic-update-slice":
        updates = True
        total += sum(_arrays(by_name[end.operands[1]].type))
      else:
        total += sum(_arrays(end.type))
    return total if updates else out
