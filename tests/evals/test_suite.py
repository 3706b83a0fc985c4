"""Evaluations by configuration: what they keep of each model, and compare."""

from __future__ import annotations

import json

import pytest
from eval_data import answer, folder

from calm_jax.core.errors import InputError
from calm_jax.evals import chrf, suite, tasks
from calm_jax.evals.statistics import count_better

ENGLISH = ["A house.", "We sing.", "Two cats.", "The sea is blue.", "Come in."]
OTHER = ["Unna casa.", "Cantemmo.", "Doî gatti.", "O mâ o l'é bleu.", "Intra."]


class Writer:
  """A model that answers the question of each prompt from a list."""

  def __init__(self, answers):
    self.answers, self.prompts, self.stop = answers, [], None

  def generate(self, prompts, max_new_tokens, *, stop, batch_size):
    assert (max_new_tokens, batch_size) == (20, 64)
    self.prompts, self.stop = prompts, stop
    return [
      f" {self.answers[p.rsplit(': ', 1)[-1].split(chr(10))[0]]}\nLigurian: x"
      for p in prompts
    ]


@pytest.fixture
def pairs(tmp_path):
  for name, lines in (("lij", OTHER), ("eng", ENGLISH)):
    (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
  return {
    "kind": "translation", "group": "Seed", "language": "lij_Latn",
    "path": str(tmp_path / "lij"), "target": str(tmp_path / "eng"),
    "rows": "2:", "pool_rows": ":2", "shots": 2, "max_new_tokens": 20,
  }  # fmt: skip


def whole(prompt):
  del prompt
  return True


def models():
  right = dict(zip(OTHER, ENGLISH, strict=True))
  return {
    "anchor": Writer(right | {OTHER[2]: "xyz", OTHER[4]: "xyz"}),
    "composed": Writer(right | {OTHER[4]: "xyz"}),
  }


def test_models_are_scored_and_compared_on_the_same_prompts(pairs):
  evaluation, writers = tasks.make(pairs), models()
  entry, rows = suite.run(evaluation, writers, whole, 64)
  assert writers["anchor"].prompts == writers["composed"].prompts
  assert writers["anchor"].stop == ("\n",)
  assert writers["anchor"].prompts[0].count("English:") == 3
  assert (entry["examples"], entry["shots"], entry["prompts_cut"]) == (3, 2, 0)
  for column, wrong in (("anchor", (0, 2)), ("composed", (2,))):
    predictions = ["xyz" if i in wrong else e for i, e in
                   enumerate(ENGLISH[2:])]  # fmt: skip
    expected = chrf.chrf1(predictions, ENGLISH[2:])
    score = entry["scores"][column]
    assert score["value"] == pytest.approx(expected.corpus)
    assert score["low"] <= score["value"] <= score["high"]
    assert [r["score"] for r in rows[column]] == pytest.approx(
      expected.sentences
    )
    assert [r["prediction"] for r in rows[column]] == predictions
  assert "nrefs:1" in entry["note"]
  [column] = entry["against_anchor"]
  difference = entry["against_anchor"][column]
  gain = [entry["scores"][c]["value"] for c in ("composed", "anchor")]
  assert difference["delta"] == pytest.approx(gain[0] - gain[1])
  assert 0 < difference["p_value"] <= 1
  json.dumps(entry)


def test_exemplars_are_left_out_before_a_prompt_is_cut(pairs):
  def short(prompt):
    return len(prompt) <= 80

  evaluation = tasks.make(pairs)
  entry, rows = suite.run(evaluation, models(), short, 64)
  assert entry["prompts_cut"] == 0
  assert 0 < entry["shots"] < 2
  assert all(short(r["prompt"]) for r in rows["anchor"])

  class Any:
    def generate(self, prompts, *_, stop, batch_size):
      del stop, batch_size
      assert prompts == [
        f"{o}\nEnglish:"[-15:] for o in OTHER[2:]
      ]  # the last characters that fit
      return prompts

  entry, rows = suite.run(
    evaluation, {"anchor": Any()}, lambda p: len(p) <= 15, 64
  )
  # What the model was shown is kept.
  assert {len(row["prompt"]) for row in rows["anchor"]} == {15}
  assert entry["prompts_cut"] == 3
  assert entry["shots"] == 0
  assert entry["against_anchor"] == {}


def test_averages_and_how_many_languages_are_better():
  def entry(group, subset, anchor, composed):
    values = {"anchor": anchor, "composed": composed}
    scores = {c: {"value": v, "low": v, "high": v} for c, v in values.items()}
    return {"group": group, "subset": subset, "scores": scores}

  found = suite.groups({
    "a": entry("F", "x", 1.0, 2.0), "b": entry("F", "y", 3.0, 3.0),
    "c": entry("F", "z", 5.0, 4.0), "d": entry("G", "", 7.0, 8.0),
  })  # fmt: skip
  assert found["F"] == {
    "subsets": 3,
    "average": {"anchor": 3.0, "composed": 3.0},
    "better": {"composed": (1, 2)},
  }
  assert found["G"]["better"] == {"composed": (1, 1)}
  assert count_better({"x": 2.0}, {"x": 1.0}) == (1, 1, 1)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"kind": "nope"}, "'nope' is none of"),
    ({"shot": 3}, r"evals.translation has no field .*'shot'"),
    ({"shots": -1}, r"translation.shots=-1 must be"),
    ({"shots": "3"}, r"translation.shots='3' is no int"),
    ({"limit": True}, r"translation.limit=True is no int"),
    ({"max_new_tokens": 0}, r"max_new_tokens=0 must be .* 1 or more"),
    ({"seed": 2**32}, r"translation.seed=4294967296 must"),
    ({"path": 3}, r"translation.path=3 is no str"),
    ({"language": "a\ud800"}, r"translation.language is not text"),
    ({"path": "nowhere"}, "nowhere: no such file"),
    ({"rows": "7:"}, "rows '7:' of 5 items are none"),
    ({"rows": "2"}, "rows '2': expected a slice"),
    ({"rows": "a:"}, "rows 'a:': expected a slice"),
  ],
)
def test_what_is_wrong_with_an_evaluation(pairs, changes, said):
  with pytest.raises(InputError, match=said):
    tasks.make(pairs | changes)


