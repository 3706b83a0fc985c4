"""Compiles the programs of a run for a topology, from shapes alone."""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from calm_jax.composition import execution, forward, inference
from calm_jax.core import flops, trees
from calm_jax.core.batch import plain_batch, plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.experiments import run_models, sharded_models
from calm_jax.generation import batching, decode, decode_steps, followers
from calm_jax.generation.sampling import GREEDY
from calm_jax.parallel import placement, sharding
from calm_jax.planning import gpu_topology, shapes
from calm_jax.planning.shapes import Job
from calm_jax.planning.topology import Target
from calm_jax.training import optimizer
from calm_jax.training import step as step_lib

PyTree = Any
KINDS = ("frozen", "trainable", "optimizer", "caches", "batch")
_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Placed(NamedTuple):
  """A job on a mesh; its composition computes as it does there."""

  job: Job
  layout: sharding.Layout | None  # None for one device
  target: Target

  def at(self, part: PyTree, shardings: PyTree | None = None) -> PyTree:
    """Gives shapes their shardings; without any they are replicated."""
    replicated = jax.sharding.SingleDeviceSharding(self.target.devices[0])
    if self.layout is not None:
      spec = jax.sharding.PartitionSpec()
      replicated = jax.sharding.NamedSharding(self.layout.mesh, spec)
    if shardings is None:
      shardings = jax.tree.map(lambda _: replicated, part)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      part,
      shardings,
    )

  def params(self, params: PyTree) -> PyTree:
    """Gives parameters the shardings of the rules."""
    layout = self.layout
    return self.at(params, None if layout is None else layout.shardings(params))


def place(job: Job, target: Target, axes: dict[str, int]) -> Placed:
  """Places a job on a mesh; InputError if the devices do not form it."""
  settings, asked = job.settings, job.settings.asked
  try:
    layout = sharded_models.make_layout(
      axes, settings.sharding, settings.replicated, target.devices
    )
  except (NotImplementedError, ValueError) as error:
    # What JAX raises, where a torus cannot hold the mesh.
    raise InputError(f"mesh={axes} on {target.name}: {error}") from error
  if not target.exact:
    # The CPU's compiler stands in, and it has no other.
    asked = dataclasses.replace(asked, attention="xla")
  work = run_models.stage_work(job.stage, job.params, layout)
  spec = execution.for_training(job.spec, asked, target.kind, work)
  if layout is not None:
    spec = spec.with_compute(placement.placements(layout))
  return Placed(job._replace(spec=spec), layout, target)


class Given(NamedTuple):
  """The arguments of a program, and their leaves by kind, one of KINDS."""

  arguments: tuple  # shapes with shardings
  by_kind: dict[str, PyTree]

  def resident(self) -> dict[str, int]:
    """Counts the bytes on each device, by kind."""
    return {
      kind: sum(map(bytes_here, jax.tree.leaves(self.by_kind.get(kind))))
      for kind in KINDS
    }


def training_given(placed: Placed, rows: int) -> Given:
  """Describes the arguments of a step of training on `rows` rows.

  InputError if the devices cannot share the rows.
  """
  job, layout = placed.job, placed.layout
  mask = trees.mask(job.params, job.stage.trainable)
  trainable, frozen = trees.partition(job.params, mask)
  made = optimizer.make_optimizer(job.stage, mask)
  start = functools.partial(step_lib.initial_state, made)
  state, batch = jax.eval_shape(start, trainable), shapes.batch(job, rows)
  of_state = of_batch = None
  if layout is not None:
    layout.share(rows, job.stage.accumulate)
    of_state = layout.following(state)
    of_batch = layout.batch_shardings(batch)
  state, batch = placed.at(state, of_state), placed.at(batch, of_batch)
  frozen, rest = placed.params(frozen), dict(state)
  by_kind = {"trainable": rest.pop("trainable"), "frozen": frozen}
  return Given(
    (state, frozen, batch), by_kind | {"optimizer": rest, "batch": batch}
  )


class CompiledProgram(NamedTuple):
  """A program, its arguments, and what it computes in one call."""

  given: Given
  compiled: Any  # None if it does not fit
  needed: int  # bytes that it would need then, if the compiler says
  flops: int  # of matrix products, each once, as it was traced
  in_kernels: int  # how many of those are in Pallas kernels


def training(placed: Placed, rows: int) -> CompiledProgram:
  """Compiles one step of training on `rows` rows."""
  job, given = placed.job, training_given(placed, rows)
  mask = trees.mask(job.params, job.stage.trainable)
  made = optimizer.make_optimizer(job.stage, mask)
  step = step_lib.make_step(job.spec, job.stage, made, placed.layout)
  with gpu_topology.capability_of(placed.target.devices[0]):
    traced = step.trace(*given.arguments)
  return _compile(traced, given)


