"""Questions with one right answer."""

import json

import pytest

from calm_jax.core.errors import InputError
from calm_jax.evals import suite, tasks

ROWS = [
  {"prompt": "Q: a\nA:", "completion": " Paris"},
  {"prompt": "Q: b\nA:", "completion": " 4711"},
  {"prompt": "Q: c\nA:", "completion": " cat"},
]


class Answers:
  """Answers each question with the next of some texts."""

  def __init__(self, *texts):
    self.texts, self.prompts = texts, []

  def generate(self, prompts, max_new_tokens, *, stop, batch_size):
    assert (max_new_tokens, stop) == (7, ("\n",))
    self.prompts += prompts
    return list(self.texts)


@pytest.fixture
def path(tmp_path):
  path = tmp_path / "questions.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  return str(path)


def make(path, **options):
  settings = {"kind": "questions", "group": "G", "max_new_tokens": 7}
  return tasks.make(settings | {"path": path} | options)


def test_the_whole_answer_counts(path):
  models = {
    "anchor": Answers(" Paris", " 471", ""),
    "composed": Answers("Paris ", " 4711", " cat sat"),
  }
  entry, rows = suite.run(make(path), models, lambda prompt: True, 3)
  scores = {column: s["value"] for column, s in entry["scores"].items()}
  assert scores == pytest.approx({"anchor": 100 / 3, "composed": 200 / 3})
  assert [row["correct"] for row in rows["composed"]] == [True, True, False]
  assert models["anchor"].prompts == [row["prompt"] for row in ROWS]


def test_what_a_constant_answer_gets(tmp_path):
  path, rows = tmp_path / "kinds.jsonl", []
  for kind, answers in (("city", "aab"), ("year", "cddd"), ("code", "e")):
    rows += [
      {"prompt": f"{kind} {i}", "completion": f" {answer}", "attribute": kind}
      for i, answer in enumerate(answers)
    ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  made = make(str(path), subset="S")
  entry, _ = suite.run(made, {"anchor": Answers(*"x" * 8)}, bool, 8)
  assert entry["note"] == "a constant answer S: 75.0"


def test_exemplars_are_drawn_from_the_pool(path):
  model = Answers("", "")
  made = make(path, pool=path, shots=2, limit=2)
  suite.run(made, {"anchor": model}, lambda prompt: True, 3)
  shown = [row["prompt"] + row["completion"] for row in ROWS]
  for row, prompt in zip(ROWS, model.prompts, strict=False):
    *exemplars, asked = prompt.split("\n\n")
    assert asked == row["prompt"]
    assert len({*exemplars}) == 2
    assert {*exemplars} == {s for s in shown if not s.startswith(asked)}


def test_a_line_without_an_answer(path, tmp_path):
  with open(path, "a") as file:
    file.write(json.dumps({"prompt": "Q: d\nA:"}) + "\n")
  with pytest.raises(InputError, match="line 4"):
    make(path)
