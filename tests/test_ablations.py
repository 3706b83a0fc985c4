"""The ablations, end to end at their smallest."""

from __future__ import annotations

import io
import json
import types

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console
from test_train import small

import calm_jax
from calm_jax import ablations, train
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.experiments import config_files, recipe, run_models, variants
from calm_jax.reporting import table, tables
from calm_jax.training import checkpoint, step
from calm_jax.training.trackers import Trackers

KINDS = ("composed", "lora")


@pytest.fixture(scope="module", autouse=True)
def cached_programs(tmp_path_factory):
  with tiny.compilation_cache(tmp_path_factory.mktemp("programs")):
    yield


def asked(workdir, **changes):
  config = quick(workdir)
  config.ablations.update({"kinds": KINDS, "trials": 2} | changes)
  return config


def quick(workdir, *kinds):
  """Of the stages before the last, one."""
  config = small(workdir)
  config.audit.examples = 0
  config.recipe = ("anchor", "compose")
  variants.apply_kinds([*kinds], config)
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(workdir, summary) of two trials of two kinds."""
  workdir = tmp_path_factory.mktemp("ablations")
  return workdir, ablations.main(asked(workdir))


def trained(workdir, kind, trial):
  folder = workdir / "ablations" / kind / str(trial) / "compose"
  saved, meta = checkpoint.restore_trainable(folder / "checkpoints")
  return trees.flatten(saved), meta


def test_what_is_trained_and_how_often(finished):
  workdir, summary = finished
  stages = {p.parent.name for p in workdir.glob("*/complete.json")}
  assert stages == {"anchor"}
  made = workdir.glob("ablations/*/*/compose/complete.json")
  assert len(list(made)) == len(KINDS) * 2
  assert list(summary) == ["m_A", "m_B", "composed", "m_B with LoRA"]
  for name, row in summary.items():
    assert len(row["runs"]) == (1 if name in ("m_A", "m_B") else 2)
  label = "KV-MATH, all keys held-out"
  spread = summary["composed"]["scores"][label]
  values = [run["scores"][label] for run in summary["composed"]["runs"]]
  assert spread["mean"] == pytest.approx(np.mean(values))
  assert (spread["lowest"], spread["highest"]) == (min(values), max(values))


def test_trials_differ_and_kinds_share_their_models(finished):
  workdir, _ = finished
  leaves, metas = {}, {}
  for kind in KINDS:
    for trial in (0, 1):
      leaves[kind, trial], metas[kind, trial] = trained(workdir, kind, trial)
  for kind in KINDS:
    ours, others = leaves[kind, 0], leaves[kind, 1]
    assert any(np.any(ours[n] != others[n]) for n in ours)
  frozen = {key: meta["frozen"] for key, meta in metas.items()}
  assert frozen["composed", 0] == frozen["composed", 1]
  # Without the LoRA leaves, m_B is what it is for all.
  assert frozen["lora", 0] == {"anchor": frozen["composed", 0]["anchor"]}
  assert all("/lora_" in name for name in leaves["lora", 0])
  # Within a trial the batches are the same.
  source = {key: meta["settings"]["source"] for key, meta in metas.items()}
  assert source["composed", 0] == source["lora", 0] != source["lora", 1]


def test_the_number_of_parameters_is_held_equal(finished):
  workdir, summary = finished
  theta = summary["composed"]["runs"][0]
  assert theta["difference"] == 0
  run = summary["m_B with LoRA"]["runs"][0]
  assert run["parameters"] - run["difference"] == theta["parameters"]
  leaves, _ = trained(workdir, "lora", 0)
  assert run["parameters"] == sum(x.size for x in leaves.values())
  # The next rank would not be closer.
  one = run["parameters"] // run["lora_rank"]
  assert abs(run["difference"]) <= one / 2
  text = (workdir / "ablations" / "ablations.md").read_text()
  assert f"{run['parameters']:,} ({run['difference']:+,})" in text


def test_the_table(finished):
  workdir, summary = finished
  on_disk = json.loads((workdir / "ablations/ablations.json").read_text())
  assert on_disk == json.loads(json.dumps(summary))
  made = tables.trials_table(summary)
  assert len(made.rows) == 4
  assert made.header[2] == "KV-MATH, all keys held-out"
  assert {len(row) for row in made.rows} == {len(made.header)}
  console = Console(file=io.StringIO(), width=300)
  table.print_tables([made], console)
  assert "m_B with LoRA" in console.file.getvalue()


def test_a_cell_is_the_mean_and_the_range():
  spread = ablations._spread([{"a": 1.0}, {"a": 4.0}, {"a": 1.0}])
  cell = tables._trials_cell(spread["a"], "a", 3)
  assert str(cell) == "2.0 [1.0 to 4.0, 3 trials]"
  alone = ablations._spread([{"a": 3.0}])["a"]
  assert str(tables._trials_cell(alone, "a", 1)) == "3.0"
  assert str(tables._trials_cell(None, "a", 1)) == "–"


def test_started_again_it_makes_what_is_missing_only(finished, monkeypatch):
  workdir, summary = finished
  monkeypatch.setattr(step, "make_step", None)  # No stage is trained.
  # Killed between the last stage and the end of its evaluation.
  (workdir / "ablations/lora/1/results.json").unlink()
  assert ablations.main(asked(workdir)) == summary

  monkeypatch.setattr(ablations, "execute", None)  # And nothing is evaluated.
  assert ablations.main(asked(workdir)) == summary


def test_a_fine_tuned_m_b_is_written_as_a_checkpoint(finished):
  workdir, _ = finished
  settings = config_files.read_settings(quick(workdir, "finetune"))
  run = recipe.run_recipe(
    settings, Trackers()
  )  # Which takes the m_B that is there.
  counts = run.parameters
  assert counts["trained"] == counts["anchor"]
  assert list(run.frozen_models) == ["anchor"]  # There is no m_A in it.
  train.save_models(run)
  model = calm_jax.load_model(str(workdir / "finetune" / "model"))
  folder = workdir / "finetune" / "compose" / "checkpoints"
  saved, _ = checkpoint.restore_trainable(folder)
  jax.tree.map(np.testing.assert_array_equal, model.params, saved)
  base, _ = checkpoint.restore_trainable(workdir / "anchor" / "checkpoints")
  assert trees.fingerprint(base) != trees.fingerprint(saved)


def test_lora_by_the_training_command(finished):
  workdir, _ = finished
  results = train.main(quick(workdir, "lora"))
  assert set(results["table1"]["kv_math"]) == {
    "anchor", "composed", "composed_held_in", "composed_mixed",
    "composed_held_out",
  }  # fmt: skip
  report = (workdir / "lora" / "report.md").read_text()
  difference = results["parameters"]["trained_minus_composition"]
  assert "| m_B with LoRA |" in report
  assert f"{difference:+,} against Θ_C" in report
  # What it writes has LoRA in its kernels, and answers the same.
  model = calm_jax.load_model(str(workdir / "lora" / "model"))
  file = workdir / "lora/predictions/kv_subs.composed.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  longest = max(len(row["prediction"]) for row in rows) + 1
  texts = model.generate([row["prompt"] for row in rows], longest)
  for row, text in zip(rows, texts, strict=True):
    assert text.startswith(row["prediction"])


def test_a_random_m_a_is_another_in_each_trial(tmp_path):
  tokenizer = types.SimpleNamespace(vocab_size=50, fingerprint="")
  tokenizer.with_rows = lambda rows: tokenizer
  tokenizers = {"anchor": tokenizer, "augmenting": tokenizer}
  made = []
  for kind, trial in (("random", 0), ("random", 1), ("composed", 0)):
    config = asked(tmp_path)
    settings = ablations.plan_trial(config, kind, trial).settings
    made.append(run_models.compose(settings, tokenizers, {}).params)
  kernels = [p["augmenting"]["kv"]["embed"]["embedding"] for p in made]
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert np.abs(kernels[i] - kernels[j]).max() > 1e-3
  jax.tree.map(
    np.testing.assert_array_equal, made[0]["anchor"], made[1]["anchor"]
  )


@pytest.mark.parametrize(
  "changes", [{"kinds": ("composed", "luck")}, {"kinds": ()}, {"trials": 0}]
)
def test_what_cannot_be_asked_for(changes, tmp_path):
  with pytest.raises(InputError, match="give one trial or more"):
    ablations.main(asked(tmp_path / "new", **changes))
  assert not (tmp_path / "new").exists()
