import json

import made_runs
import pytest

from calm_jax.core.errors import InputError
from calm_jax.reporting import examples, runs

NEITHER, ONLY_A, ONLY_B, BOTH, LOST, NONE = dict.fromkeys(
  examples.KINDS.values()
)


def test_each_kind_is_counted_and_the_first_of_it_shown(tmp_path):
  folder = made_runs.languages(tmp_path / "ntl")
  found = {one.title: one for one in examples.choose(runs.read(folder))}
  assert list(found) == ["FLORES-200", "MGSM", "GSM8K"]
  one = found["FLORES-200"]
  # Of 8 examples in each of 5 languages, one for each way of being right.
  assert one.counts == {
    NEITHER: 5, ONLY_A: 5, ONLY_B: 5, BOTH: 5, LOST: 15, NONE: 5
  }  # fmt: skip
  assert {kind: example.source for kind, example in one.first.items()} == {
    NEITHER: "flores-200-lij_latn, 5",
    ONLY_A: "flores-200-lij_latn, 6",
    ONLY_B: "flores-200-lij_latn, 7",
    BOTH: "flores-200-lij_latn, 8",
    LOST: "flores-200-lij_latn, 2",
    NONE: "flores-200-lij_latn, 1",
  }
  example = one.first[NEITHER]
  assert example.question == "Question 4 of flores-200-lij_latn?\nAnswer:"
  assert example.prompt.startswith("An exemplar")
  assert example.wanted == example.rows["composed"]["prediction"] == "text 4"
  assert example.rows["anchor"]["prediction"].startswith("wrong")


def test_key_values_and_programs(tmp_path):
  kv = examples.choose(runs.read(made_runs.key_values(tmp_path / "kv")))
  counts = {one.title: one.counts for one in kv}
  assert counts["KV-MATH, all keys held-out"][NEITHER] == 30
  assert counts["NUM-MATH"][ONLY_B] == 30 and counts["NUM-MATH"][LOST] == 10
  code = examples.choose(runs.read(made_runs.code(tmp_path / "code")))
  assert code[0].first[ONLY_A].wanted is None


def test_baselines_have_no_third_model(tmp_path):
  folder = made_runs.key_values(tmp_path / "kv", "lora")
  assert examples.choose(runs.read(folder)) == []


def test_files_of_other_examples_are_refused(tmp_path):
  folder = made_runs.key_values(tmp_path / "kv")
  path = folder / "predictions" / "kv_subs.anchor.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  made_runs.write_lines(path, rows[1:])
  with pytest.raises(InputError, match=r"kv_subs.anchor.*same examples"):
    examples.choose(runs.read(folder))
