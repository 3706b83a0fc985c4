"""Counts what a compiled program computes, moves and sends, from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once; here a loop, such as
that over layers, counts as often as the compiler knows that it runs.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_START = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
  r"\b(calls|body|condition|to_apply|true_computation|false_computation"
  r"|branch_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_KERNEL = re.compile(
  r'%([A-Za-z_]\w*?)(?:\.\d+)* = .* custom-call\(.*target="'
  r'(?:tpu_custom_call|mosaic_gpu[^"]*|__cudnn\$(\w+))"'
)
_COLLECTIVE = re.compile(
  "all-gather|all-reduce|reduce-scatter|(ragged-)?all-to-all|collective-permute"
)
# They move nothing, or what the computation that they call moves.
_FREE = re.compile(
  "parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call"
  "|after-all|opt-barrier|optimization-barrier|partition-id|replica-id|domain"
  "|async-start|async-update|.*-done|add-dependency"
)
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass
class Counts:
  """The work of one device in one call of a program, or of a part of it.

  `sent` has bytes sent to other devices, by kind of collective: of an array of
  n bytes that g devices share, n (g - 1) / g, twice that in an all-reduce.
  """

  memory: float = 0.0  # bytes that fusions read from and write to it
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0  # whose number of turns had to be assumed
  flops: float = 0  # of its matrix products, but for those of kernels
  launches: int = 0  # of fusions, kernels, copies and collectives

  def add(self, other: Self, times: int = 1) -> None:
    """Adds the work of a part that runs `times` times."""
    self.memory += times * other.memory
    self.flops += times * other.flops
    self.launches += times * other.launches
    self.unknown_loops += other.unknown_loops
    for kind, size in other.sent.items():
      self.sent[kind] = self.sent.get(kind, 0) + times * size


class Instruction(NamedTuple):
  """One line of a computation; the operand of a constant is its value."""

  name: str
  kind: str
  type: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  def called(self) -> dict[str, list[str]]:
    """Names of the computations that it calls, by their role."""
    return {
      role: re.findall(r"[\w.\-]+", names)
      for role, names in _CALLED.findall(self.attributes)
    }


Computation = dict[str, Instruction]  # by name


def count(text: str, trips: int = 1) -> Counts:
  """Counts the work of a compiled program from its `as_text()`.

  Loops whose number of turns depends on data are taken to have `trips`.
  """
  computations, entry = _parse(text)
  partitions = re.search(r"num_partitions=(\d+)", text)
  devices = int(partitions[1]) if partitions else 1
  return _Counter(computations, trips, devices).count(entry)


def kernels(text: str) -> dict[str, int]:
  """Counts the places of a program that call each Pallas or cuDNN kernel."""
  found = (cudnn or name for name, cudnn in _KERNEL.findall(text))
  return dict(collections.Counter(found))


def _parse(text: str) -> tuple[dict[str, Computation], str]:
  """Returns the computations by name, and the name of the entry."""
  computations: dict[str, Computation] = {}
  entry, current = "", None
  for line in text.splitlines():
    if current is None:
      if start := _START.match(line):
        current = computations.setdefault(start[1], {})
        entry = start[1] if line.startswith("ENTRY") else entry
    elif line.rstrip() == "}":  # The text of kernels has other brackets.
      current = None
    elif parts := _INSTRUCTION.match(line):
      current[parts[2]] = _instruction(*parts.groups())
  return computations, entry


def _instruction(root: str | None, name: str, line: str) -> Instruction:
  end = _closing(line, 0) if line.startswith("(") else line.index(" ")
  kind, _, after = line[end:].strip().partition("(")
  close = _closing(after, 1)
  is_number = kind in ("parameter", "constant")
  pattern = r"^-?\d+" if is_number else r"(?<=%)[\w.\-]+"
  operands = tuple(re.findall(pattern, after[:close]))
  rest, is_root = after[close:], root is not None
  return Instruction(name, kind, line[:end], operands, rest, is_root)


def _closing(text: str, depth: int) -> int:
  """Finds the index after the bracket that closes all that are open."""
  for i, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      return i + 1
  return len(text)


def _bytes(type_: str) -> list[float]:
  """Returns the bytes of each array of a type that lies in main memory."""
  sizes = []
  for kind, dims, layout in _ARRAY.findall(type_):
    if "S(" in layout:  # On chip, or on the host.
      continue
    bits = re.match(r"[a-z]+(\d+)", kind)
    size = int(bits[1]) / 8 if bits else 1
    sizes.append(size * math.prod(_numbers(dims)))
  return sizes


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(",") if n]


class _Counter:
  """Counts computations, each with those that it calls."""

  def __init__(
    self, computations: dict[str, Computation], trips: int, devices: int
  ):
    self.computations, self.trips, self.devices = computations, trips, devices
    self.count = functools.cache(self._count)

  def _count(self, name: str) -> Counts:
    total, computation = Counts(), self.computations[name]
    # A TPU's program has reduce-scatters as computations of their own.
    scatters = name.startswith("all-reduce-scatter")
    for op in computation.values():
      operands = [computation[o] for o in op.operands if o in computation]
      memory, sent = self._memory(op, operands), self._sent(op, scatters)
      launches = int(not _FREE.fullmatch(op.kind))
      total.add(Counts(memory, sent, 0, _flops(op, operands), launches))
      for part, times in self._parts(op):
        total.add(part, times)
    return total

  def _parts(self, op: Instruction) -> Iterator[tuple[Counts, int]]:
    """Yields what an instruction calls, and how often it runs that."""
    kind, called = op.kind.removesuffix("-start"), op.called()
    if kind == "while":
      turns = self._turns(op, called["condition"][0])
      yield Counts(unknown_loops=int(turns == 0)), 1
      yield self.count(called["body"][0]), turns or self.trips
    elif kind == "conditional":
      branches = [self.count(n) for names in called.values() for n in names]
      yield max(branches, key=lambda counts: counts.memory), 1
    elif kind == "call":
      yield self.count(called["to_apply"][0]), 1
    elif kind == "fusion":
      # What a fusion touches in between stays on the chip.
      part = self.count(called["calls"][0])
      yield dataclasses.replace(part, memory=0.0, launches=0), 1
    elif kind == "async" and "calls" in called:
      yield self.count(called["calls"][0]), 1

  def _turns(self, loop: Instruction, condition: str) -> int:
    """Finds how often a loop from 0 runs; 0 if that is not known."""
    if known := re.search(r'trip_count":\{"n":"(\d+)"', loop.attributes):
      return int(known[1])
    inner = self.computations[condition]
    root = _root(inner)
    if root.kind == "compare" and "direction=LT" in root.attributes:
      for limit in (inner[o] for o in root.operands if o in inner):
        if limit.kind == "constant":
          return int(limit.operands[0])
    return 0

  def _sent(self, op: Instruction, scatters: bool) -> dict[str, float]:
    """Counts the bytes that an instruction sends if it is a collective."""
    kind = op.kind.removesuffix("-start")
    if not _COLLECTIVE.fullmatch(kind):
      return {}
    kind = "reduce-scatter" if scatters else kind
    if kind == "collective-permute":
      return {kind: max(_bytes(op.type), default=0)}
    devices = self._group(op.attributes)
    sizes = _bytes(re.sub(r"S\(\d+\)", "", op.type)) or [0]
    # The type of a start holds what goes in and what comes out.
    size = max(sizes) if op.kind.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter" and not scatters:
      size *= devices
    times = 2 if kind == "all-reduce" else 1
    return {kind: size * (devices - 1) / devices * times}

  def _group(self, attributes: str) -> int:
    """Counts the devices that take part in a collective together."""
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
      return int(groups[1])
    if groups := re.search(r"_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
      return math.prod(int(sizes[n]) for n in re.findall(r"\w+", groups[2]))
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
      return groups[1].count(",") + 1
    return self.devices

  def _memory(self, op: Instruction, operands: list[Instruction]) -> float:
    """Counts the bytes that an instruction by itself reads and writes."""
    if _FREE.fullmatch(op.kind):
      return 0
    inputs = [sum(_bytes(operand.type)) for operand in operands]
    out = sum(_bytes(op.type))
    if op.kind in _SLICES:
      return 2 * out
    if op.kind == "dynamic-update-slice":
      return 2 * inputs[1]
    if op.kind == "copy-start":
      return sum(inputs)
    if op.kind != "fusion":
      return out + sum(inputs)
    fused = self.computations[op.called()["calls"][0]]
    read = (self._read(fused, at, size) for at, size in enumerate(inputs))
    return _written(fused, out) + sum(read)

  def _read(self, fused: Computation, place: int, size: float) -> float:
    """Counts the bytes that a fusion reads of its argument, of `size` bytes."""
    values = {
      op.name
      for op in fused.values()
      if op.kind == "parameter" and int(op.operands[0]) == place
    }
    total = 0.0
    for user in fused.values():
      for at, operand in enumerate(user.operands):
        if operand not in values:
          continue
        if user.kind == "bitcast":
          values.add(user.name)
        elif user.kind in _SLICES and at == 0:
          total += sum(_bytes(user.type))
        elif user.kind == "fusion":
          inner = self.computations[user.called()["calls"][0]]
          total += self._read(inner, at, size)
        elif user.kind != "dynamic-update-slice" or at != 0:
          return size
    return min(total, size)


def _root(computation: Computation) -> Instruction:
  return next(op for op in computation.values() if op.is_root)


def _written(fused: Computation, out: float) -> float:
  """Counts the bytes that a fusion writes; of an updated array, the update."""
  ends = [_root(fused)]
  if ends[0].kind == "tuple":
    ends = [fused[o] for o in ends[0].operands]
  total, updates = 0.0, False
  for end in ends:
    while end.kind == "bitcast":
      end = fused[end.operands[0]]
    if end.kind == "dynamic-update-slice":
      updates = True
      end = fused[end.operands[1]]
    total += sum(_bytes(end.type))
  return total if updates else out


def _flops(product: Instruction, operands: list[Instruction]) -> int:
  """Counts two for each multiplication of a matrix product."""
  if product.kind not in ("dot", "convolution"):
    return 0
  left, right, out = (
    _numbers(_ARRAY.findall(op.type)[0][1]) for op in (*operands, product)
  )
  if product.kind == "convolution":
    return 2 * _convolution(product.attributes, left, right, out)
  [dims] = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
  return 2 * math.prod(out) * math.prod(left[d] for d in _numbers(dims))


def _convolution(attributes: str, left, right, out) -> int:
  """Counts a TPU's multiplications, whose batches may be in the window."""
  [names] = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
  window = "".join(re.findall(r"window=\{([^}]*)\}", attributes))
  options = re.findall(r"(stride|pad|[lr]hs_dilate)=(\S+)", window)
  lhs, rhs, result = (
    dict(zip(n, s, strict=True))
    for n, s in zip(names, (left, right, out), strict=True)
  )
  total = result["b"] * result["f"] * rhs["i"]
  for place, name in enumerate(sorted(n for n in result if n.isdigit())):
    along = {
      key: int(value.split("x")[place].split("_")[0]) for key, value in options
    }
    total *= _overlap(result[name], rhs[name], lhs[name], **along)
  return total


@functools.cache
def _overlap(
  out: int, size: int, given: int, stride=1, pad=0, lhs_dilate=1, rhs_dilate=1
) -> int:
  """Counts the elements that a window meets along a dimension."""
  at = np.arange(out)[:, None] * stride + np.arange(size) * rhs_dilate - pad
  inside = (at >= 0) & (at // lhs_dilate < given)
  return int((inside & (at % lhs_dilate == 0)).sum())
