"""Searches meshes and remat policies that make a job fit a topology.

Compiling a program says exactly what it needs, but takes minutes. A guess by
arithmetic only decides what is compiled, and in which order.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

from calm_jax.composition import execution
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.models import decoder
from calm_jax.models.config import REMATS, ModelConfig
from calm_jax.planning import estimate, flops, programs
from calm_jax.planning.shapes import Job
from calm_jax.planning.topology import Target

_SHORTEST = 128  # tokens of a piece of a row: what a TPU's kernel reads at once

# What the guess assumes. A number is bfloat16; a score or a logit, float32.
_HALF, _FULL = 2, 4
# Along `fsdp`, weights are gathered forward and backward, m_A's only forward;
# of what is trained the gradients are summed besides.
_ANCHOR_GATHERED, _AUGMENTING_GATHERED, _TRAINED_SENT = 2, 1, 3
# Along `tensor`, each layer sums the results of attention and MLP, and their
# gradients; and the results again if it is recomputed.
_SUMS, _SUMS_RECOMPUTED = 4, 2
# Layers whose activations and whose gathered weights are there at once.
_LAYERS_AT_WORK, _WEIGHTS_AT_WORK = 3, 2
_LOGITS_COPIES = 2  # logits, and their gradients


@dataclasses.dataclass(frozen=True)
class Case:
  """One way to run a job, by its mesh, remat policy and rows of a batch."""

  axes: dict[str, int]
  remat: str
  rows: int
  arguments: int = 0  # bytes on a chip of what the step is given, exactly
  guess: float = 0  # bytes on a chip of all that it needs, roughly
  seconds: float = 0  # of a step, roughly
  found: estimate.Estimate | None = None  # if the step was compiled
  reason: str = ""  # why it cannot be

  @property
  def needs(self) -> estimate.Estimate:
    """The needs of the step, once it was compiled."""
    assert self.found is not None
    return self.found

  def __str__(self) -> str:
    sizes = " ".join(f"{n}={s}" for n, s in self.axes.items() if s > 1)
    return f"{sizes or 'one device'}, remat={self.remat}, {self.rows} rows"


def cases(job: Job, target: Target, rows: int) -> Iterator[Case]:
  """Yields every mesh that shares rows and heads, and tokens of few rows.

  `sequence` cuts a row of which a chip would hold no more than that one:
  otherwise the rows themselves are better cut.
  """
  count, pieces = len(target.devices), job.stage.accumulate
  heads, length = job.spec.anchor.num_heads, job.stage.length
  for tensor in (t for t in _divisors(count) if heads % t == 0):
    for sequence in _divisors(count // tensor):
      shared = count // tensor // sequence
      cuts_well = length % sequence == 0 and length // sequence >= _SHORTEST
      if rows % (shared * pieces):
        continue
      if sequence > 1 and (rows > shared * pieces or not cuts_well):
        continue
      for data in _divisors(shared):
        axes = {"data": data, "fsdp": shared // data}
        axes |= {"tensor": tensor, "sequence": sequence}
        yield from (Case(axes, remat, rows) for remat in REMATS)


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def _place(job: Job, target: Target, case: Case) -> programs.Placed:
  """Places a job, with the remat policy of a case, on its mesh."""
  settings = dataclasses.replace(job.settings, remat=case.remat)
  stage = dataclasses.replace(job.stage, batch_size=case.rows)
  job = job._replace(settings=settings, stage=stage)
  return programs.place(job, target, case.axes)


def guessed(job: Job, target: Target, case: Case) -> Case:
  """Fills in the exact arguments and the guesses of a case."""
  try:
    placed = _place(job, target, case)
    given = programs.training_given(placed, case.rows).resident()
  except InputError as error:
    return dataclasses.replace(case, reason=str(error))
  arguments, reason = sum(given.values()), ""
  if arguments > target.chip.hbm:
    reason = "what it is given does not fit"
  # Tokens that a chip computes with at once.
  tokens = case.rows * job.stage.length / job.stage.accumulate
  tokens /= len(target.devices) // case.axes["tensor"]
  return dataclasses.replace(
    case,
    arguments=arguments,
    guess=arguments + _guess_memory(placed.job, case, tokens),
    seconds=_guess_seconds(placed.job, target, case, tokens),
    reason=reason,
  )


@functools.cache
def _layer_params(config: ModelConfig) -> int:
  return trees.count(decoder.param_shapes(config)["layers"])


def _guess_seconds(
  job: Job, target: Target, case: Case, tokens: float
) -> float:
  """Guesses the time of a step: of its FLOPs, or of what it sends."""
  chip, config, length = target.chip, job.spec.anchor, job.stage.length
  if not chip.flops:
    return 0.0
  axes = case.axes
  fsdp, tensor, sequence = axes["fsdp"], axes["tensor"], axes["sequence"]
  recompute = case.remat == "full"
  anchor = _layer_params(config) + config.width * config.vocab_size
  others = sum(_layer_params(a.config) for _, a in job.spec.augmenting)
  work = flops.training_step(job.spec, case.rows, length)
  work += recompute * 2 * case.rows * length * anchor
  gathered = _ANCHOR_GATHERED * anchor + _AUGMENTING_GATHERED * others
  gathered += _TRAINED_SENT * trees.count(job.params["composition"])
  sent = (fsdp - 1) / fsdp / tensor * gathered
  layers = config.num_layers * job.stage.accumulate
  sums = (_SUMS + _SUMS_RECOMPUTED * recompute) * layers
  sent += 2 * (tensor - 1) / tensor * sums * tokens * config.width
  # Each piece of a row reads the keys and values of the others.
  keys_values = 2 * config.num_kv_heads * config.head_dim / tensor
  sent += (2 + recompute) * layers * (sequence - 1) * tokens * keys_values
  return max(work / len(target.devices) / chip.flops, _HALF * sent / chip.links)


def _guess_memory(job: Job, case: Case, tokens: float) -> float:
  """Guesses the bytes on a chip besides the arguments."""
  config, tensor = job.spec.anchor, case.axes["tensor"]
  length = job.stage.length
  shape = config.compute.attention, tokens / length, length, tensor
  layer = execution.activation_bytes(config, *shape)
  kept = execution.kept_bytes(config, case.remat, *shape)
  memory = config.num_layers * kept + _LAYERS_AT_WORK * layer
  weights = _WEIGHTS_AT_WORK * _layer_params(config) / config.num_layers
  weights += config.width * config.vocab_size
  memory += weights / tensor * _HALF
  positions = min(config.compute.loss_chunk or tokens, tokens)
  logits = positions * config.vocab_size / tensor
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
  """Returns all cases, the best first; InputError if no mesh shares the rows.

  Those that were compiled and fit come first, ordered by the least time of a
  step to two digits, then by memory. At most `compiles` are compiled, none
  begun after `until` by `time.monotonic()`; `say` gets lines on the progress.
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
    case = min(open_, key=lambda c: c.guess)
    if hopeful:
      case = min(hopeful, key=lambda c: (c.seconds, c.guess))
    left.remove(case)
    began, cpu = time.monotonic(), time.process_time()
    case = compiled(job, target, case)
    done.append(case)
    scale = max(scale, case.needs.total / case.guess)
    fits = "fits" if case.needs.fits else "does not fit"
    say(
      f"{case}: {case.needs.total / 2**30:.2f} GiB, {fits}; compiled in "
      f"{time.monotonic() - began:.0f} s, of {time.process_time() - cpu:.0f} "
      "CPU seconds"
    )
  return sorted(done + left, key=_rank)