class Prompts(NamedTuple):
  """The prompts that a batch of an evaluation reads, and room for answers."""

  rows: int
  length: int  # tokens of each row
  slots: int  # of a cache of the anchor's tokens, answers included


def longest_prompts(job: Job, rows: int) -> Prompts:
  """Describes the longest that the config's evaluations ask, as `decode` does.

  Without any, a prompt and its answer are as long as a row of training.
  """
  task, length, new = job.settings.task, job.stage.length, 0
  if evals := getattr(task, "evals", None):
    new = max(asked["max_new_tokens"] for asked in evals.values())
    readers = [job.spec.anchor]
    readers += [a.config for n, a in job.spec.augmenting if n not in job.own]
    limit = min(config.max_length for config in readers)
    length = min(task.prompt_tokens, limit - new)
  length = batching.round_up(length)
  return Prompts(rows, length, batching.round_up(length + new + decode.CHUNK))


def _start(placed: Placed, prompts: Prompts) -> tuple[tuple, dict[str, Any]]:
  """Makes the arguments of `decode_steps.start`, by position and by name."""
  job, target = placed.job, placed.target
  spec, params = forward.submodel(job.spec, job.params, job.stage.model)
  count = 1 if placed.layout is None else len(target.devices)
  arrangement = execution.layout(target.kind, count, 0, None)
  spec, params = inference.shapes(spec, params, arrangement)
  prompts_BL = np.zeros((prompts.rows, prompts.length), np.int32)
  slots, own = {"anchor": prompts.slots}, {}
  for name, joined in spec.augmenting:
    slots[name] = prompts.slots
    if name in job.own:
      length = min(prompts.length, joined.config.max_length)
      own[name] = prompts_BL[:, :length]
      slots[name] = followers.first_slots(length)
  # Counts for all models, as `batching` makes them.
  batch = plain_batch(prompts_BL)._replace(
    augmenting={name: plain_sequence(rows_BM) for name, rows_BM in own.items()},
    visible={name: prompts_BL for name, _ in spec.augmenting},
    prompt_ends=prompts_BL,
  )
  seeds_B, stop_S = np.zeros(prompts.rows, np.uint32), np.zeros(1, np.int32)
  rest = placed.at((batch, seeds_B, stop_S, np.int32(0)))
  options = {"slots": tuple(slots.items()), "sampler": GREEDY}
  return (placed.params(params), spec, *rest), options


def reading(placed: Placed, prompts: Prompts) -> CompiledProgram:
  """Compiles `decode_steps.start`, which reads prompts and makes the caches."""
  arguments, options = _start(placed, prompts)
  params, _, *batch = arguments
  given = Given((params, *batch), {"frozen": params, "batch": batch})
  with gpu_topology.capability_of(placed.target.devices[0]):
    traced = decode_steps.start.trace(*arguments, **options)
  return _compile(traced, given)


def decoding(placed: Placed, prompts: Prompts) -> CompiledProgram:
  """Compiles `decode_steps.advance_on`: up to CHUNK tokens after prompts.

  All slots of the caches are multiplied with, read or not.
  """
  arguments, options = _start(placed, prompts)
  (params, spec, *_), layout = arguments, placed.layout
  state = decode_steps.start.eval_shape(*arguments, **options)
  of_caches = None if layout is None else layout.caches(state.cache)
  caches = placed.at(state.cache, of_caches)
  rest, steps = placed.at((state._replace(cache=None), np.int32(decode.CHUNK)))
  state = rest._replace(cache=caches)
  by_kind = {"frozen": params, "caches": caches, "batch": (rest, steps)}
  given = Given((params, state, steps), by_kind)
  platform = placed.target.devices[0].platform
  advance = decode_steps.advance_on(platform, params)
  traced = advance.trace(
    params, spec, state, steps, sampler=GREEDY, size=decode.CHUNK
  )
  return _compile(traced, given, decode.CHUNK)


def _compile(traced, given: Given, trips: int | None = None) -> CompiledProgram:
  """Compiles; a loop of unknown length is taken to run `trips` times."""
  counts = [
    flops.count_jaxpr(traced.jaxpr.jaxpr, trips, kernels_only)
    for kernels_only in (False, True)
  ]
  try:
    return CompiledProgram(given, traced.lower().compile(), 0, *counts)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    asked = _NEEDED.search(str(error))
    needed = int(float(asked[1]) * _UNITS[asked[2]]) if asked else 0
    return CompiledProgram(given, None, needed, *counts)


def bytes_here(leaf: jax.ShapeDtypeStruct) -> int:
  """Counts the bytes of an array on one device; a random key has 8."""
  size = math.prod(leaf.sharding.shard_shape(leaf.shape))
  is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return size * (8 if is_key else leaf.dtype.itemsize)
