"""The programs of a run, compiled for a topology from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition import cross_attention, forward
from calm_jax.core import trees
from calm_jax.core.batch import Batch, Sequence
from calm_jax.core.errors import InputError
from calm_jax.experiments import run_models, sharded_models
from calm_jax.generation import batching, decode, decode_steps
from calm_jax.generation.sampling import GREEDY
from calm_jax.parallel import placement, sharding
from calm_jax.planning import flops, shapes
from calm_jax.planning.shapes import Job
from calm_jax.planning.topology import Target
from calm_jax.training import optimizer
from calm_jax.training import step as step_lib

PyTree = Any
KINDS = ("frozen", "trainable", "optimizer", "caches", "batch")
_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Placed(NamedTuple):
  """A job on a mesh.

  Attributes:
    job: with the composition as it computes there.
    layout: None for one device.
    target: what it is compiled for.
  """

  job: Job
  layout: sharding.Layout | None
  target: Target

  def at(self, part: PyTree, shardings: PyTree | None = None) -> PyTree:
    """Shapes with where they lie; replicated without shardings."""
    if self.layout is None:
      whole = jax.sharding.SingleDeviceSharding(self.target.devices[0])
    else:
      whole = jax.sharding.NamedSharding(
        self.layout.mesh, jax.sharding.PartitionSpec()
      )
    if shardings is None or self.layout is None:
      shardings = jax.tree.map(lambda _: whole, part)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      part,
      shardings,
    )

  def params(self, params: PyTree) -> PyTree:
    """Parameters where the rules say."""
    places = None
    if self.layout is not None:
      places = self.layout.shardings(params)
    return self.at(params, places)


def place(job: Job, target: Target, axes: dict[str, int]) -> Placed:
  """A job on a mesh of a topology.

  Raises:
    InputError: the devices do not form such a mesh.
  """
  settings = job.settings
  try:
    layout = sharded_models.make_layout(
      axes, settings.sharding, settings.replicated, target.devices
    )
  except (NotImplementedError, ValueError) as error:
    # What JAX raises, where a torus cannot hold the mesh.
    raise InputError(f"mesh={axes} on {target.name}: {error}") from error
  if not target.exact:
    # The CPU's compiler stands in, and it has no other.
    settings = dataclasses.replace(settings, attention="xla")
  spec = run_models.with_compute(job.spec, settings, target.devices[0])
  if layout is not None:
    spec = spec.with_compute(placement.placements(layout))
  return Placed(job._replace(spec=spec), layout, target)


class Given(NamedTuple):
  """What a program takes.

  Attributes:
    arguments: shapes with shardings.
    kinds: of each of their leaves, of KINDS.
  """

  arguments: tuple
  kinds: tuple

  def resident(self) -> dict[str, int]:
    """Bytes on each device, by kind."""
    memory = dict.fromkeys(KINDS, 0)
    leaves = jax.tree.leaves(self.arguments), jax.tree.leaves(self.kinds)
    for leaf, kind in zip(*leaves, strict=True):
      memory[kind] += bytes_here(leaf)
    return memory


def _all(part: PyTree, kind: str) -> PyTree:
  return jax.tree.map(lambda _: kind, part)


def training_given(placed: Placed, rows: int) -> Given:
  """What a step of training on `rows` rows takes.

  Raises:
    InputError: the devices cannot share the rows.
  """
  job, layout = placed.job, placed.layout
  mask = trees.mask(job.params, job.stage.trainable)
  trainable, frozen = trees.partition(job.params, mask)
  made = optimizer.make_optimizer(job.stage, mask)
  start = functools.partial(step_lib.initial_state, made)
  state = jax.eval_shape(start, trainable)
  batch = shapes.batch(job, rows)
  places = None, None
  if layout is not None:
    layout.share(rows, job.stage.accumulate)
    places = layout.following(state), layout.batch_shardings(batch)
  arguments = (
    placed.at(state, places[0]),
    placed.params(frozen),
    placed.at(batch, places[1]),
  )
  kinds = _all(state, "optimizer") | {"trainable": _all(trainable, "trainable")}
  return Given(arguments, (kinds, _all(frozen, "frozen"), _all(batch, "batch")))


class Program(NamedTuple):
  """A compiled program and what it is given.

  Attributes:
    given: what it takes.
    compiled: None if it does not fit.
    needed: bytes that it would need then, if the compiler says.
    flops: of matrix products of one call, each once, as it was traced.
    in_kernels: how many of those are in kernels of its own.
  """

  given: Given
  compiled: Any
  needed: int
  flops: int
  in_kernels: int


def training(placed: Placed, rows: int) -> Program:
  """One step of training on `rows` rows."""
  stage = placed.job.stage
  mask = trees.mask(placed.job.params, stage.trainable)
  made = optimizer.make_optimizer(stage, mask)
  given = training_given(placed, rows)
  step = step_lib.make_step(placed.job.spec, stage, made, placed.layout)
  return _compile(step.trace(*given.arguments), given)


def decoding(placed: Placed, rows: int, slots: int) -> Program:
  """`decode_steps.advance`: up to CHUNK tokens for each of `rows` rows.

  Caches have `slots` slots, all of which are multiplied with, read or not.
  """
  job, layout = placed.job, placed.layout
  spec, params = forward.submodel(job.spec, job.params, job.stage.model)
  params = jax.eval_shape(cross_attention.fold, params)
  if placed.target.chip.name == "cpu" and layout is None:
    params = _unstacked(params)
  prompt = Sequence(
    *(jax.ShapeDtypeStruct((rows, batching.SHORTEST), jnp.int32),) * 3
  )
  names = [name for name, _ in spec.augmenting]
  batch = Batch(
    prompt,
    dict.fromkeys(job.own, prompt),
    dict.fromkeys(names, prompt.tokens),
    prompt_ends=prompt.tokens,
  )
  row = jax.ShapeDtypeStruct((rows,), jnp.int32)
  stop = jax.ShapeDtypeStruct((1,), jnp.int32)
  every = "anchor", *names
  options = {"slots": tuple((n, slots) for n in every), "sampler": GREEDY}
  lengths = {n: row for n in every if n not in job.own}

  def begin(params, batch, row, stop, lengths):
    return decode_steps.start(
      params, spec, batch, row, stop, lengths, **options
    )

  state = jax.eval_shape(begin, params, batch, row, stop, lengths)
  cache = layout and layout.caches(state.cache)
  rest = placed.at(state._replace(cache=None))
  arguments = (
    placed.params(params),
    rest._replace(cache=placed.at(state.cache, cache)),
    placed.at(stop),
    placed.at(jax.ShapeDtypeStruct((), jnp.int32)),
  )
  traced = decode_steps.advance.trace(
    arguments[0],
    spec,
    *arguments[1:],
    along=tuple(n for n in names if n not in job.own),
    sampler=GREEDY,
    size=decode.CHUNK,
  )
  kinds = _all(rest, "batch")._replace(cache=_all(state.cache, "caches"))
  kinds = _all(params, "frozen"), kinds, "batch", "batch"
  return _compile(traced, Given(arguments, kinds), decode.CHUNK)


def _unstacked(params: dict) -> dict:
  """What `decode_steps.prepare` makes of parameters on one CPU."""

  def one(model):
    layers = model["layers"]
    each = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers
    )
    count = len(jax.tree.leaves(layers)[0])
    return model | {"layers": (each,) * count}

  models = {"anchor": one(params["anchor"])}
  if "augmenting" in params:
    models["augmenting"] = {n: one(p) for n, p in params["augmenting"].items()}
  return params | models


def _compile(traced, given: Given, trips: int | None = None) -> Program:
  """Compiles; a loop of unknown length is taken to run `trips` times."""
  counts = [
    flops.count_jaxpr(traced.jaxpr.jaxpr, trips, kernels_only)
    for kernels_only in (False, True)
  ]
  try:
    return Program(given, traced.lower().compile(), 0, *counts)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    found = _NEEDED.search(str(error))
    needed = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    return Program(given, None, needed, *counts)


def bytes_here(leaf: jax.ShapeDtypeStruct) -> int:
  """Of one array on one device; a typed key is two numbers."""
  size = math.prod(leaf.sharding.shard_shape(leaf.shape))
  is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return size * (8 if is_key else leaf.dtype.itemsize)
