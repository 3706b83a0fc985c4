"""What a config trains, as shapes: no weight is read or made."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition import forward
from calm_jax.composition.connections import Composition, connect
from calm_jax.core import files, hub, trees
from calm_jax.core.batch import Batch, Sequence
from calm_jax.core.errors import InputError
from calm_jax.experiments import quantising
from calm_jax.experiments import recipe as recipe_lib
from calm_jax.models import decoder, quantisation
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families, loading
from calm_jax.training.stage import Stage


class Job(NamedTuple):
  """A stage of a config.

  Attributes:
    settings: of the config.
    stage: what is trained.
    spec: of the whole composition.
    params: its tree of shapes, in the dtypes that training keeps.
    own: lengths of augmenting rows, by name, of models with other tokens.
  """

  settings: dict[str, Any]
  stage: Stage
  spec: Composition
  params: dict
  own: dict[str, int]


def job(settings: dict[str, Any], stage: str = "") -> Job:
  """The job of a config.

  Args:
    settings: of the config. A model may also be a config.json by itself.
    stage: of the recipe; its last if empty.

  Raises:
    InputError: there is no such stage or model.
  """
  stage = stage or settings["recipe"][-1]
  if stage not in settings["stages"]:
    raise InputError(f"stage={stage!r} is none of {list(settings['stages'])}")
  asked = Stage(**settings["stages"][stage])
  configs = _models(settings)
  anchor, augmenting = configs["anchor"], configs["augmenting"]
  name, joint = settings["augmenting_name"], dict(settings["composition"])
  del joint["connections"], joint["num_connections"]
  pairs = settings["composition"]["connections"]
  pairs = pairs or settings["composition"]["num_connections"] or None
  joined = connect(augmenting, anchor, pairs, **joint)
  spec = Composition(anchor, ((name, joined),))
  models = {
    "anchor": decoder.param_shapes(anchor),
    "augmenting": {name: decoder.param_shapes(augmenting)},
  }
  models = _quantised(_kept(models, settings, stage), settings, stage)
  params = models | {"composition": forward.param_shapes(spec)}
  params = jax.eval_shape(
    lambda p: recipe_lib.with_lora(p, settings)[0], params
  )
  chosen = trees.flatten(trees.mask(params, asked.trainable))
  params = trees.unflatten(
    {
      leaf: jax.ShapeDtypeStruct(
        x.shape, jnp.promote_types(x.dtype, jnp.float32) if chosen[leaf]
        else x.dtype,
      )
      for leaf, x in trees.flatten(params).items()
    }
  )  # fmt: skip
  own = {}
  if asked.augmenting_length or anchor.vocab_size != augmenting.vocab_size:
    own[name] = asked.augmenting_length or asked.length
  return Job(settings, asked, spec, params, own)


def _kept(models: dict, settings: dict[str, Any], stage: str) -> dict:
  """The models as they come to a stage: what was read has `config.dtype`, and
  what an earlier stage trained, or is made here, float32."""
  recipe = settings["recipe"]
  at = recipe.index(stage) if stage in recipe else -1
  trained = [p for n in recipe[:at] for p in settings["stages"][n]["trainable"]]

  def one(name, x):
    loaded = settings[name.partition("/")[0]]
    wide = not loaded or any(re.fullmatch(p, name) for p in trained)
    dtype = jnp.float32 if wide else jnp.dtype(settings["dtype"])
    return jax.ShapeDtypeStruct(x.shape, dtype)

  return trees.unflatten(
    {n: one(n, x) for n, x in trees.flatten(models).items()}
  )


def _quantised(models: dict, settings: dict[str, Any], stage: str) -> dict:
  """The frozen models in the bits that they have in a stage."""
  name = settings["augmenting_name"]
  last = stage in (settings["recipe"][-1], *settings["alternatives"])

  def one(side, part, shapes):
    kind = settings["quantise"][side]
    quantisation.check(kind)
    if not last:
      kind = quantising.from_the_start(settings, side, part, shapes)
    return quantisation.shapes(shapes, kind)

  small = models["augmenting"][name]
  return {
    "anchor": one("anchor", "anchor", models["anchor"]),
    "augmenting": {name: one("augmenting", f"augmenting/{name}", small)},
  }


def _models(settings) -> dict[str, ModelConfig]:
  sides = "anchor", "augmenting"
  found = {s: _read(settings[s]) for s in sides if settings[s]}
  if len(found) < 2:
    # Models from scratch read the other's tokens, or those of the experiment.
    sizes = [c.vocab_size for c in found.values()]
    size = sizes[0] if sizes else _tokenizer(settings).vocab_size
    found |= {
      side: recipe_lib.scratch(settings, side, size)
      for side in sides
      if side not in found
    }
  return {
    side: config.with_compute(dtype=settings["dtype"])
    for side, config in found.items()
  }


def _read(path_or_hub_id: str) -> ModelConfig:
  if path_or_hub_id.endswith(".json"):
    return families.from_hf(files.read_json(Path(path_or_hub_id)))
  folder = hub.locate(path_or_hub_id, files=[hub.CONFIG]).folder
  return loading.load_config(folder)


def _tokenizer(settings):
  if settings["experiment"] == "text":
    raise InputError(
      "no model is given, so the size of the vocabulary is not known: give "
      "--config.anchor= or --config.augmenting= a folder, a hub id or a "
      "config.json"
    )
  make, task = recipe_lib.EXPERIMENTS[settings["experiment"]]
  with tempfile.TemporaryDirectory() as folder:
    asked = task(**settings["task"], seed=settings["seed"])
    return make(asked, Path(folder), {}).tokenizer


def batch(job: Job, rows: int) -> Batch:
  """A training batch as shapes."""

  def array(length, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((rows, length), dtype)

  L = job.stage.length
  others = job.own if job.stage.model == "composed" else {}
  return Batch(
    Sequence(*[array(L)] * 3),
    {name: Sequence(*[array(length)] * 3) for name, length in others.items()},
    {name: array(L) for name in others},
    prompt_ends=array(L),
    targets=array(L),
    weights=array(L, jnp.float32),
  )
