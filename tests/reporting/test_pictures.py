import json

import made_runs
import numpy as np
import pytest

from calm_jax.core.errors import InputError
from calm_jax.reporting import effort, pictures, runs


def drawn(folder):
  [one] = runs.find_groups([folder])
  return {p.title: p for p in pictures.pictures(one)}


def test_what_there_is_data_for(tmp_path):
  assert list(drawn(made_runs.key_values(tmp_path / "kv"))) == [
    "Accuracy by number of terms",
    "Training loss",
    "Where the composed model looks",
  ]
  found = drawn(made_runs.languages(tmp_path / "ntl"))
  assert list(found) == [
    "Figure 2: gains of the composed model, FLORES-200",
    "Gains of the composed model, MGSM",
    "Gains of the composed model, GSM8K",
    "Training loss",
    "Where the composed model looks",
  ]
  caption = found["Figure 2: gains of the composed model, FLORES-200"].caption
  assert "in the order of the config's task.languages" in caption
  assert "Above 0 for 5 of 5 (the paper: 175 of 192)" in caption
  assert "by name" in found["Gains of the composed model, MGSM"].caption
  first, *_ = drawn(made_runs.code(tmp_path / "code"))
  assert first.endswith("CodeXGLUE")


def test_accuracy_by_trained_parameters(tmp_path):
  folder = made_runs.facts(tmp_path / "facts")
  title = "Accuracy by trained parameters"
  # One model that was trained is no comparison.
  assert title not in drawn(folder)
  made_runs.facts(folder / "lora", "lora", trained=81_000)
  found = drawn(folder)
  assert next(iter(found)) == title
  assert not any(title.startswith("Gains") for title in found)
  [group] = runs.find_groups([folder])
  efforts = effort.efforts(group, made_runs.QUESTIONS)
  # The mean of both kinds of questions, of 16 answers.
  assert {e.label: (e.trained, e.accuracy) for e in efforts} == {
    "m_A": (0, 12.5),
    "m_B": (0, 20.5),
    "m_A's answer in m_B's prompt": (0, 50.0),
    "composed": (80_000, 26.0),
    "m_B with LoRA": (81_000, 22.5),
  }
  for one in efforts:
    assert one.low < one.accuracy < one.high
  figure = found[title].figure
  [axes] = figure.axes
  assert len(axes.containers) == 2
  with pytest.raises(InputError, match="trained"):
    effort.effort_figure({"title": efforts[:3]})


def test_a_benchmark_that_one_trained_model_answered_is_not_drawn(tmp_path):
  folder = made_runs.facts(tmp_path / "facts")
  made_runs.facts(folder / "lora", "lora", trained=81_000)
  path = folder / "results.json"
  results = json.loads(path.read_text())
  for name, entry in list(results["evals"].items()):
    if entry["task"] == "questions":
      more = entry | {"group": "skipped by LoRA"}
      results["evals"][f"{name}-more"] = more
  path.write_text(json.dumps(results))
  figure = drawn(folder)["Accuracy by trained parameters"].figure
  assert [axes.get_title() for axes in figure.axes] == [made_runs.QUESTIONS]


def test_languages_go_from_low_to_high_resource():
  results = {
    "config": {"task": {"languages": ["c", "a", "x"]}},
    "bits_per_byte": {
      "a": {"anchor": 1.0}, "b": {"anchor": 3.0}, "c": {"anchor": 2.0}
    },
  }  # fmt: skip
  codes, how = pictures.language_order(results, ["a", "b", "c"])
  assert codes == ["c", "a", "b"]
  assert "config" in how and "without a place in it (b)" in how
  # A list by name says nothing of resources.
  results["config"]["task"]["languages"].sort()
  codes, how = pictures.language_order(results, ["a", "b", "c"])
  assert codes == ["b", "c", "a"] and "many to few bits per byte" in how
  codes, how = pictures.language_order({}, ["b", "a"])
  assert codes == ["a", "b"] and "not known" in how


def test_stages_are_in_the_order_they_were_run(tmp_path):
  for name in ("compose", "augmenting", "aside"):
    made_runs.stage(tmp_path, name)
  made_runs.write_lines(tmp_path / "quiet" / "metrics.jsonl", [{"step": 1}])
  stages = pictures.stages([tmp_path], ["compose", "augmenting", "absent"])
  assert list(stages) == ["compose", "augmenting", "aside"]


def test_stages_that_all_kinds_share_are_drawn(tmp_path):
  folder = made_runs.ablations(tmp_path / "sweep")
  made_runs.stage(folder, "augmenting")
  figure = drawn(folder)["Training loss"].figure
  titles = {axes.get_title() for axes in figure.axes}
  assert titles == {"anchor", "compose", "augmenting"}


def test_attention_that_is_not_of_a_run(tmp_path):
  folder = made_runs.key_values(tmp_path / "kv")
  np.savez(folder / "attention.npz", weights=np.zeros(3))
  with pytest.raises(InputError, match="prompt_length"):
    drawn(folder)


def test_attention_of_two_tokenizers(tmp_path):
  folder = made_runs.key_values(tmp_path / "kv")
  with np.load(folder / "attention.npz") as arrays:
    look = dict(arrays)
  look |= {"augmenting_tokens": np.array([*"abcdefghi"])}
  np.savez(folder / "attention.npz", **look)
  figure = drawn(folder)["Where the composed model looks"].figure
  assert figure.axes[0].images[0].get_array().shape == (3, 9)


def test_a_broken_metrics_file(tmp_path):
  folder = made_runs.key_values(tmp_path / "kv")
  (folder / "compose" / "metrics.jsonl").write_text("{\n{}\n")
  with pytest.raises(ValueError, match="line 1"):
    drawn(folder)
  assert json.loads((folder / "results.json").read_text())
