"""Loads or makes the models of a run and composes them, also as shapes only."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax.composition import cross_attention, execution, gguf_files
from calm_jax.composition import model as model_lib
from calm_jax.composition.connections import Composition, connect
from calm_jax.composition.execution import Work
from calm_jax.core import trees
from calm_jax.experiments import (
  quantisation_plan,
  saved_composition,
  sharded_models,
)
from calm_jax.experiments.settings import Settings
from calm_jax.language_model import LanguageModel, load_model
from calm_jax.models import decoder, lora, quantisation
from calm_jax.models.config import Compute, ModelConfig
from calm_jax.models.hf import loading
from calm_jax.models.rope import Rope
from calm_jax.parallel.sharding import Layout
from calm_jax.text.tokenizer import Tokenizer
from calm_jax.training.stage import Stage


def load(settings: Settings, layout: Layout | None) -> dict[str, LanguageModel]:
  """Loads the models that the settings name, quantised if they stay so.

  With config.add_to that composition is among them, as "composed".
  """
  loaded = {}
  if saved := saved_composition.load(settings, layout):
    parts, names = settings.parts.items(), dict(saved.spec.augmenting)
    loaded = {"composed": saved} | {
      side: saved.part(part)
      for side, part in parts
      if part.removeprefix("augmenting/") in {"anchor", *names}
    }
  for side, name in settings.checkpoints.items():
    if side in loaded:
      continue
    config = loading.load_config(
      gguf_files.locate(name).folder, settings.ignore
    )
    shapes = decoder.param_shapes(config)
    bits = quantisation_plan.bits_when_loaded(settings, side, shapes)
    shardings = sharded_models.shardings(layout, settings.parts[side])
    loaded[side] = load_model(
      name,
      settings.dtype,
      shardings=shardings,
      quantise=bits,
      ignore=settings.ignore,
    )
  return loaded


def compose(
  settings: Settings,
  tokenizers: dict[str, Tokenizer],
  loaded: dict[str, LanguageModel],
) -> LanguageModel:
  """Composes the loaded models, or fresh ones with these tokenizers instead.

  Under `jax.eval_shape` no weight is made; see `stage_shapes`. The tokenizers
  are by part or side; "augmenting" is that of fresh models without one of
  their own. With config.add_to a composition grows.
  """
  keys = jax.random.split(jax.random.key(settings.seed), 3)
  models = dict(loaded)
  for number, (side, part) in enumerate(settings.parts.items()):
    if side not in models:
      names = [n for n in (part, side, "augmenting") if n in tokenizers]
      tokenizer = tokenizers[names[0]]
      config = scratch_config(settings, side, tokenizer.vocab_size)
      key = _nth(keys[min(number, 1)], number - 1)
      params = {"anchor": decoder.init(key, config)}
      models[side] = LanguageModel(Composition(config), params, tokenizer)
  anchor, saved = models["anchor"], models.get("composed")
  parts = [saved] if saved else []
  kept = saved.params["composition"] if saved else {}
  for number, (side, name) in enumerate(settings.augmenting_sides.items()):
    model = models[side]
    if name in kept:
      continue
    if settings.random_augmenting:
      key = _nth(jax.random.fold_in(keys[2], settings.trial), number)
      fresh = {"anchor": decoder.init(key, model.spec.anchor)}
      params = jax.tree.map(lambda x, p: x.astype(p.dtype), fresh, model.params)
      model = dataclasses.replace(model, params=params)
    options = _composition_options(settings, name)
    parts.append(model_lib.untrained(anchor, {name: model}, **options))
  joined = model_lib.join_compositions(parts)
  composed = model_lib.with_fresh(joined, settings.trial_seed)
  theta = composed.params["composition"] | kept
  device = execution.Device.here()
  return dataclasses.replace(
    composed,
    spec=execution.for_inference(composed.spec, settings.asked, device),
    params=composed.params | {"composition": theta},
  )


def _nth(key: jax.Array, number: int) -> jax.Array:
  """A key itself, or another one for each further model."""
  return jax.random.fold_in(key, number) if number > 0 else key


def stage_shapes(
  settings: Settings, stage: str, configs: dict[str, ModelConfig]
) -> tuple[Composition, dict]:
  """The composition as a stage trains it, without reading or making a weight.

  A loaded model has `settings.dtype`, what this or an earlier stage trains is
  float32, and the frozen models are quantised in the last stage or, if no stage
  trains them, from the start; all as in `run_recipe`, which raises the same.

  Args:
    configs: by side; from the config.json of a model that is loaded, and from
      `scratch_config` of any other.
  """
  dtype = settings.dtype
  configs = {s: c.with_compute(dtype=dtype) for s, c in configs.items()}
  sides, anchor = settings.augmenting_sides, configs["anchor"]
  joined = [
    (n, connect(configs[s], anchor, **_composition_options(settings, n)))
    for s, n in sides.items()
  ]
  spec = Composition(anchor, tuple(joined))
  models = {s: _shapes_when_loaded(settings, s, c) for s, c in configs.items()}
  params = {
    "anchor": models["anchor"],
    "augmenting": {name: models[side] for side, name in sides.items()},
    "composition": cross_attention.param_shapes(spec),
  }
  quantisation_plan.check(settings, params)
  if stage in settings.recipe:
    for earlier in settings.recipe[: settings.recipe.index(stage)]:
      params = _shapes_when_trained(params, settings.stages[earlier])
  if stage in settings.ends:
    params = jax.eval_shape(
      lambda p: add_lora(settings, quantisation_plan.quantise(settings, p))[0],
      params,
    )
  params = _shapes_when_trained(params, settings.stages[stage])
  return spec, params


def scratch_config(
  settings: Settings, side: str, vocab_size: int
) -> ModelConfig:
  """The model of a side as the run trains it from scratch."""
  kind = side.partition("/")[0]
  shape = dataclasses.asdict(getattr(settings, f"{kind}_model"))
  head_dim = shape["width"] // shape["num_heads"]
  return ModelConfig(
    vocab_size=vocab_size,
    head_dim=head_dim,
    rope=Rope(head_dim, shape.pop("rope_theta")),
    compute=Compute(dtype=settings.dtype),
    **shape,
  )


def stage_work(
  stage: Stage, params: dict, layout: Layout | None = None
) -> Work:
  """Measures what one device has to do in a step of a stage.

  Without a layout, leaves that have shardings count as they say.
  """
  mask = trees.mask(params, stage.trainable)
  if layout is not None:
    shardings = layout.shardings(params)
    params = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      params,
      shardings,
    )
  resident = execution.resident_bytes(*trees.partition(params, mask))
  rows, length = stage.batch_size // stage.accumulate, stage.length
  if layout is not None:
    along_rows, along_tokens = layout.rule("batch/anchor/tokens") or ((), ())
    rows = math.ceil(rows / layout.size(along_rows))
    length = math.ceil(length / layout.size(along_tokens))
  packed = getattr(stage.data, "pack", True)
  return Work(stage.model, rows, length, resident, packed)


def add_lora(settings: Settings, params: dict) -> tuple[dict, int]:
  """Adds LoRA to the anchor, if it is asked for: (whole tree, rank or 0)."""
  rank, anchor = settings.lora_rank, params["anchor"]
  if not rank:
    return params, 0
  if rank == -1:
    rank = lora.closest_rank(anchor, trees.count(params["composition"]))
  key = jax.random.fold_in(jax.random.key(settings.trial_seed), 1)
  return params | {"anchor": lora.add(anchor, rank, key)}, rank


def _composition_options(settings: Settings, name: str) -> dict[str, Any]:
  """The arguments of `connect` that the settings give for a name."""
  options = dict(vars(settings.composition_of(name)))
  number = options.pop("num_connections")
  options["connections"] = options["connections"] or number or None
  # Without noise all trials share one program.
  is_noise = options["control"] == "noise"
  options["control_seed"] = settings.trial_seed if is_noise else 0
  return options


def _shapes_when_loaded(
  settings: Settings, side: str, config: ModelConfig
) -> dict:
  """A model's tree before the first stage; a fresh one is float32."""
  shapes = decoder.param_shapes(config)
  if side not in settings.checkpoints:
    return shapes
  bits = quantisation_plan.bits_when_loaded(settings, side, shapes)
  dtype = jnp.dtype(settings.dtype)
  loaded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
  return quantisation.shapes(loaded, bits)


def _shapes_when_trained(params: dict, stage: Stage) -> dict:
  """A tree with the trainable leaves of a stage in float32."""

  def trained(x: jax.ShapeDtypeStruct, is_trainable: bool):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.ShapeDtypeStruct(x.shape, wide if is_trainable else x.dtype)

  return jax.tree.map(trained, params, trees.mask(params, stage.trainable))
