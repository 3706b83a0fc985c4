"""The training command, end to end at its smallest."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import tiny

import calm_jax
from calm_jax import train
from calm_jax.core.errors import InputError
from calm_jax.experiments import config_files, recipe
from calm_jax.training import checkpoint, run_identity, step, trainer
from calm_jax.training.metrics import read_metrics
from configs import kv


def small(workdir):
  """Two steps of each stage, of models of two layers."""
  config = kv.get_config("tiny")
  config.workdir = str(workdir)
  config.alternatives, config.trackers = (), "jsonl"  # draws no figures
  config.task.num_keys = 80
  config.task.num_examples = 8
  config.audit.update(examples=4, draws=1)
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(
      width=8, num_heads=2, num_kv_heads=1, mlp_width=8
    )
  for stage in config.stages.values():
    stage.update(
      steps=2, warmup=1, log_every=1, eval_every=2, checkpoint_every=2,
    )  # fmt: skip
  return config


RECIPE = ["augmenting", "anchor", "anchor_prefix", "compose"]


@pytest.fixture(scope="module", autouse=True)
def cached_programs(tmp_path_factory):
  with tiny.compilation_cache(tmp_path_factory.mktemp("programs")):
    yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(workdir, results) of a run."""
  workdir = tmp_path_factory.mktemp("kv")
  config = small(workdir)
  config.trackers = "jsonl,tensorboard"
  return workdir, train.main(config)


def test_results(finished):
  workdir, results = finished
  on_disk = json.loads((workdir / "results.json").read_text())
  assert on_disk == json.loads(json.dumps(results))  # which has no tuples
  table = results["table1"]
  both = {"augmenting", "anchor", "composed"}
  assert {task: set(row) for task, row in table.items()} == {
    "kv_subs": both,
    "num_math": both,
    "num_math_steps": {"anchor", "composed"},
    "kv_math": both
    | {"composed_held_in", "composed_mixed", "composed_held_out"},
  }
  assert all(0 <= x <= 100 for row in table.values() for x in row.values())
  assert table["kv_math"]["composed"] == table["kv_math"]["composed_held_out"]
  assert list(results["seconds"]) == RECIPE
  assert all(seconds > 0 for seconds in results["seconds"].values())
  assert list(results["stage_flops"]) == RECIPE
  assert all(count > 0 for count in results["stage_flops"].values())
  assert results["other_runs"] == {}
  audit = results["audit"]
  for kind in ("answers", "likelihood"):
    assert list(audit[kind]) == ["kv_subs", "num_math", "kv_math_steps"]
    assert {e["examples"] for e in audit[kind].values()} == {4}
  assert results["config"]["stages"]["compose"]["steps"] == 2


def test_parameters(finished):
  workdir, results = finished
  parameters = results["parameters"]
  saved = {
    stage: checkpoint.restore_trainable(workdir / stage / "checkpoints")[0]
    for stage in ("augmenting", "anchor", "compose")
  }
  sizes = {
    stage: sum(x.size for x in jax.tree.leaves(leaves))
    for stage, leaves in saved.items()
  }
  assert parameters["augmenting"] == sizes["augmenting"]
  assert parameters["anchor"] == sizes["anchor"]
  assert parameters["composition"] == sizes["compose"]
  assert parameters["composition"] == 8 * 8 + 4 * 8**2 + 8 + 8
  assert parameters["composition_paper_count"] == 8 * 8 + 3 * 8**2
  # Each stage trains its own part.
  assert saved["augmenting"].keys() == {"augmenting"}
  assert saved["anchor"].keys() == {"anchor"}
  assert saved["compose"].keys() == {"composition"}


def test_the_report_and_what_it_shows(finished):
  workdir, _ = finished
  report = (workdir / "report.md").read_text()
  page = (workdir / "report.html").read_text()
  assert page.count("data:image/svg+xml;base64,") == 5
  assert "KV-MATH" in report and "KV-MATH" in page
  with np.load(workdir / "attention.npz") as look:
    assert look["weights"].shape[0] == len(look["connections"]) == 1
    assert look["weights"].shape[-1] == len(look["tokens"])
    assert 0 < look["prompt_length"] < len(look["tokens"])


def test_each_stage_is_measured(finished):
  workdir, _ = finished
  for stage in ("augmenting", "anchor", "compose"):
    lines = read_metrics(workdir / stage)
    assert [r["step"] for r in lines if "loss" in r] == [1, 2]
    assert [r["step"] for r in lines if "eval_loss" in r] == [2]


def test_trackers_have_the_tables_figures_and_artefacts(finished):
  workdir, results = finished
  lines = (workdir / "run.jsonl").read_text().splitlines()
  first, *lines, last = map(json.loads, lines)
  assert first["config"]["stages"]["compose"]["steps"] == 2
  assert last == {"failed": False}
  tables = {x["table"]: x for x in lines if "table" in x}
  assert {"table-1", "overhead"} <= tables.keys()
  table = tables["table-1"]
  [row] = [row for row in table["rows"] if row[0] == "NUM-MATH"]
  shown = dict(zip(table["header"], row, strict=True))
  for label, name in ("m_B", "anchor"), ("composed", "composed"):
    assert shown[f"{label} (ours)"] == results["table1"]["num_math"][name]
    assert shown[f"{label} (paper)"] > 70
  figures = {x["figure"]: x["path"] for x in lines if "figure" in x}
  assert {"training-loss", "where-the-composed-model-looks"} <= figures.keys()
  for path in figures.values():
    assert (workdir / path).read_bytes().startswith(b"\x89PNG")
  paths = {x["artefact"]: x["path"] for x in lines if "artefact" in x}
  assert paths == {"report": "report.html", "composition": "composition"}


