"""Runs an experiment: its stages, its evaluation, its report.

  python -m calm_jax.train --config=configs/kv.py --config.seed=1

Started again by the same command, it goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from calm_jax import cli, composition, language_model, report, trainer
from calm_jax.connections import Composition, paper_count
from calm_jax.errors import InputError
from calm_jax.experiments.key_values import KeyValues, KeyValueTask
from calm_jax.experiments.text import Text, TextTask
from calm_jax.language_model import LanguageModel
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig

EXPERIMENTS = {
  "key_values": (KeyValues, KeyValueTask),
  "text": (Text, TextTask),
}


def main(config: ConfigDict) -> dict[str, Any]:
  """Runs everything that a config asks for; returns results.json."""
  settings = _plain(config)
  if settings["experiment"] not in EXPERIMENTS:
    raise InputError(
      f"experiment={settings['experiment']!r} is none of {list(EXPERIMENTS)}"
    )
  if not settings["recipe"]:
    raise InputError("the recipe has no stage: it ends with the composition")
  names = [*settings["recipe"], *settings["alternatives"]]
  for name in names:
    if name not in settings["stages"]:
      raise InputError(
        f"there is no stage {name!r}; there are {list(settings['stages'])}"
      )
  workdir = Path(settings["workdir"])
  workdir.mkdir(parents=True, exist_ok=True)
  loaded = {
    side: language_model.load_model(settings[side], settings["dtype"])
    for side in ("anchor", "augmenting")
    if settings[side]
  }
  make, task = EXPERIMENTS[settings["experiment"]]
  experiment = make(
    task(**settings["task"], seed=settings["seed"]), workdir, loaded
  )
  whole = _models(settings, experiment.tokenizer, loaded)
  spec, params = whole.spec, whole.params
  origins = {
    "anchor": settings["anchor"],
    f"augmenting/{settings['augmenting_name']}": settings["augmenting"],
  }
  stages = {n: trainer.Stage(**settings["stages"][n]) for n in names}
  # Of all stages: what is wrong with the last is known before the first.
  sources, eval_batches = {}, {}
  for name, stage in stages.items():
    trained = _part(whole, stage.model, params)
    sources[name] = experiment.source(stage, trained, settings["seed"])
    eval_batches[name] = experiment.eval_batches(stage, trained)
  seconds: dict[str, float] = {}

  def run(name, params):
    trained, seconds[name] = trainer.run_stage(
      name,
      stages[name],
      spec,
      params,
      sources[name],
      eval_batches[name],
      workdir / name,
      origins={k: v for k, v in origins.items() if v},
      seed=settings["seed"],
    )
    return trained

  *before, last = settings["recipe"]
  for name in before:
    params = run(name, params)
  composed = {
    name: run(name, params) for name in [last, *settings["alternatives"]]
  }

  augmenting = f"augmenting/{settings['augmenting_name']}"
  columns = {
    "augmenting": _part(whole, augmenting, params),
    "anchor": _part(whole, "anchor", params),
    "composed": _part(whole, "composed", composed[last]),
  }
  results = experiment.evaluate(columns, settings["stages"][last]["data"])
  results["other_runs"] = {
    name: experiment.evaluate(
      {"composed": _part(whole, "composed", composed[name])},
      settings["stages"][name]["data"],
      prefix=f"{name}/",
    )
    for name in settings["alternatives"]
  }
  results |= {
    "parameters": {
      "anchor": columns["anchor"].num_params,
      "augmenting": columns["augmenting"].num_params,
      "composition": columns["composed"].num_composition_params,
      "composition_paper_count": paper_count(spec),
    },
    "seconds": seconds,
    "config": settings,
  }
  look = experiment.look(columns["composed"], settings["stages"][last]["data"])
  np.savez(workdir / "attention.npz", **look)
  report.write_report(workdir, results)
  report.print_results(results)
  return results


def _part(whole: LanguageModel, name: str, params: dict) -> LanguageModel:
  """A part of the composition, or all of it, with the given parameters."""
  spec, params = composition.alone(whole.spec, params, name)
  tokenizer, tokenizers = whole.tokenizer, whole.tokenizers
  if not spec.augmenting:
    params = params["anchor"]
    # The anchor's, where an augmenting model reads the same tokens.
    own = {f"augmenting/{n}": t for n, t in tokenizers.items()}
    tokenizer, tokenizers = own.get(name, tokenizer), {}
  return LanguageModel(spec, params, tokenizer, tokenizers=tokenizers)


def _models(settings, tokenizer, loaded) -> LanguageModel:
  """The composition with every model loaded or freshly initialised."""
  keys = jax.random.split(jax.random.key(settings["seed"]), 3)
  models = {}
  for side, key in zip(("anchor", "augmenting"), keys, strict=False):
    if side in loaded:
      models[side] = loaded[side]
      continue
    shape = settings[f"{side}_model"]
    config = ModelConfig(
      vocab_size=tokenizer.vocab_size,
      head_dim=shape["width"] // shape["num_heads"],
      dtype=settings["dtype"],
      **shape,
    )
    models[side] = LanguageModel(
      Composition(config), decoder.init(key, config), tokenizer
    )
  name, joint = settings["augmenting_name"], settings["composition"]
  composed = language_model.compose(
    models["anchor"],
    {name: models["augmenting"]},
    joint["connections"] or joint["num_connections"] or None,
    visibility=joint["visibility"],
    norm=joint["norm"],
    output_init=joint["output_init"],
    seed=settings["seed"],
  )
  return dataclasses.replace(
    composed, spec=_unrolled(composed.spec, settings["unroll"])
  )


def _unrolled(spec: Composition, unroll: int) -> Composition:
  def one(config):
    return dataclasses.replace(config, unroll=unroll)

  return Composition(
    one(spec.anchor),
    tuple(
      (name, dataclasses.replace(joined, config=one(joined.config)))
      for name, joined in spec.augmenting
    ),
  )


def _plain(value):
  """A ConfigDict as plain dicts, which is all that goes below here."""
  if isinstance(value, ConfigDict):
    return {k: _plain(v) for k, v in value.items()}
  return value


if __name__ == "__main__":
  cli.run_with_config(main)
