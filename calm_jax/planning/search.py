"""Meshes and remat policies for a topology: guessed, then compiled, best first.

A compiled program says exactly what it needs, after minutes; the arithmetic
here says roughly, at once. It only decides what is compiled, and in which
order: what is reported as fitting was compiled.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.models import decoder
from calm_jax.planning import estimate, programs
from calm_jax.planning.estimate import Estimate
from calm_jax.planning.shapes import Job
from calm_jax.planning.topology import Target

REMATS = ("none", "dots", "full")
_HALF = 2  # bytes of a number while it computes
_SHORTEST = 128  # tokens of a piece of a row: what a TPU's kernel reads at once


@dataclasses.dataclass(frozen=True)
class Case:
  """One way to run a job.

  Attributes:
    axes: of the mesh.
    remat: the policy.
    rows: of a batch.
    arguments: bytes on a chip of what the step is given, exactly.
    guess: bytes on a chip of all that it needs, roughly.
    seconds: of a step, roughly.
    found: the compiled step's; None if it was not compiled.
    reason: why not.
  """

  axes: dict[str, int]
  remat: str
  rows: int
  arguments: int = 0
  guess: float = 0
  seconds: float = 0
  found: Estimate | None = None
  reason: str = ""

  def __str__(self) -> str:
    sizes = " ".join(f"{n}={s}" for n, s in self.axes.items() if s > 1)
    return f"{sizes or 'one device'}, remat={self.remat}, {self.rows} rows"


def cases(job: Job, target: Target, rows: int) -> Iterator[Case]:
  """Every mesh that shares rows and heads, and tokens where rows are few.

  `sequence` cuts a row of which a chip would hold no more than that one:
  otherwise the rows themselves are better cut.
  """
  count, pieces = len(target.devices), job.stage.accumulate
  heads, length = job.spec.anchor.num_heads, job.stage.length
  for tensor in (t for t in _divisors(count) if heads % t == 0):
    for sequence in _divisors(count // tensor):
      shared = count // tensor // sequence
      if rows % (shared * pieces):
        continue
      cut = length // sequence
      if sequence > 1 and (
        rows > shared * pieces or length % sequence or cut < _SHORTEST
      ):
        continue
      for data in _divisors(shared):
        axes = {
          "data": data, "fsdp": shared // data, "tensor": tensor,
          "sequence": sequence,
        }  # fmt: skip
        for remat in REMATS:
          yield Case(axes, remat, rows)


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def with_case(job: Job, case: Case) -> Job:
  """The job with the remat policy of a case."""
  return job._replace(settings=job.settings | {"remat": case.remat})


def guessed(job: Job, target: Target, case: Case) -> Case:
  """The case with its exact arguments and the rough numbers."""
  try:
    placed = programs.place(with_case(job, case), target, case.axes)
    given = programs.training_given(placed, case.rows).resident()
  except InputError as error:
    return dataclasses.replace(case, reason=str(error))
  arguments = sum(given.values())
  memory, seconds = _rough(placed.job, target, case)
  reason = ""
  if arguments > target.chip.hbm:
    reason = "what it is given does not fit"
  return dataclasses.replace(
    case,
    arguments=arguments,
    guess=arguments + memory,
    seconds=seconds,
    reason=reason,
  )


def _rough(job: Job, target: Target, case: Case) -> tuple[float, float]:
  """Bytes beside the arguments, and seconds of a step."""
  c, chip, count = job.spec.anchor, target.chip, len(target.devices)
  fsdp, tensor, sequence = (
    case.axes[name] for name in ("fsdp", "tensor", "sequence")
  )
  theta = trees.count(job.params["composition"])
  anchor, *others = (
    trees.count(decoder.param_shapes(config)["layers"])
    for config in (c, *(a.config for _, a in job.spec.augmenting))
  )
  head = c.width * c.vocab_size
  tokens = case.rows * job.stage.length
  passes = 2 + (case.remat == "full")
  flops = 2 * tokens * (passes * (anchor + head) + sum(others) + 3 * theta)
  share = (fsdp - 1) / fsdp / tensor * _HALF
  sent = share * (2 * (anchor + head) + sum(others) + 3 * theta)
  here = tokens / (count // tensor) / job.stage.accumulate
  turns = c.num_layers * job.stage.accumulate
  sums = (4 + 2 * (case.remat == "full")) * turns
  sent += 2 * (tensor - 1) / tensor * sums * here * c.width * _HALF
  # Each piece of a row reads the keys and values of the others.
  pair = 2 * c.num_kv_heads * c.head_dim / tensor * _HALF
  sent += passes * turns * (sequence - 1) * here * pair
  seconds = 0.0
  if chip.flops:
    seconds = max(flops / count / chip.flops, sent / chip.links)
  inner = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 2 * c.mlp_width
  layer = here * (2 * c.width + inner / tensor) * _HALF
  if c.compute.attention == "xla":
    layer += 4 * here * job.stage.length * c.num_heads / tensor
  kept = {"full": here * c.width * _HALF, "dots": layer, "none": 2 * layer}
  memory = c.num_layers * kept[case.remat] + 3 * layer
  memory += (2 * anchor / c.num_layers + head) / tensor * _HALF
  logits = min(job.settings["loss_chunk"], here * c.vocab_size)
  return memory + 8 * logits, seconds


def search(
  job: Job,
  target: Target,
  rows: int,
  *,
  compiles: int,
  until: float,
  say: Callable[[str], None],
) -> list[Case]:
  """All cases, those that fit and were compiled first, the fastest of them, to
  two digits, before the others.

  Args:
    job: what to train.
    target: on what.
    rows: of a batch.
    compiles: how many cases are compiled at most.
    until: `time.monotonic()` after which no further one is begun.
    say: is told what is being done.

  Raises:
    InputError: no mesh of the topology can share the rows.
  """
  left = [guessed(job, target, case) for case in cases(job, target, rows)]
  if not left:
    raise InputError(
      f"no mesh of the {len(target.devices)} devices of {target.name} shares "
      f"{rows} rows of {job.stage.length} tokens: make the batch a multiple of "
      "a divisor of that, or rows longer"
    )
  say(f"{len(left)} cases, {sum(not c.reason for c in left)} to choose from")
  done, scale = [], 1.0
  while len(done) < compiles and time.monotonic() < until:
    open_ = [c for c in left if not c.reason]
    if not open_:
      break
    hopeful = [c for c in open_ if c.guess * scale <= target.chip.hbm]
    if hopeful:
      case = min(hopeful, key=lambda c: (c.seconds, c.guess))
    else:
      case = min(open_, key=lambda c: c.guess)
    left.remove(case)
    began, cpu = time.monotonic(), time.process_time()
    case = compiled(job, target, case)
    done.append(case)
    if case.found:
      scale = max(scale, case.found.total / case.guess)
      fits = "fits" if case.found.fits else "does not fit"
      say(
        f"{case}: {case.found.total / 2**30:.2f} GiB, {fits}; compiled in "
        f"{time.monotonic() - began:.0f} s, of {time.process_time() - cpu:.0f} "
        "CPU seconds"
      )
  return sorted(done + left, key=_rank)


def compiled(job: Job, target: Target, case: Case) -> Case:
  """The case with what its compiled step needs."""
  placed = programs.place(with_case(job, case), target, case.axes)
  program = programs.training(placed, case.rows)
  return dataclasses.replace(case, found=estimate.of(placed, program))


def _rank(case: Case):
  if case.found is None:
    return 2 if not case.reason else 3, case.seconds, case.guess
  # Bounds of the same two digits say nothing: less memory is better then.
  step = float(f"{case.found.step:.2g}")
  return 0 if case.found.fits else 1, step, case.found.total


def largest(
  job: Job, target: Target, case: Case, *, until: float
) -> tuple[int, list[Case]]:
  """The most rows that fit: a line through two compiles, held by a third.

  Args:
    job: what to train.
    target: on what.
    case: that was compiled.
    until: as for `search`.

  Returns:
    (rows, the cases that were compiled on the way); 0 rows if none was seen to
    fit.
  """
  unit = math.prod(case.axes[n] for n in ("data", "fsdp"))
  unit *= job.stage.accumulate
  seen = {case.rows: case}

  def fits(rows):
    if rows not in seen:
      changed = dataclasses.replace(case, rows=rows, found=None)
      seen[rows] = compiled(job, target, changed)
    return seen[rows].found.fits

  first = case.rows
  second = (
    2 * first if case.found.fits else max(unit, first // 2 // unit * unit)
  )
  for rows in (second, None, None):
    if time.monotonic() > until:
      break
    if rows is None:
      rows = _fitting(seen, target.chip.hbm, unit)
      if rows in seen or rows < unit:
        break
    fits(rows)
  good = [rows for rows in seen if seen[rows].found.fits]
  return max(good, default=0), list(seen.values())


def _fitting(seen: dict[int, Case], limit: int, unit: int) -> int:
  """The rows at which the line through the two last totals meets the limit."""
  (a, low), (b, high) = sorted(seen.items())[-2:]
  slope = (high.found.total - low.found.total) / (b - a)
  if slope <= 0:
    return 2 * b
  most = a + (limit - low.found.total) / slope
  return int(most // unit) * unit
