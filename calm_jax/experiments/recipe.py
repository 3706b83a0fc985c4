"""The stages of an experiment, from settings to trained models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from calm_jax.composition import model as model_lib
from calm_jax.composition.connections import Composition, paper_count
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.experiments import placement, quantising
from calm_jax.experiments.base import Experiment
from calm_jax.experiments.key_values import KeyValues, KeyValueTask
from calm_jax.experiments.text import Text, TextTask
from calm_jax.language_model import LanguageModel
from calm_jax.models import attention, decoder, lora
from calm_jax.models.config import Compute, ModelConfig
from calm_jax.parallel import processes, sharding
from calm_jax.training import trainer
from calm_jax.training.stage import Stage

EXPERIMENTS = {
  "key_values": (KeyValues, KeyValueTask),
  "text": (Text, TextTask),
}


class Fitted(NamedTuple):
  """A run after its last stage.

  Attributes:
    experiment: its data and evaluation.
    folder: of the results; for a process that is not the first, one that is
      thrown away.
    whole: the frozen models and a fresh composition, as before that stage.
    params: the whole tree after the last stage and after each alternative.
    models: what those made, by the name of the stage.
    alone: the frozen models by themselves, "augmenting" only if it is used.
    parameters: counts, for results.json.
    seconds: of each stage.
    exact: by name, leaves of `params` as they were before quantising.
  """

  experiment: Experiment
  folder: Path
  whole: LanguageModel
  params: dict[str, dict]
  models: dict[str, LanguageModel]
  alone: dict[str, LanguageModel]
  parameters: dict[str, int]
  seconds: dict[str, float]
  exact: dict[str, Any]


def fit(settings: dict[str, Any]) -> Fitted:
  """Runs all stages, from wherever an earlier process left them.

  Raises:
    InputError: the settings ask for what is not there, or the folder holds a
      run of other settings.
  """
  check(settings)
  _check_models(settings)
  workdir = Path(settings["workdir"])
  shared = workdir / settings["output"]
  layout = layout_of(settings)
  folder = processes.own_folder(shared)
  augmenting = f"augmenting/{settings['augmenting_name']}"
  loaded = {
    side: quantising.load(
      settings, side, part, placement.shardings(layout, part)
    )
    for side, part in (("anchor", "anchor"), ("augmenting", augmenting))
    if settings[side]
  }
  make, task = EXPERIMENTS[settings["experiment"]]
  experiment = make(
    task(**settings["task"], seed=settings["seed"]), folder, loaded
  )
  whole = placement.place(
    build_models(settings, experiment.tokenizer, loaded), layout
  )
  spec, params = whole.spec, whole.params
  if layout is not None:
    print(layout.describe(params), flush=True)
  origins = {"anchor": settings["anchor"], augmenting: settings["augmenting"]}
  if settings["random_augmenting"]:
    origins[augmenting] = "random weights"
  *before, last = settings["recipe"]
  ends = [last, *settings["alternatives"]]
  stages = {n: Stage(**settings["stages"][n]) for n in [*before, *ends]}
  quantising.check(settings, params, ends)
  seeds = dict.fromkeys(before, settings["seed"])
  seeds |= dict.fromkeys(ends, _trial_seed(settings))
  # Of all stages: what is wrong with the last is known before the first.
  sources, eval_batches = {}, {}
  for name, stage in stages.items():
    trained = _part(whole, stage.model, params)
    share = 0, 1
    if layout is not None:
      share = layout.share(stage.batch_size, stage.accumulate)
    sources[name] = experiment.source(stage, trained, seeds[name], share)
    eval_batches[name] = experiment.eval_batches(stage, trained)
  # What is quantised later is not to be held besides as it was.
  del loaded, trained
  seconds: dict[str, float] = {}

  def run(name, params):
    trained, seconds[name] = trainer.run_stage(
      name,
      stages[name],
      spec,
      params,
      sources[name],
      eval_batches[name],
      (workdir if name in before else shared) / name,
      origins={k: v for k, v in origins.items() if v},
      seed=seeds[name],
      layout=layout,
      watchdog=settings["watchdog"],
    )
    return trained

  for name in before:
    params = run(name, params)
  params, exact = quantising.quantise(settings, params)
  if layout is not None:
    params = layout.place(params)
  whole = dataclasses.replace(whole, params=params)
  alone = {"anchor": _part(whole, "anchor", params)}
  of_augmenting = _part(whole, augmenting, params)
  if stages[last].model == "composed":
    alone = {"augmenting": of_augmenting} | alone
  params, rank = with_lora(params, settings)
  parameters = {
    "anchor": alone["anchor"].num_params,
    "augmenting": of_augmenting.num_params,
    "composition": trees.count(params["composition"]),
    "composition_paper_count": paper_count(spec),
    "trained": _num_trained(params, stages[last].trainable),
    "lora_rank": rank,
  }
  parameters["trained_minus_composition"] = (
    parameters["trained"] - parameters["composition"]
  )
  finals = {name: run(name, params) for name in ends}
  models = {
    name: _part(whole, stages[name].model, finals[name]) for name in ends
  }
  return Fitted(
    experiment, folder, whole, finals, models, alone, parameters, seconds, exact
  )


def layout_of(settings: dict[str, Any]) -> sharding.Layout | None:
  """Of all arrays of a run; None for one device."""
  layout = placement.layout_of(settings)
  if layout is None and jax.device_count() > 1:
    print(
      f"one of {jax.device_count()} devices is used; --config.mesh.fsdp=-1 "
      "takes all"
    )
  return layout


def check(settings: dict[str, Any]) -> None:
  """Checks that the experiment and the stages are there.

  Raises:
    InputError: they are not, or a workdir that is no folder.
  """
  if settings["experiment"] not in EXPERIMENTS:
    raise InputError(
      f"experiment={settings['experiment']!r} is none of {list(EXPERIMENTS)}"
    )
  if "://" in settings["workdir"]:
    raise InputError(
      f"workdir={settings['workdir']!r} is an address, not a folder: mount the "
      "bucket, as docs/launch.md says, and give the folder"
    )
  if not settings["recipe"]:
    raise InputError("the recipe has no stage: it ends with the composition")
  for name in [*settings["recipe"], *settings["alternatives"]]:
    if name not in settings["stages"]:
      raise InputError(
        f"there is no stage {name!r}; there are {list(settings['stages'])}"
      )


def _check_models(settings: dict[str, Any]) -> None:
  """A model is loaded or trained; one that was forgotten is not made up."""
  if settings["experiment"] == "key_values":
    if given := [s for s in ("anchor", "augmenting") if settings[s]]:
      raise InputError(
        f"the key-value experiment trains its own {' and '.join(given)}: leave "
        "--config.anchor and --config.augmenting empty"
      )
    return
  trained = {settings["stages"][n]["model"] for n in settings["recipe"]}
  if settings["random_augmenting"]:
    trained.add(f"augmenting/{settings['augmenting_name']}")
  for side, part in (
    ("anchor", "anchor"),
    ("augmenting", f"augmenting/{settings['augmenting_name']}"),
  ):
    composed = settings["stages"][settings["recipe"][-1]]["model"] == "composed"
    needed = composed or side == "anchor"
    if needed and not settings[side] and part not in trained:
      raise InputError(
        f"no {side} model: give --config.{side}= a folder or a hub id"
      )


def with_lora(params: dict, settings) -> tuple[dict, int]:
  """The tree with LoRA on the anchor if asked for, and its rank."""
  rank, anchor = settings["lora_rank"], params["anchor"]
  if not rank:
    return params, 0
  if rank == -1:
    rank = lora.closest_rank(anchor, trees.count(params["composition"]))
  key = jax.random.fold_in(jax.random.key(_trial_seed(settings)), 1)
  return params | {"anchor": lora.add(anchor, rank, key)}, rank


def _num_trained(params: dict, trainable) -> int:
  return trees.count(trees.partition(params, trees.mask(params, trainable))[0])


def _trial_seed(settings: dict[str, Any]) -> int:
  return settings["seed"] + settings["trial"]


def _part(whole: LanguageModel, name: str, params: dict) -> LanguageModel:
  """A part of the composition, or all of it, with the given parameters."""
  return dataclasses.replace(whole, params=params).part(name)


def build_models(settings, tokenizer, loaded) -> LanguageModel:
  """The composition with every model loaded or freshly initialised."""
  keys = jax.random.split(jax.random.key(settings["seed"]), 3)
  models = {}
  for side, key in zip(("anchor", "augmenting"), keys, strict=False):
    if side in loaded:
      models[side] = loaded[side]
      continue
    config = scratch(settings, side, tokenizer.vocab_size)
    models[side] = LanguageModel(
      Composition(config), {"anchor": decoder.init(key, config)}, tokenizer
    )
  if settings["random_augmenting"]:
    key = jax.random.fold_in(keys[2], settings["trial"])
    models["augmenting"] = _random(models["augmenting"], key)
  name, joint = settings["augmenting_name"], settings["composition"]
  composed = model_lib.compose(
    models["anchor"],
    {name: models["augmenting"]},
    joint["connections"] or joint["num_connections"] or None,
    visibility=joint["visibility"],
    norm=joint["norm"],
    positions=joint["positions"],
    output_init=joint["output_init"],
    control=joint["control"],
    # One program for all trials of the others.
    control_seed=_trial_seed(settings) if joint["control"] == "noise" else 0,
    seed=_trial_seed(settings),
  )
  return dataclasses.replace(composed, spec=configured(composed.spec, settings))


def scratch(settings, side: str, vocab_size: int) -> ModelConfig:
  """The "anchor" or "augmenting" model that settings train from scratch."""
  shape = settings[f"{side}_model"]
  return ModelConfig(
    vocab_size=vocab_size,
    head_dim=shape["width"] // shape["num_heads"],
    compute=Compute(dtype=settings["dtype"]),
    **shape,
  )


def configured(
  spec: Composition, settings: dict[str, Any], device: jax.Device | None = None
) -> Composition:
  """The composition with what the settings say of how it is computed.

  Args:
    spec: the composition.
    settings: of an experiment.
    device: one of those that will compute; of this process if None.
  """
  device = jax.devices()[0] if device is None else device
  models = {"anchor": spec.anchor}
  models |= {f"augmenting/{n}": a.config for n, a in spec.augmenting}

  def changes(part):
    asked = settings["attention"]
    how = {name: settings[name] for name in ("unroll", "remat", "loss_chunk")}
    return how | {"attention": attention.choose(asked, device, models[part])}

  return spec.with_compute(changes)


def _random(model: LanguageModel, key) -> LanguageModel:
  """The same architecture before any training."""
  fresh = {"anchor": decoder.init(key, model.spec.anchor)}
  params = jax.tree.map(lambda x, p: x.astype(p.dtype), fresh, model.params)
  return dataclasses.replace(model, params=params)
