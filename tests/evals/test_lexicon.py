"""Words of a lexicon that D_C never showed."""

from __future__ import annotations

import eval_data
import pytest

from calm_jax.core.errors import InputError
from calm_jax.data import examples
from calm_jax.data.examples import ExampleSource
from calm_jax.evals import tasks

LINES = [("bon", "good"), ("bon", "able"), ("cà", "house"), ("mâ", "sea"),
         ("gatto", "cat"), ("can", "dog"), ("sâ", "salt")]  # fmt: skip
PROMPT = "{source} ="


@pytest.fixture
def settings(tmp_path):
  path = tmp_path / "lij_en.tsv"
  path.write_text("".join(f"{s}\t{t}\n" for s, t in LINES), encoding="utf-8")
  return {
    "kind": "lexicon", "group": "GATITOS", "path": str(path), "prompt": PROMPT,
    "max_new_tokens": 8,
  }  # fmt: skip


def asked(evaluation) -> list[str]:
  prompts = evaluation.prompts(lambda prompt: True)
  return [prompt.text.removesuffix(" =") for prompt in prompts]


def test_each_word_is_asked_once_and_any_translation_is_right(settings):
  evaluation = tasks.make(settings)
  assert sorted(asked(evaluation)) == sorted({s for s, _ in LINES})
  answers = dict(LINES) | {"can": "a dog", "mâ": ""}
  judged = eval_data.answer(
    evaluation, lambda prompts: [f" {answers[p[:-2]]}" for p in prompts]
  )
  assert judged.value == pytest.approx(100 * 4 / 6)
  [row] = [row for row in judged.rows if row["prompt"] == "bon ="]
  assert (row["completion"], row["correct"]) == ("able | good", True)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_words_of_d_c_are_never_asked(settings, seed):
  source = ExampleSource(
    settings["path"], columns=("source", "target"), prompt=PROMPT,
    completion=" {target}", rows=":6",
  )  # fmt: skip
  learnt = examples.read_examples(source)
  shown = examples.take_fraction(learnt, 0.5, seed)
  shown = {example.prompt.removesuffix(" =") for example in shown}
  changes = {"rows": ":6", "shown": 0.5, "seed": seed}
  assert {*asked(tasks.make(settings | changes))} == (
    {s for s, _ in LINES[:6]} - shown
  )


def test_a_limit_takes_random_words(settings):
  words = asked(tasks.make(settings))
  assert asked(tasks.make(settings | {"limit": 2})) == words[:2]
  assert words != asked(tasks.make(settings | {"seed": 1}))
  with pytest.raises(InputError, match="no word that was not shown"):
    tasks.make(settings | {"shown": 1.0})
