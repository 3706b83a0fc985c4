"""Every config: its stages can be run, at full size by shapes alone."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import types

import helpers
import jax
import pytest

from calm_jax import train
from calm_jax.composition import forward
from calm_jax.composition.connections import CONTROLS, Composition
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.data import arithmetic
from calm_jax.data.examples import ExampleSource
from calm_jax.evals import tasks
from calm_jax.experiments import recipe
from calm_jax.experiments.key_values import KeyValueTask
from calm_jax.experiments.text import TextTask
from calm_jax.language_model import LanguageModel
from calm_jax.training import optimizer
from calm_jax.training.stage import Stage
from configs import common

FOLDER = pathlib.Path(common.__file__).parent
FILES = [
  p.stem
  for p in sorted(FOLDER.glob("*.py"))
  if p.stem not in ("__init__", "common")
]
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


def shapes(settings) -> tuple[Composition, dict]:
  """The whole composition of a config without one array."""
  tokenizer = types.SimpleNamespace(vocab_size=26_000, fingerprint="")
  loaded = {}
  if settings["experiment"] == "text":
    joint = settings["composition"]
    ends = [layer for pair in joint["connections"] for layer in pair[:1]]
    layers = max(4, joint["num_connections"], *ends)
    config, params = helpers.model(1, num_layers=layers)
    tokenizer.vocab_size = config.vocab_size
    model = LanguageModel(Composition(config), {"anchor": params}, tokenizer)
    sides = ("anchor", "augmenting")
    # A config that names no model takes the user's two.
    named = [side for side in sides if settings[side]] or sides
    loaded = dict.fromkeys(named, model)
  found = []

  def make():
    whole = recipe.build_models(settings, tokenizer, loaded)
    found.append(whole.spec)
    return whole.params

  params = jax.eval_shape(make)
  return found[0], params


def test_the_variants_are_all_there():
  assert {("kv", "small"), ("kv", "tiny"), ("kv", "paper")} <= {*VARIANTS}
  assert {("compose", "frozen"), ("compose", "domain")} <= {*VARIANTS}


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
  settings = train.plain(load(file, variant))
  _, task = recipe.EXPERIMENTS[settings["experiment"]]
  task(**settings["task"], seed=settings["seed"])
  spec, params = shapes(settings)
  names = [*settings["recipe"], *settings["alternatives"]]
  assert names
  for name in names:
    stage = Stage(**settings["stages"][name])
    # A pattern that matches no leaf raises.
    trainable, frozen = trees.partition(
      params, trees.mask(params, stage.trainable)
    )
    forward.alone(spec, params, stage.model)
    assert stage.batch_size % stage.accumulate == 0
    optimizer.schedule(stage)
    part = "composition" if stage.model == "composed" else stage.model
    for leaf in trees.flatten(trainable):
      assert leaf.startswith(f"{part}/")
    for leaf in trees.flatten(frozen):
      assert not leaf.startswith(f"{part}/")
    if settings["experiment"] == "key_values":
      assert stage.length <= spec.anchor.max_length


@pytest.mark.parametrize("variant", ["small", "tiny", "paper"])
def test_the_longest_example_fits_its_row(variant, tmp_path):
  settings = train.plain(load("kv", variant))
  # Values as large as the real ones, over fewer keys: quick to tokenise.
  task = KeyValueTask(**settings["task"], seed=0)
  kv = arithmetic.make_key_values(min(task.num_keys, 300), 0.2, 0)
  kv = dataclasses.replace(kv, values=kv.values + task.num_keys - len(kv.keys))
  tokenizer = arithmetic.train_tokenizer(
    kv, tmp_path / "tokenizer", keys=task.keys, digits=task.digits
  )
  for name in [*settings["recipe"], *settings["alternatives"]]:
    stage = settings["stages"][name]
    data = {
      "min_terms": task.min_terms, "max_terms": task.max_terms,
      "operators": task.operators,
    } | stage["data"]  # fmt: skip
    source = arithmetic.ArithmeticSource(
      kv, tokenizer, data.pop("tasks"), seed=0, batch_size=256,
      length=stage["length"], **data,
    )  # fmt: skip
    # An example that does not fit raises.
    for i in range(20):
      assert source[i]["weights"].any()


def test_the_papers_size():
  spec, params = shapes(train.plain(load("kv", "paper")))
  assert (spec.anchor.num_layers, spec.anchor.width) == (12, 768)
  [(name, joined)] = spec.augmenting
  assert (name, joined.config.num_layers, joined.config.width) == ("kv", 8, 512)
  assert list(joined.connections) == [(4, 6), (8, 12)]
  assert trees.count(params["composition"]) == 2 * (
    512 * 768 + 4 * 768**2 + 512 + 768
  )
  assert 80e6 < trees.count(params["anchor"]) < 150e6
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}


def test_a_stage_of_the_configs_is_a_stage_of_the_trainer():
  names = {field.name for field in dataclasses.fields(Stage)}
  assert names == set(common.stage())


def test_the_files_of_text_are_named_once():
  config = load("compose", "frozen")
  config.data, config.eval_data = "a.jsonl", "b.jsonl"
  config.anchor_eval_data = "c.jsonl"
  config.text_field = "question"
  task = TextTask(**train.plain(config)["task"], seed=0)
  paths = {n: s["path"] for n, s in (task.sources | task.held_out).items()}
  assert paths == {
    "data": "a.jsonl", "domain": "b.jsonl", "anchor_domain": "c.jsonl"
  }  # fmt: skip
  assert task.sources["data"]["text_field"] == "question"


@pytest.mark.parametrize("file", ["ntl", "code"])
def test_the_folder_of_the_data_is_named_once(file):
  config = load(file, "full")
  config.data_dir = "elsewhere"
  task = TextTask(**train.plain(config)["task"], seed=0)
  entries = [*task.sources.values(), *task.held_out.values()]
  for entry in [*entries, *task.evals.values()]:
    assert entry["path"].startswith("elsewhere/")
  # What a source and an evaluation take.
  for entry in entries:
    ExampleSource(**entry)
  for entry in task.evals.values():
    given = {k: v for k, v in entry.items() if k != "kind"}
    if entry["kind"] in tasks.RUN_CODE:
      given["allow_code_execution"] = True
    assert given.keys() <= tasks._keywords(tasks.KINDS[entry["kind"]]).keys()


@pytest.mark.parametrize(
  ("file", "variant"), [v for v in VARIANTS if v[0] in ("ntl", "code")]
)
def test_stages_learn_from_sources_that_are_there(file, variant):
  settings = train.plain(load(file, variant))
  task = settings["task"]
  for name in settings["recipe"]:
    data = settings["stages"][name]["data"]
    assert data["mixture"].keys() <= task["sources"].keys()
    assert {*data["watch"]} <= task["held_out"].keys()
  fraction = {"ntl": 0.05, "code": 0.07}[file]  # the paper's
  if (file, variant) == ("code", "tiny"):
    fraction = 1.0  # of which 7% are too few to learn from
  composed = settings["stages"]["compose"]["data"]["mixture"]
  assert {
    part["fraction"]
    for name, part in composed.items()
    if name not in ("eng", "gsm8k")  # high-resource text
  } == {fraction}


@pytest.mark.parametrize("kind", common.KINDS)
@pytest.mark.parametrize("file", FILES)
def test_every_kind_of_every_config(file, kind):
  plain, settings = (
    train.plain(load(file, first(file) + more)) for more in ("", f",{kind}")
  )
  spec, params = shapes(settings)
  params = jax.eval_shape(lambda p: recipe.with_lora(p, settings)[0], params)
  last, old = settings["recipe"][-1], plain["recipe"][-1]
  assert last == old
  stage = Stage(**settings["stages"][last])
  trainable, _ = trees.partition(params, trees.mask(params, stage.trainable))
  forward.alone(spec, params, stage.model)
  # The same data and steps for all, and about as many parameters.
  before = plain["stages"][last]
  assert (stage.steps, stage.data) == (before["steps"], before["data"])
  theta = trees.count(params["composition"])
  if kind != "finetune":
    assert trees.count(trainable) == pytest.approx(theta, rel=0.06)
  joined = spec.augmenting[0][1]
  assert joined.visibility == {
    "encoder": "encoder",
    "unmasked": "unmasked",
  }.get(kind, "causal")
  assert joined.control == (kind if kind in CONTROLS else "none")
  assert settings["output"] == ("" if kind == "composed" else kind)


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
  recipes = {kind: load("kv", kind).recipe for kind in common.KINDS}
  rest = ("anchor", "anchor_prefix", "compose")
  for kind in ("random", "lora", "finetune"):
    assert recipes.pop(kind) == rest
  assert recipes.pop("vanilla") == ("augmenting_vanilla", *rest)
  assert set(recipes.values()) == {("augmenting", *rest)}
  # A vanilla m_A of the text experiment is the checkpoint as it was given.
  assert load("compose", "domain,vanilla").recipe == ("compose",)


@pytest.mark.parametrize("kind", common.KINDS)
def test_kinds_drop_what_they_cannot_have(kind):
  config = load("compose", "domain")
  config.quantise.anchor = "int8"
  common.become([kind], config)
  assert config.quantise.anchor == ("" if kind == "finetune" else "int8")


def test_a_vanilla_m_a_of_the_key_value_task_learns_of_no_values():
  stages = load("kv", "vanilla").stages
  for task in stages.augmenting_vanilla.data.tasks:
    assert task.startswith("num_math")