def test_files_that_do_not_pair(pairs, tmp_path):
  (tmp_path / "eng").write_text("One line.\n")
  with pytest.raises(InputError, match=r"5 lines and .* has 1"):
    tasks.make(pairs)


@pytest.mark.parametrize("kind", tasks.RUN_CODE)
def test_no_code_is_run_unless_it_is_allowed(kind):
  settings = {
    "kind": kind, "group": "x", "path": "nowhere", "max_new_tokens": 9
  }  # fmt: skip
  with pytest.raises(InputError, match="--allow_code_execution"):
    tasks.make(settings | {"allow_code_execution": False})


def test_references_are_all_right():
  """Every kind on the shared data, answered with what is wanted."""
  settings = {
    "kind": "code_to_text", "group": "CodeXGLUE", "language": "ruby",
    "path": str(folder("codexglue") / "code_to_text_ruby/test.jsonl"),
    "pool": str(folder("codexglue") / "code_to_text_ruby/test.jsonl"),
    "pool_rows": ":61", "rows": "61:", "limit": 100,
    "shots": 3, "max_new_tokens": 96,
  }  # fmt: skip
  evaluation = tasks.make(settings)
  judged = answer(evaluation, lambda prompts: [""] * len(prompts))
  wanted = [row["completion"] for row in judged.rows]

  class Perfect:
    def generate(self, prompts, max_new_tokens, *, stop, batch_size):
      del prompts, max_new_tokens, stop, batch_size
      return wanted

  entry, _ = suite.run(evaluation, {"anchor": Perfect()}, whole, 64)
  assert entry["scores"]["anchor"]["value"] == pytest.approx(100.0)
  gsm8k = folder("gsm8k")
  evaluation = tasks.make({
    "kind": "maths", "group": "GSM8K", "path": str(gsm8k / "test.jsonl"),
    "pool": str(gsm8k / "train.jsonl"), "limit": 50,
    "shots": 8, "max_new_tokens": 256,
  })  # fmt: skip
  judged = answer(evaluation, lambda prompts: [""] * len(prompts))
  wanted = [row["completion"] for row in judged.rows]
  entry, rows = suite.run(evaluation, {"anchor": Perfect()}, whole, 64)
  assert entry["scores"]["anchor"]["value"] == 100.0
  assert {row["score"] for row in rows["anchor"]} == {100.0}
