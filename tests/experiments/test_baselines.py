"""Baselines that train nothing: pasted text, and averaged probabilities."""

import numpy as np
import pytest
import spelled

import calm_jax
from calm_jax.core.errors import InputError
from calm_jax.data.examples import TextExample
from calm_jax.experiments import baselines

PROMPTS = ["a bad cab", "hide", "a", "jab it"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  return [
    calm_jax.load_model(str(spelled.save(folder / str(seed), seed)))
    for seed in (1, 2)
  ]


class Recorded:
  """Answers with some texts, and keeps the prompts."""

  def __init__(self, *texts):
    self.texts, self.asked = texts, []

  def generate(self, prompts, max_new_tokens, *, stop, batch_size):
    self.asked += prompts
    return list(self.texts)


def test_the_answer_is_pasted_behind_exemplars():
  exemplars = [TextExample("Q: a\nA:", " Paris", "line 1")]
  anchor, memory = Recorded("x", "y"), Recorded(" cat ", " 12")
  models = {"anchor": anchor, "augmenting": memory}
  made = baselines.make(models, exemplars, ensemble=False)
  assert list(made) == ["pasted"]
  asked = ["Q: b\nA:", "Q: c\nA:"]
  answers = made["pasted"].generate(asked, 5, stop=("\n",), batch_size=2)
  assert (answers, memory.asked) == (["x", "y"], asked)
  shown = "Note: Paris\nQ: a\nA: Paris\n\n"
  assert anchor.asked == [
    f"{shown}Note: cat\nQ: b\nA:",
    f"{shown}Note: 12\nQ: c\nA:",
  ]


def test_an_ensemble_of_a_model_and_itself_is_the_model(models):
  one = baselines.Ensemble([models[0], models[0]])
  options = {"stop": ("e",), "batch_size": 3}
  alone = models[0].generate(PROMPTS, 9, **options)
  assert one.generate(PROMPTS, 9, **options) == alone
  assert any(alone)


def test_an_ensemble_takes_the_best_mean(models):
  text = models[0].text()
  [answer] = baselines.Ensemble(models).generate(
    ["a bad"], 6, stop=(), batch_size=1
  )
  ids = text.encode_prompt("a bad")
  for new in text.encode_continuation("a bad", answer):
    total = 0.0
    for model in models:
      row = np.asarray(model.logits(np.array([ids]))[0, -1], np.float64)
      total += row - np.log(np.exp(row).sum())
    assert total.argmax() == new
    ids.append(new)
  assert len(answer)


def test_no_ensemble_of_different_tokens(models, tmp_path):
  folder = spelled.save(tmp_path / "other", 3, text=spelled.ALPHABET + "XY")
  other = calm_jax.load_model(str(folder))
  with pytest.raises(InputError, match="different ones"):
    baselines.Ensemble([models[0], other])


def test_without_m_a_there_is_no_baseline(models):
  exemplars = [TextExample("a", "b", "line 1")]
  assert not baselines.make({"anchor": models[0]}, exemplars, ensemble=True)