def test_only_the_first_process_tracks(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  settings = config_files.read_settings(small(tmp_path / "run"))
  with recipe.make_trackers(settings) as trackers:
    assert trackers.started() == []
  assert not (tmp_path / "run").exists()


def test_the_composition_can_be_loaded(finished):
  workdir, results = finished
  model = calm_jax.load_composed(workdir / "composition")
  saved, _ = checkpoint.restore_trainable(workdir / "compose" / "checkpoints")
  jax.tree.map(
    np.testing.assert_array_equal,
    model.params["composition"],
    saved["composition"],
  )
  trained, _ = checkpoint.restore_trainable(
    workdir / "anchor_prefix" / "checkpoints"
  )
  jax.tree.map(
    np.testing.assert_array_equal, model.params["anchor"], trained["anchor"]
  )
  # It answers as it did when it was evaluated.
  file = workdir / "predictions" / "kv_math_held_out.composed.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  asked = [row["prompt"] for row in rows]
  longest = max(len(row["prediction"]) for row in rows) + 1
  for row, text in zip(rows, model.generate(asked, longest), strict=True):
    assert text.startswith(row["prediction"])
  assert results["parameters"]["composition"] == model.num_composition_params


def test_a_second_call_trains_nothing_and_says_the_same(finished, monkeypatch):
  def never(*_):
    raise AssertionError("a finished stage ran")

  workdir, results = finished
  monkeypatch.setattr(step, "make_step", never)
  config = small(workdir)
  config.trackers = results["config"]["trackers"]
  assert train.main(config) == results


def test_a_second_composition_of_the_same_models(finished, monkeypatch):
  workdir, results = finished
  trained = []
  run_stage = trainer.run_stage

  def watched(name, stage, spec, params, *args, **kwargs):
    done = run_identity.completion(args[2])
    trained.append((name, done is not None))
    return run_stage(name, stage, spec, params, *args, **kwargs)

  monkeypatch.setattr(trainer, "run_stage", watched)
  config = small(workdir)
  config.alternatives = ("compose_direct",)
  again = train.main(config)
  assert trained == [
    *((name, True) for name in RECIPE),
    ("compose_direct", False),
  ]
  assert again["table1"] == results["table1"]
  other = again["other_runs"]["compose_direct"]
  assert other["table1"]["kv_math"].keys() == {
    "composed",
    "composed_held_in",
    "composed_mixed",
    "composed_held_out",
  }
  assert other["answer"] == "direct"
  # The models that it composes are those of the other composition.
  frozen = [
    run_identity.completion(workdir / name)["identity"]["frozen"]
    for name in ("compose", "compose_direct")
  ]
  assert frozen[0] == frozen[1]
  assert frozen[0].keys() == {"anchor", "augmenting/kv"}


def test_an_encoder_runs_to_its_report(finished, tmp_path):
  config = small(tmp_path)
  config.composition.visibility = "encoder"
  results = train.main(config)
  # The models themselves are trained the same; only their use differs.
  for column in ("augmenting", "anchor"):
    assert (
      results["table1"]["kv_subs"][column]
      == (finished[1]["table1"]["kv_subs"][column])
    )
  with np.load(tmp_path / "attention.npz") as look:
    assert not look["weights"][..., look["prompt_length"] :].any()


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (
      {"recipe": ("augmenting", "glue")},
      "stage='glue' is none of .*compose_direct",
    ),
    ({"alternatives": ("glue",)}, "stage='glue'"),
    ({"recipe": ()}, "recipe"),
    ({"workdir": "gs://bucket/kv"}, "mount the bucket"),
    ({"anchor": "somewhere"}, "trains its own anchor"),
  ],
)
def test_a_config_that_asks_for_what_is_not_there(change, said, tmp_path):
  config = small(tmp_path / "new")
  config.update(change)
  with pytest.raises(InputError, match=said):
    train.main(config)
  # Known before anything is done.
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  ("change", "said"),
  [
    # Of the last stage, and of what comes after the last stage.
    ({"stages": {"compose": {"length": 12}}}, "raise length"),
    ({"task": {"num_examples": 500}}, "500 asked for"),
    ({"task": {"num_keys": 20}}, "reserved for evaluation"),
  ],
)
def test_data_that_cannot_be_is_known_before_training(
  change, said, tmp_path, monkeypatch
):
  def never(*_, **__):
    raise AssertionError("a stage ran")

  monkeypatch.setattr(trainer, "run_stage", never)
  config = small(tmp_path)
  config.update(change)
  with pytest.raises(InputError, match=said):
    train.main(config)
