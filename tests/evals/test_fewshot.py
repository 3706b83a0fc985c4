"""Templates, and which exemplars an item is given."""

from __future__ import annotations

import pytest
from eval_data import answer

from calm_jax.core.errors import InputError
from calm_jax.evals import fewshot

POOL = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(9)]
ITEMS = [{"q": f"asked {i}", "a": f"wanted {i}"} for i in range(5)]


def template(tmp_path, text: str):
  file = tmp_path / "mine.txt"
  file.write_text(text, encoding="utf-8")
  return fewshot.load_template(file)


@pytest.fixture
def mine(tmp_path):
  return template(tmp_path, "Q: {q}\nA: {a}\n")


def options(mine):
  return fewshot.FewShot(
    group="G", path="", shots=1, max_new_tokens=9, prompt=mine.origin
  )


def always(prompt):
  return True


def write(mine, shots, fits=always):
  """The prompt of the first item, and its exemplars."""
  [chosen] = fewshot.draw(mine, ITEMS[:1], POOL, shots, 0)
  return mine.question(ITEMS[0], POOL, chosen).prompt(fits)


def test_a_prompt_reads_as_its_file(mine):
  prompt, (first, second) = write(mine, 2)
  assert prompt == (
    f"Q: question {first}\nA: answer {first}\n\n"
    f"Q: question {second}\nA: answer {second}\n\n"
    "Q: asked 0\nA:"
  )


def test_braces_of_values_and_doubled_ones_are_text(tmp_path):
  mine = template(tmp_path, "{{x}} {q} => {a}")
  assert mine.show({"q": "f{1}", "a": "{a}"}) == "{x} f{1} => {a}"


def test_exemplars_are_a_matter_of_seed_and_item(mine):
  def drawn(items, seed=0, shots=3):
    return fewshot.draw(mine, items, POOL, shots, seed)

  assert drawn(ITEMS) == drawn(ITEMS)
  assert drawn(ITEMS)[:2] == drawn(ITEMS[:2])
  assert drawn(ITEMS) != drawn(ITEMS, seed=1)
  assert len({tuple(chosen) for chosen in drawn(ITEMS)}) > 1
  assert [c[:2] for c in drawn(ITEMS)] == drawn(ITEMS, shots=2)
  assert all(len(set(chosen)) == 3 for chosen in drawn(ITEMS))


def test_an_item_is_never_its_own_exemplar(mine):
  for i, chosen in enumerate(fewshot.draw(mine, POOL, POOL, 8, 0)):
    assert sorted(chosen) == [j for j in range(9) if j != i]
  # Nor with another answer.
  twin = [{"q": "asked 0", "a": "another"}, *POOL]
  [chosen] = fewshot.draw(mine, ITEMS[:1], twin, 9, 0)
  assert 0 not in chosen


def test_what_does_not_fit_loses_exemplars(mine):
  prompt, chosen = write(mine, 4, lambda p: len(p) < 90)
  _, all_of_them = write(mine, 4)
  assert chosen == all_of_them[2:]
  assert len(prompt) < 90
  assert write(mine, 4, lambda p: False) == ("Q: asked 0\nA:", [])


def test_answers_are_cut_where_the_next_question_begins(tmp_path):
  judged = []
  evaluation = options(template(tmp_path, "Q: {q}\nA: {a}")).few_shot(
    "maths", "accuracy", ITEMS[:2], POOL, judged.extend
  )
  answer(evaluation, lambda prompts: [" one\ntwo\n\nQ: more", "three"])
  assert [row["prediction"] for row in judged] == ["one\ntwo", "three"]
  assert [row["completion"] for row in judged] == ["wanted 0", "wanted 1"]
  assert [len(row["exemplars"]) for row in judged] == [1, 1]
  # Without words before the first field, an answer is a line.
  assert template(tmp_path, "{q}: {a}").cut("one\ntwo") == "one"


@pytest.mark.parametrize(
  "text, message",
  [
    ("Q: {q}\nA: {a}.", "must end with the answer's field"),
    ("no field", "must end with the answer's field"),
    ("{} {a}", r"\[''\] are no names"),
    ("{q.x} {a}", r"\['q.x'\] are no names"),
    ("{q {a}", "write {{ for a brace"),
  ],
)
def test_bad_files_are_named(tmp_path, text, message):
  with pytest.raises(InputError, match=f"mine.txt.*{message}"):
    template(tmp_path, text)


def test_what_is_missing_is_named(mine, tmp_path):
  with pytest.raises(InputError, match=r"asks for the field 'q'.*\['a'\]"):
    fewshot.draw(mine, [{"a": "1"}], POOL, 1, 0)
  with pytest.raises(InputError, match=r"asks for the field 'a'.*\['q'\]"):
    mine.question(ITEMS[0], [{"q": "1"}], [0])
  with pytest.raises(InputError, match=r"10 exemplars .* only 9 others"):
    fewshot.draw(mine, ITEMS, POOL, 10, 0)
  with pytest.raises(InputError, match=r"one of .*'maths'.*'translation'"):
    fewshot.load_template("nothing")
  with pytest.raises(InputError, match="no items"):
    options(mine).few_shot("maths", "accuracy", [], POOL, list)


@pytest.mark.parametrize("name", ["translation", "maths", "code_to_text"])
def test_the_prompts_that_come_along_can_be_read(name):
  assert fewshot.load_template(name).before