def compiled(job: Job, target: Target, case: Case) -> Case:
  """Fills in what the compiled step of a case needs."""
  placed = _place(job, target, case)
  program = programs.training(placed, case.rows)
  found = estimate.estimate(placed, program)
  remat = placed.job.spec.anchor.compute.remat  # what "auto" came to
  return dataclasses.replace(case, found=found, remat=remat)


def _rank(case: Case) -> tuple[int, float, float]:
  if case.found is None:
    return 3 if case.reason else 2, case.seconds, case.guess
  # Bounds of the same two digits say nothing: less memory is better then.
  step = float(f"{case.found.step:.2g}")
  return int(not case.found.fits), step, case.found.total


def largest(
  job: Job, target: Target, case: Case, *, until: float
) -> tuple[int, list[Case]]:
  """Finds the most rows that fit: by a line through two compiles, and a third.

  `case` is compiled already; `until` is as for `search`. Returns the rows, 0 if
  none was seen to fit, and all cases that were compiled.
  """
  unit = case.axes["data"] * case.axes["fsdp"] * job.stage.accumulate
  seen = {case.rows: case}
  rows = 2 * case.rows
  if not case.needs.fits:
    rows = max(unit, case.rows // 2 // unit * unit)
  for _ in range(3):
    if rows in seen or rows < unit or time.monotonic() > until:
      break
    changed = dataclasses.replace(case, rows=rows, found=None)
    seen[rows] = compiled(job, target, changed)
    rows = _rows_on_line(seen, target.chip.hbm, unit)
  good = [rows for rows, case in seen.items() if case.needs.fits]
  return max(good, default=0), list(seen.values())


def _rows_on_line(seen: dict[int, Case], limit: int, unit: int) -> int:
  """The rows at which the line through the two last totals meets the limit."""
  (a, low), (b, high) = sorted(seen.items())[-2:]
  slope = (high.needs.total - low.needs.total) / (b - a)
  if slope <= 0:
    return 2 * b
  most = a + (limit - low.needs.total) / slope
  return int(most // unit) * unit
