import json

import made_runs
import pytest

from calm_jax.core.errors import InputError
from calm_jax.reporting import runs


def found(*folders):
  return {
    one.name: {key: len(c.runs) for key, c in one.columns.items()}
    for one in runs.find_groups(folders)
  }


def test_kinds_are_columns_and_are_found_by_themselves(tmp_path):
  made_runs.languages(tmp_path / "ntl")
  made_runs.languages(tmp_path / "ntl" / "lora", "lora")
  made_runs.languages(tmp_path / "ntl" / "vanilla", "vanilla")
  expected = ["base", "augmenting", "anchor", "composed", "vanilla", "lora"]
  assert {k: list(v) for k, v in found(tmp_path / "ntl").items()} == {
    "ntl": expected
  }
  # Given twice, and in another order.
  folders = (tmp_path / "ntl" / "lora", tmp_path / "ntl", tmp_path / "ntl")
  assert list(found(*folders)["ntl"]) == expected


def test_work_folders_side_by_side_are_one_experiment_if_kinds_differ(tmp_path):
  made_runs.key_values(tmp_path / "one")
  made_runs.key_values(tmp_path / "two", "lora")
  path = tmp_path / "two" / "results.json"
  results = json.loads(path.read_text())
  results["config"]["output"] = ""
  path.write_text(json.dumps(results))
  both = found(tmp_path / "one", tmp_path / "two")
  assert list(both["one"]) == ["augmenting", "anchor", "composed", "lora"]
  # Another task is another experiment, and so is another run of a kind.
  results["config"]["task"] = {"num_keys": 999}
  path.write_text(json.dumps(results))
  assert list(found(tmp_path / "one", tmp_path / "two")) == ["one", "two"]
  made_runs.key_values(tmp_path / "two")
  assert list(found(tmp_path / "one", tmp_path / "two")) == ["one", "two"]


def test_a_baseline_goes_to_the_run_it_shares_its_stages_with(tmp_path):
  for name in ("a", "b"):
    made_runs.key_values(tmp_path / name)
  made_runs.key_values(tmp_path / "b" / "lora", "lora")
  both = found(tmp_path / "a", tmp_path / "b")
  assert "lora" in both["b"] and "lora" not in both["a"]


@pytest.mark.parametrize("inside", ["", "ablations"])
def test_ablations(tmp_path, inside):
  made_runs.ablations(tmp_path / "sweep", ("lora", "composed"), trials=3)
  assert found(tmp_path / "sweep" / inside) == {
    "sweep ablations": {
      "augmenting": 1, "anchor": 1, "composed": 3, "lora": 3
    }
  }  # fmt: skip
  [one] = runs.find_groups([tmp_path / "sweep" / inside])
  assert [run.folder.name for run in one.runs] == ["0", "1", "2"] * 2
  assert one.runs[0].root == tmp_path / "sweep"
  assert set(one.trials) == {"composed", "lora"}


def test_an_m_a_that_is_another_is_not_called_m_a(tmp_path):
  for kind in ("random", "vanilla"):
    made_runs.text(tmp_path / kind, "vanilla", evals=[("MBPP", "", "pass@1")])
    path = tmp_path / kind / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": kind}))
  columns = found(tmp_path / "random", tmp_path / "vanilla").values()
  assert [list(one) for one in columns] == [
    ["base", "anchor", "vanilla", "random"]
  ]


def test_alternatives_are_columns(tmp_path):
  other = {"direct": {"table1": {"kv_subs": {"composed": 5.0}}}}
  folder = made_runs.key_values(tmp_path / "kv", other_runs=other)
  [one] = runs.find_groups([folder])
  column = one.columns["composed/direct"]
  assert column.label == "composed, direct"
  path = column.runs[0].path("kv_subs", "composed")
  assert path == folder / "predictions" / "direct" / "kv_subs.composed.jsonl"


def test_folders_without_a_run(tmp_path):
  with pytest.raises(InputError, match=r"has no results.json.*calm_jax.train"):
    runs.find_groups([tmp_path])
  path = tmp_path / "results.json"
  path.write_text("{")
  with pytest.raises(InputError, match="not JSON"):
    runs.find_groups([tmp_path])
  for text, message in (
    ("[]", "an object is expected"),
    ('{"seconds": {}}', "none of the sections"),
  ):
    path.write_text(text)
    with pytest.raises(InputError, match=message):
      runs.find_groups([tmp_path])
