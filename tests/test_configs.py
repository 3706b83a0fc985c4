"""Every config: its stages can be run, at full size by shapes alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import operator
import pathlib
import types

import helpers
import jax
import numpy as np
import pytest

from calm_jax.composition import forward
from calm_jax.composition.connections import CONTROLS, Composition
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.data import key_value_text, key_values
from calm_jax.evals import tasks
from calm_jax.experiments import recipe, run_models, variants
from calm_jax.experiments.config_files import read_settings
from calm_jax.experiments.key_values import SPLITS, KeyValueExperiment
from calm_jax.experiments.settings import Settings
from calm_jax.language_model import LanguageModel
from calm_jax.training import optimizer
from calm_jax.training.trackers import Trackers
from configs import kv, ntl

FOLDER = pathlib.Path(kv.__file__).parent
FILES = [p.stem for p in sorted(FOLDER.glob("*.py")) if p.stem != "__init__"]
VARIANTS = [
  (file, variant)
  for file in FILES
  for variant in importlib.import_module(f"configs.{file}").VARIANTS
]


def load(file, variant):
  return importlib.import_module(f"configs.{file}").get_config(variant)


def first(file) -> str:
  """The default variant."""
  return next(iter(importlib.import_module(f"configs.{file}").VARIANTS))


def settings_of(file, variant) -> Settings:
  return read_settings(load(file, variant))


def shapes(settings) -> tuple[Composition, dict]:
  """The whole composition of a config without one array."""
  tokenizer = helpers.numbers(26_000)
  loaded = {}
  if settings.experiment == "text":
    joint = settings.composition
    ends = [layer for pair in joint.connections for layer in pair]
    layers = max(4, joint.num_connections, *ends)
    config, params = helpers.model(1, num_layers=layers)
    tokenizer = helpers.numbers(config.vocab_size)
    model = LanguageModel(Composition(config), {"anchor": params}, tokenizer)
    # A config that names no model takes the user's two.
    loaded = dict.fromkeys(settings.checkpoints or settings.parts, model)
  found = []

  def make():
    tokenizers = dict.fromkeys(settings.parts, tokenizer)
    whole = run_models.compose(settings, tokenizers, loaded)
    found.append(whole.spec)
    return whole.params

  params = jax.eval_shape(make)
  return found[0], params


def test_the_variants_are_all_there():
  assert {("kv", "small"), ("kv", "tiny"), ("kv", "paper")} <= {*VARIANTS}
  assert {("compose", "frozen"), ("compose", "domain")} <= {*VARIANTS}


def test_a_further_memory_is_asked_about_those_before():
  settings = settings_of("facts", "third")
  assert settings.add_to == "runs/facts_second/composition"
  assert settings.augmenting_paths == {"strangers": ""}
  earlier = {"people": "runs/facts", "others": "runs/facts_second"}
  mixture = settings.stages["compose"].data.mixture
  for memory, workdir in earlier.items():
    path = f"{workdir}/facts/composed.jsonl"
    assert settings.task.sources[memory].path == path
    assert mixture[memory].weight == 0.2
    path = f"{workdir}/facts/held_out.closed.jsonl"
    assert settings.task.evals[f"{memory}-closed"]["path"] == path


@pytest.mark.parametrize("file", FILES)
def test_the_default_variant_is_the_first(file):
  module = importlib.import_module(f"configs.{file}")
  assert module.get_config().to_dict() == load(file, first(file)).to_dict()


@pytest.mark.parametrize("file", FILES)
def test_a_variant_that_is_not_there(file):
  with pytest.raises(InputError, match="'nope' is none of"):
    load(file, "nope")


@pytest.mark.parametrize(("file", "variant"), VARIANTS)
def test_every_stage_can_be_run(file, variant):
  settings = settings_of(file, variant)
  spec, params = shapes(settings)
  names = [*settings.recipe, *settings.alternatives]
  assert names
  for name in names:
    stage = settings.stages[name]
    # A pattern that matches no leaf raises.
    trainable, frozen = trees.partition(
      params, trees.mask(params, stage.trainable)
    )
    forward.submodel(spec, params, stage.model)
    assert stage.batch_size % stage.accumulate == 0
    optimizer.schedule(stage)
    part = "composition" if stage.model == "composed" else stage.model
    for leaf in trees.flatten(trainable):
      assert leaf.startswith(f"{part}/")
    for leaf in trees.flatten(frozen):
      assert not leaf.startswith(f"{part}/")
    if settings.experiment == "key_values":
      assert stage.length <= spec.anchor.max_length


@pytest.mark.parametrize("variant", ["small", "tiny", "paper"])
def test_the_longest_example_fits_its_row(variant, tmp_path):
  settings = settings_of("kv", variant)
  # Values as large as the real ones, over fewer keys: quick to tokenise.
  task = settings.task
  kv = key_values.make_dictionary(min(task.num_keys, 300), 0.2, 0)
  kv = dataclasses.replace(kv, values=kv.values + task.num_keys - len(kv.keys))
  tokenizer = key_value_text.train_tokenizer(
    kv, tmp_path / "tokenizer", keys=task.keys, digits=task.digits
  )
  for name in [*settings.recipe, *settings.alternatives]:
    stage = settings.stages[name]
    stage = dataclasses.replace(stage, batch_size=256)
    source = KeyValueExperiment.source(
      types.SimpleNamespace(task=task, kv=kv, tokenizers={"anchor": tokenizer}),
      stage, None, seed=0,
    )  # fmt: skip
    # An example that does not fit raises.
    for i in range(20):
      assert source[i].weights.any()


def test_the_papers_size():
  spec, params = shapes(settings_of("kv", "paper"))
  assert (spec.anchor.num_layers, spec.anchor.width) == (8, 384)
  [(name, joined)] = spec.augmenting
  assert (name, joined.config.num_layers, joined.config.width) == ("kv", 4, 128)
  assert list(joined.connections) == [(1, 2), (2, 4), (3, 6), (4, 8)]
  assert trees.count(params["composition"]) == 4 * (
    128 * 384 + 4 * 384**2 + 128 + 384
  )
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}


def test_the_papers_size_takes_minutes():
  """The sum of docs/key_values.md, from what was measured on a GPU."""
  settings = settings_of("kv", "paper")
  seconds = {}
  for name in [*settings.recipe, *settings.alternatives]:
    stage = settings.stages[name]
    tokens = stage.steps * stage.batch_size * stage.length
    is_small = stage.model == "augmenting/kv"
    seconds[name] = round(tokens / (4.0e6 if is_small else 1.35e6))
  assert seconds == {
    "augmenting": 20, "anchor": 121, "anchor_prefix": 73, "compose": 49
  }  # fmt: skip


@pytest.fixture(scope="module")
def paper_run(tmp_path_factory):
  """A step of three stages at the paper's size, but for the models' shapes."""
  config = load("kv", "paper")
  config.workdir = str(tmp_path_factory.mktemp("paper"))
  config.dtype, config.unroll = "float32", 1
  # The stage "anchor" compiles what "anchor_prefix" does, and is left out.
  config.recipe = ("augmenting", "anchor_prefix", "compose")
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(
      width=8, num_layers=4, num_heads=2, num_kv_heads=2, mlp_width=8
    )
  for stage in config.stages.values():
    stage.update(steps=1, batch_size=2, warmup=0)
  return recipe.run_recipe(read_settings(config), Trackers())


def test_the_papers_size_can_be_trained(paper_run):
  [composed] = paper_run.models.values()
  assert list(paper_run.costs) == ["augmenting", "anchor_prefix", "compose"]
  assert composed.tokenizer.decode(composed.tokenizer.encode("25000*3="))
  assert composed.spec.anchor.vocab_size > 25_000
  for name, leaf in trees.flatten(composed.params["composition"]).items():
    assert np.isfinite(leaf).all(), name


def test_expressions_of_the_papers_size(paper_run):
  experiment = paper_run.experiment
  kv = experiment.kv
  assert (len(kv.keys), kv.held_in.sum()) == (25_000, 5_000)
  assert 128 < experiment._longest < 180
  for split in SPLITS:
    drawn = experiment._expressions(split)
    assert set(key_values.num_terms(drawn)) == {3, 4, 5, 6}
    assert set(key_values.num_products(drawn)) == {0, 1}
    assert key_values.is_eval(drawn).all()


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"composition.norms": 1}, "config.composition has no field.*'norms'"),
    ({"stages.compose.stpes": 1}, "config.stages.compose has no field"),
    ({"stages.compose.data.mixture.data.w": 1}, "mixture.data has no field"),
    ({"task.sources.data.pat": ""}, "config.task.sources.data has no field"),
    ({"task.sources.new": {"rows": ""}}, "sources.new.path is not given"),
    ({"oops": 1}, "config has no field.*'oops'"),
    ({"lora_rank": "two"}, "config.lora_rank='two' is no int"),
    ({"mesh.fsdp": 1.5}, "config.mesh.fsdp=1.5 is no int"),
    ({"experiment": "poetry"}, "'poetry' is none of"),
    ({"seed": -1}, "config.seed=-1 must be a whole number, 0 to 4294967295"),
    ({"seed": 2**40}, "config.seed=1099511627776 must"),
    ({"stages.compose.steps": 0}, "compose.steps=0 must be .* 1 or more"),
    ({"stages.compose.batch_size": -2}, "compose.batch_size=-2 must"),
    ({"stages.compose.eval_every": 0}, "compose.eval_every=0 must"),
    ({"stages.compose.warmup": -1}, "compose.warmup=-1 must be .* 0 or more"),
    ({"stages.compose.learning_rate": float("nan")}, "learning_rate=nan must"),
    ({"stages.compose.learning_rate": -1e-3}, "learning_rate=-0.001 must"),
    ({"stages.compose.b2": 1.5}, "compose.b2=1.5 must be a number from 0 to 1"),
    ({"task.eval_batch_size": 0}, "config.task.eval_batch_size=0 must"),
    ({"task.sources.data.bad_lines": 2.0}, "bad_lines=2.0 must"),
    ({"stages.compose.data.mixture.data.fraction": -0.1}, "fraction=-0.1 must"),
    ({"grace": float("inf")}, "config.grace=inf must"),
    ({"lora_rank": -2}, "config.lora_rank=-2 must be .* -1 or more"),
    ({"workdir": "a\udce9"}, "config.workdir is not text that UTF-8 can hold"),
  ],
)
def test_fields_that_are_none_or_of_another_type(change, said):
  config = load("compose", "frozen")
  for name, value in change.items():
    *parents, last = name.split(".")
    owner = functools.reduce(operator.getitem, parents, config)
    with owner.ignore_type(), owner.unlocked():
      owner[last] = value
  with pytest.raises(InputError, match=said):
    read_settings(config)


def test_the_files_of_text_are_named_once():
  config = load("compose", "frozen")
  config.data, config.eval_data = "a.jsonl", "b.jsonl"
  config.anchor_eval_data = "c.jsonl"
  config.text_field = "question"
  task = read_settings(config).task
  paths = {n: s.path for n, s in (task.sources | task.held_out).items()}
  assert paths == {
    "data": "a.jsonl", "domain": "b.jsonl", "anchor_domain": "c.jsonl"
  }  # fmt: skip
  assert task.sources["data"].text_field == "question"


@pytest.mark.parametrize("file", ["ntl", "code"])
def test_the_folder_of_the_data_is_named_once(file):
  config = load(file, "full")
  config.data_dir = "elsewhere"
  task = read_settings(config).task
  for source in [*task.sources.values(), *task.held_out.values()]:
    assert source.path.startswith("elsewhere/")
  for entry in task.evals.values():
    assert entry["path"].startswith("elsewhere/")
    # The arguments that an evaluation takes.
    given = {k: v for k, v in entry.items() if k != "kind"}
    if entry["kind"] in tasks.RUN_CODE:
      given["allow_code_execution"] = True
    fields = dataclasses.fields(tasks.KINDS[entry["kind"]])
    assert given.keys() <= {field.name for field in fields}


@pytest.mark.parametrize(
  ("file", "variant"), [v for v in VARIANTS if v[0] in ("ntl", "code")]
)
def test_stages_learn_from_sources_that_are_there(file, variant):
  settings = settings_of(file, variant)
  task = settings.task
  for name in settings.recipe:
    data = settings.stages[name].data
    assert data.mixture.keys() <= task.sources.keys()
    assert {*data.watch} <= task.held_out.keys()
  fractions = {"ntl": {0.05}, "code": {0.07}}[file]  # the paper's
  if variant == "tiny":
    # Of words, a fifth; and the paper's 7% of so few programs is much.
    fractions = {"ntl": {0.05, ntl.WORDS_OF_D_C}, "code": {0.05}}[file]
  assert {
    share.fraction
    for name, share in settings.stages["compose"].data.mixture.items()
    if variant == "tiny" or name not in ("eng", "gsm8k")  # high-resource text
  } == fractions


@pytest.mark.parametrize("kind", variants.KINDS)
@pytest.mark.parametrize("file", FILES)
def test_every_kind_of_every_config(file, kind):
  plain, settings = (
    settings_of(file, first(file) + more) for more in ("", f",{kind}")
  )
  spec, params = shapes(settings)
  params = jax.eval_shape(lambda p: run_models.add_lora(settings, p)[0], params)
  assert settings.recipe[-1] == plain.recipe[-1]
  stage = settings.last
  trainable, _ = trees.partition(params, trees.mask(params, stage.trainable))
  forward.submodel(spec, params, stage.model)
  # The same data and steps for all, and about as many parameters.
  assert (stage.steps, stage.data) == (plain.last.steps, plain.last.data)
  theta = trees.count(params["composition"])
  if kind != "finetune":
    assert trees.count(trainable) == pytest.approx(theta, rel=0.06)
  joined = spec.augmenting[0][1]
  assert joined.visibility == {
    "encoder": "encoder",
    "unmasked": "unmasked",
  }.get(kind, "causal")
  assert joined.control == (kind if kind in CONTROLS else "none")
  assert settings.output == ("" if kind == "composed" else kind)


@pytest.mark.parametrize("file", FILES)
def test_a_kind_alone_is_of_the_default_variant(file):
  both = load(file, "lora"), load(file, f"{first(file)},lora")
  assert both[0].to_dict() == both[1].to_dict()
  assert both[0].to_dict() != load(file, first(file)).to_dict()


def test_kinds_go_together_and_variants_do_not():
  config = load("kv", "tiny,vanilla,encoder")
  assert config.kind == config.output == "vanilla-encoder"
  assert config.composition.visibility == "encoder"
  assert config.recipe[0] == "augmenting_vanilla"
  with pytest.raises(InputError, match="exclude each other"):
    load("kv", "tiny,paper")


def test_which_stages_a_kind_needs():
  recipes = {kind: load("kv", kind).recipe for kind in variants.KINDS}
  rest = ("anchor", "anchor_prefix", "compose")
  for kind in ("random", "lora", "finetune"):
    assert recipes.pop(kind) == rest
  assert recipes.pop("vanilla") == ("augmenting_vanilla", *rest)
  assert set(recipes.values()) == {("augmenting", *rest)}
  # A vanilla m_A of the text experiment is the checkpoint as it was given.
  assert load("compose", "domain,vanilla").recipe == ("compose",)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_only_fine_tuning_drops_the_anchors_bits(kind):
  config = load("compose", "domain")
  config.quantise.anchor = "int8"
  variants.apply_kinds([kind], config)
  assert config.quantise.anchor == ("" if kind == "finetune" else "int8")


def test_a_vanilla_m_a_of_the_key_value_task_learns_of_no_values():
  stages = load("kv", "vanilla").stages
  for task in stages.augmenting_vanilla.data.tasks:
    assert task.startswith("num_math")
