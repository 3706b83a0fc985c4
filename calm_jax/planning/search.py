"""Searches meshes and remat policies that make a job fit a topology.

A compiled program says exactly what it needs, after minutes; a guess by
arithmetic is there at once. The guess only decides what is compiled, and in
which order: what is reported as fitting was compiled.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig
from calm_jax.planning import estimate, flops, programs
from calm_jax.planning.estimate import Estimate
from calm_jax.planning.shapes import Job
from calm_jax.planning.topology import Target

REMATS = ("none", "dots", "full")
_SHORTEST = 128  # tokens of a piece of a row: what a TPU's kernel reads at once

# Of the guess. What is computed with is bfloat16, and scores and logits are
# float32.
_HALF, _FULL = 2, 4
# Along `fsdp`, weights are gathered forward and backward; those of m_A forward
# only, and of those that are trained the gradients are summed besides.
_ANCHOR_GATHERED, _AUGMENTING_GATHERED, _TRAINED_SENT = 2, 1, 3
# Along `tensor`, a layer sums the results of attention and MLP, and as often
# their gradients; both again forward if it is recomputed.
_SUMS, _SUMS_RECOMPUTED = 4, 2
# Beside what is kept for the backward pass, the activations of so many layers
# and the gathered weights of so many are there at once.
_LAYERS_AT_WORK, _WEIGHTS_AT_WORK = 3, 2
# The activations that each policy keeps of a layer, in units of what its matrix
# products make; "full" keeps but its input.
_KEPT = {"dots": 1, "none": 2}
_LOGITS_COPIES = 2  # logits, and their gradients


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
  settings = dataclasses.replace(job.settings, remat=case.remat)
  return job._replace(settings=settings)


def guessed(job: Job, target: Target, case: Case) -> Case:
  """The case with its exact arguments and the rough numbers."""
  try:
    placed = programs.place(with_case(job, case), target, case.axes)
    given = programs.training_given(placed, case.rows).resident()
  except InputError as error:
    return dataclasses.replace(case, reason=str(error))
  arguments = sum(given.values())
  reason = ""
  if arguments > target.chip.hbm:
    reason = "what it is given does not fit"
  sizes = _sizes(placed.job)
  return dataclasses.replace(
    case,
    arguments=arguments,
    guess=arguments + _guess_memory(placed.job, target, case, sizes),
    seconds=_guess_seconds(placed.job, target, case, sizes),
    reason=reason,
  )


class _Sizes(NamedTuple):
  """Numbers of parameters: of layers, of the anchor's head, and Θ_C."""

  anchor: int
  augmenting: int
  head: int
  composition: int


def _sizes(job: Job) -> _Sizes:
  def layers(config: ModelConfig) -> int:
    return trees.count(decoder.param_shapes(config)["layers"])

  anchor = job.spec.anchor
  return _Sizes(
    layers(anchor),
    sum(layers(joined.config) for _, joined in job.spec.augmenting),
    anchor.width * anchor.vocab_size,
    trees.count(job.params["composition"]),
  )


def _tokens_here(job: Job, target: Target, case: Case) -> float:
  """Tokens of a batch that a chip computes with at once."""
  shared = len(target.devices) // case.axes["tensor"]
  return case.rows * job.stage.length / shared / job.stage.accumulate


def _guess_seconds(
  job: Job, target: Target, case: Case, sizes: _Sizes
) -> float:
  """Guesses the time of a step: of its FLOPs, or of what it sends."""
  chip, config, axes = target.chip, job.spec.anchor, case.axes
  if not chip.flops:
    return 0.0
  recompute = case.remat == "full"
  tokens = _tokens_here(job, target, case)
  length = job.stage.length
  work = flops.training_step(job.spec, case.rows, length)
  # A gradient's checkpoint has the anchor run forward twice.
  work += recompute * 2 * case.rows * length * (sizes.anchor + sizes.head)
  fsdp, tensor, sequence = axes["fsdp"], axes["tensor"], axes["sequence"]
  gathered = _ANCHOR_GATHERED * (sizes.anchor + sizes.head)
  gathered += _AUGMENTING_GATHERED * sizes.augmenting
  gathered += _TRAINED_SENT * sizes.composition
  sent = (fsdp - 1) / fsdp / tensor * gathered
  layers = config.num_layers * job.stage.accumulate
  sums = (_SUMS + _SUMS_RECOMPUTED * recompute) * layers
  sent += 2 * (tensor - 1) / tensor * sums * tokens * config.width
  # Each piece of a row reads the keys and values of the others.
  keys_values = 2 * config.num_kv_heads * config.head_dim / tensor
  sent += (2 + recompute) * layers * (sequence - 1) * tokens * keys_values
  return max(work / len(target.devices) / chip.flops, _HALF * sent / chip.links)


def _guess_memory(job: Job, target: Target, case: Case, sizes: _Sizes) -> float:
  """Guesses the bytes on a chip besides the arguments."""
  config, tensor = job.spec.anchor, case.axes["tensor"]
  tokens = _tokens_here(job, target, case)
  heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
  inner = (heads + 2 * config.mlp_width) / tensor
  layer = tokens * (2 * config.width + inner) * _HALF
  if config.compute.attention == "xla":
    scores = job.stage.length * config.num_heads / tensor
    layer += _FULL * tokens * scores
  kept = tokens * config.width * _HALF
  if case.remat in _KEPT:
    kept = _KEPT[case.remat] * layer
  memory = config.num_layers * kept + _LAYERS_AT_WORK * layer
  weights = _WEIGHTS_AT_WORK * sizes.anchor / config.num_layers + sizes.head
  memory += weights / tensor * _HALF
  logits = min(job.settings.loss_chunk, tokens * config.vocab_size)
  return memory + _LOGITS_COPIES * _FULL * logits


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
  return dataclasses.replace(case, found=estimate.estimate(placed, program))


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
