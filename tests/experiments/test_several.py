"""Several augmenting models of one config, from its text to its report."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import spelled
from absl import flags
from ml_collections import config_flags

import calm_jax
from calm_jax import evaluate, train
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.evaluate import EvaluateOptions
from calm_jax.experiments import config_files, run_models, saved_composition
from calm_jax.models import quantisation
from calm_jax.planning import shapes
from calm_jax.training.stage import Stage
from configs import compose, kv

LINE = '{"prompt": "a bad cab", "completion": " did jab"}\n'
COLUMNS = ["augmenting/people", "augmenting/code", "augmenting/new", "anchor"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
  """An anchor, a model of its tokens, one of others, and some text."""
  folder = tmp_path_factory.mktemp("models")
  (folder / "text.jsonl").write_text(20 * LINE)
  changes = {
    "anchor": {"width": 12, "head_dim": 6, "num_layers": 3},
    "people": {"width": 20, "num_layers": 5},
    "code": {"num_layers": 3, "text": spelled.ALPHABET + "XYZ"},
  }
  for seed, (name, shape) in enumerate(changes.items()):
    spelled.save(folder / name, seed, **shape)
  return {path.name: str(path) for path in folder.iterdir()}


def config_of(folders, workdir, **augmenting):
  config = compose.get_config()
  config.workdir = str(workdir)
  config.audit.update(examples=3, draws=1)
  config.anchor, config.augmenting = folders["anchor"], augmenting
  for name in ("data", "eval_data", "anchor_eval_data"):
    config[name] = folders["text.jsonl"]
  config.augmenting_model.update(
    width=10, num_layers=2, num_heads=1, num_kv_heads=1, mlp_width=6
  )
  del config.stages.augmenting
  for stage in config.stages.values():
    stage.update(length=24, steps=2, warmup=1, batch_size=2, eval_every=2)
    stage.update(learning_rate=0.1)
  config.stages.compose.data.mixture.data.fraction = 1.0
  config.task.update(num_samples=0, eval_batch_size=2, eval_length=24)
  return config


def three(folders, workdir):
  """Two models that are loaded, and "new", which a stage trains."""
  paths = {"people": folders["people"], "code": folders["code"], "new": ""}
  config = config_of(folders, workdir, **paths)
  config.composition.num_connections = 2
  config.compositions = {
    "people": {"connections": ((5, 1), (2, 3)), "positions": "rope"},
    "code": {"num_connections": 1, "norm": False},
  }
  new = config_files.to_config(
    Stage(model="augmenting/new", trainable=("augmenting/new/.*",))
  )
  new.update({k: v for k, v in config.stages.compose.items() if k in SHARED})
  config.stages.new = new
  config.recipe = ("new", "compose")
  return config


SHARED = ("data", "length", "steps", "warmup", "batch_size", "eval_every")


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
  """(workdir, results) of a run with three augmenting models."""
  workdir = tmp_path_factory.mktemp("run")
  return workdir, train.main(three(folders, workdir))


def test_each_model_has_a_column_and_its_options(finished, folders):
  workdir, results = finished
  assert list(results["bits_per_byte"]["domain"]) == [*COLUMNS, "composed"]
  model = calm_jax.load_composed(workdir / "composition")
  counts = results["parameters"]
  for side in COLUMNS:
    assert counts[side] == model.part(side).num_params
  assert counts["composition"] == counts["trained"]
  assert counts["composition"] == model.num_composition_params
  joined = dict(model.spec.augmenting)
  assert {n: [*map(tuple, a.connections)] for n, a in joined.items()} == {
    "people": [(5, 1), (2, 3)], "code": [(3, 3)], "new": [(1, 2), (2, 3)]
  }  # fmt: skip
  options = [(a.positions, a.norm) for a in joined.values()]
  assert options == [("rope", True), ("none", False), ("none", True)]
  # A fresh model reads the anchor's tokens.
  assert list(model.tokenizers) == ["code"]
  assert model.sources["augmenting/people"].name == folders["people"]
  assert joined["new"].config.width == 10
  report = (workdir / "report.md").read_text()
  assert "m_A people" in report and "trained here from scratch" in report


def test_the_saved_composition_is_evaluated_alike(finished, tmp_path, folders):
  workdir, results = finished
  config = config_of(folders, tmp_path, unused="")
  options = EvaluateOptions(str(workdir / "composition"), str(tmp_path / "out"))
  again = evaluate.main(config, options)
  assert again["parameters"].keys() == {*COLUMNS, "composition"}
  for name, row in results["bits_per_byte"].items():
    assert again["bits_per_byte"][name] == pytest.approx(row, rel=1e-6)
  assert "m_A code" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("stage", ["new", "compose"])
def test_a_plan_has_the_trees_of_the_run(finished, folders, stage):
  workdir, _ = finished
  settings = config_files.read_settings(three(folders, workdir))
  job = shapes.job(settings, stage)
  loaded = run_models.load(settings, None)
  tokenizers = {"augmenting": loaded["anchor"].tokenizer}
  made = run_models.compose(settings, tokenizers, loaded)
  found = {n: x.shape for n, x in trees.flatten(made.params).items()}
  assert {n: x.shape for n, x in trees.flatten(job.params).items()} == found
  assert job.own == {"code": 24}
  batch = shapes.batch(job, 2)
  assert [*batch.visible] == (["code"] if stage == "compose" else [])


def test_all_of_several_are_quantised(folders, tmp_path):
  config = three(folders, tmp_path)
  config.quantise.augmenting = "int8"
  settings = config_files.read_settings(config)
  loaded = run_models.load(settings, None)
  kinds = {side: quantisation.kind_of(m.params) for side, m in loaded.items()}
  assert kinds == {
    "anchor": "", "augmenting/people": "int8", "augmenting/code": "int8"
  }  # fmt: skip
  planned = shapes.job(settings).params
  assert quantisation.kind_of(planned["anchor"]) == ""
  for tree in planned["augmenting"].values():
    assert quantisation.kind_of(tree) == "int8"
  config.stages.compose.trainable = ("augmenting/code/.*",)
  settings = config_files.read_settings(config)
  with pytest.raises(InputError, match="'compose' trains it"):
    shapes.job(settings)


def test_fresh_models_and_connections_all_differ(folders, tmp_path):
  config = config_of(folders, tmp_path, a="", b="", c="")
  config.composition.output_init = "normal"
  config.random_augmenting = True
  settings = config_files.read_settings(config)
  loaded = run_models.load(settings, None)
  tokenizers = {"augmenting": loaded["anchor"].tokenizer}
  random = run_models.compose(settings, tokenizers, loaded).params
  config.random_augmenting = False
  settings = config_files.read_settings(config)
  fresh = run_models.compose(settings, tokenizers, loaded).params
  models = [*random["augmenting"].values(), *fresh["augmenting"].values()]
  embeddings = [m["embed"]["embedding"].tobytes() for m in models]
  assert len(embeddings) == len({*embeddings}) == 6
  queries = [
    leaf.tobytes()
    for name, leaf in trees.flatten(fresh["composition"]).items()
    if name.endswith("query/kernel")
  ]
  assert len(queries) == len({*queries}) == 3


def unknown_options(config):
  config.compositions = {"cod": {"norm": False}}


def unknown_field(config):
  config.compositions = {"code": {"heads": 2}}


def unknown_stage_model(config):
  config.augmenting["new"] = config.augmenting["people"]
  config.stages.new.model = "augmenting/place"


def no_such_leaves(config):
  config.stages.compose.trainable = ("composition/places/.*",)


def unknown_tokenizer(config):
  config.task.tokenizers = {"augmenting/cod": {"pieces": 30, "sources": ()}}


def no_model(config):
  config.augmenting = {}


def not_trained(config):
  config.recipe = ("compose",)


def bad_name(config):
  config.augmenting = {"a/b": config.augmenting["code"], "c": ""}
  config.compositions = {}
  config.stages.new.update(model="augmenting/c", trainable=("augmenting/c/.*",))


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    (unknown_options, r"'cod' is none of \['people', 'code', 'new'\]"),
    (unknown_field, r"config.compositions.code has no field \['heads'\]"),
    (unknown_stage_model, r"augmenting/place"),
    (no_such_leaves, r"composition/places"),
    (unknown_tokenizer, r"'augmenting/cod' is none of"),
    (no_model, r"config.augmenting is \{\}"),
    (not_trained, r"no augmenting/new model: give --config\.augm"),
    (bad_name, r"a name has no / = or ,"),
  ],
)
def test_mistakes_are_found_before_anything_is_trained(
  folders, tmp_path, wrong, said
):
  config = three(folders, tmp_path / "run")
  wrong(config)
  with pytest.raises(InputError, match=said):
    train.main(config)
  assert not list(Path(tmp_path, "run").glob("**/checkpoints/*"))


@pytest.mark.parametrize(
  ("given", "paths"),
  [
    ("--config.augmenting=some/model", {"augmenting": "some/model"}),
    (
      "--config.augmenting={'people': 'a', 'code': 'b'}",
      {"people": "a", "code": "b"},
    ),
  ],
)
def test_a_command_line_names_one_or_several(given, paths):
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
    "config", compose.__file__, "", flag_values=values, sys_argv=["x", given]
  )
  values(["x", given])
  settings = config_files.read_settings(holder.value)
  assert settings.augmenting_paths == paths
  sides = {f"augmenting/{name}" for name in paths}
  assert settings.parts.keys() - {"anchor"} == (
    sides if len(paths) > 1 else {"augmenting"}
  )


def test_one_name_is_the_augmenting_model():
  config = kv.get_config("tiny")
  alone = config_files.read_settings(config)
  config.augmenting = {"kv": ""}
  named = config_files.read_settings(config)
  assert named.parts == alone.parts and named.checkpoints == {}


@pytest.fixture(scope="module")
def first(folders, tmp_path_factory):
  """(composition's folder, results) of a run with "people" alone."""
  workdir = tmp_path_factory.mktemp("first")
  config = config_of(folders, workdir, people=folders["people"])
  config.composition.num_connections = 1
  return workdir / "composition", train.main(config)


def grown(folders, first, workdir):
  """A run that adds a model of other tokens to the first composition."""
  config = config_of(folders, workdir, code=folders["code"])
  config.anchor, config.add_to = "", str(first)
  config.composition.update(num_connections=2, positions="rope")
  return config


def test_a_second_model_leaves_the_first_as_it_was(first, folders, tmp_path):
  folder, before = first
  config = grown(folders, folder, tmp_path)
  results = train.main(config)
  old = calm_jax.load_composed(folder)
  new = calm_jax.load_composed(tmp_path / "composition")
  joined = dict(new.spec.augmenting)
  assert joined["people"] == dict(old.spec.augmenting)["people"]
  assert len(joined["code"].connections) == 2
  assert joined["code"].positions == "rope"
  counts = results["parameters"]
  assert counts["trained"] == trees.count(new.params["composition"]["code"])
  outputs = [
    leaf
    for name, leaf in trees.flatten(new.params["composition"]["code"]).items()
    if name.endswith("output/kernel")
  ]
  assert all(np.any(leaf) for leaf in outputs)
  # Without the new one, the old one's parameters and answers to the bit.
  rest = new.drop("code")
  assert rest.spec == old.spec
  jax.tree.map(np.testing.assert_array_equal, rest.params, old.params)
  scores = rest.score(["a bad"], [" cab"])
  np.testing.assert_array_equal(scores, old.score(["a bad"], [" cab"]))
  assert np.any(new.score(["a bad"], [" cab"]) != scores)
  # Alone, all of them are measured as before.
  columns = results["bits_per_byte"]["domain"]
  alone = before["bits_per_byte"]["domain"]
  assert columns["anchor"] == alone["anchor"]
  assert columns["augmenting/people"] == alone["augmenting"]
  options = EvaluateOptions(
    str(tmp_path / "composition"), str(tmp_path / "out"), drop="code"
  )
  dropped = evaluate.main(config_of(folders, tmp_path, unused=""), options)
  assert dropped["bits_per_byte"] == before["bits_per_byte"]
  assert dropped["parameters"].keys() == {"anchor", "augmenting", "composition"}
  report = (tmp_path / "report.md").read_text()
  assert "m_A people is people" in report and "m_A code is code" in report


def test_before_it_is_trained_a_new_model_changes_no_answer(
  first, folders, tmp_path
):
  folder, _ = first
  settings = config_files.read_settings(grown(folders, folder, tmp_path))
  settings = saved_composition.resolve(settings)
  assert settings.stages["compose"].trainable == ("composition/code/.*",)
  loaded = run_models.load(settings, None)
  made = run_models.compose(settings, {}, loaded)
  scores = made.score(["a bad"] * 2, [" cab", "k a."])
  old = calm_jax.load_composed(folder).score(["a bad"] * 2, [" cab", "k a."])
  np.testing.assert_array_equal(scores, old)
  # A plan knows the trees without a weight.
  job = shapes.job(config_files.read_settings(grown(folders, folder, tmp_path)))
  found = {n: x.shape for n, x in trees.flatten(made.params).items()}
  assert {n: x.shape for n, x in trees.flatten(job.params).items()} == found
  assert [name for name, _ in job.spec.augmenting] == ["people", "code"]
  for (_, ours), (_, planned) in zip(
    made.spec.augmenting, job.spec.augmenting, strict=True
  ):
    assert ours.connections == planned.connections
    assert ours.positions == planned.positions


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"augmenting": {"people": "x"}}, r"named \['people'\] already"),
    ({"anchor": "x"}, "leave config.anchor empty"),
    ({"random_augmenting": True}, "random_augmenting False"),
    ({"compositions": {"people": {}}}, r"'people' is none of \['code'\]"),
    ({"augmenting": ""}, "no augmenting/augmenting model: give"),
  ],
)
def test_what_does_not_fit_a_saved_composition(
  first, folders, tmp_path, change, said
):
  config = grown(folders, first[0], tmp_path)
  for name, value in change.items():
    config[name] = value
  with pytest.raises(InputError, match=said):
    train.main(config)
