"""A composition saved by an earlier version loads and does as it did then.

tests/golden/saved was written by commit 25a4981, before the package was
arranged in folders: an anchor, two augmenting models (one with the anchor's
tokens, one with others), what `save` wrote, and what they generated and scored.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import calm_jax
from calm_jax.core import trees

SAVED = Path(__file__).parents[1] / "golden" / "saved"
EXPECTED = json.loads((SAVED / "expected.json").read_text())


@pytest.fixture(scope="module")
def model():
  return calm_jax.load_composed(
    SAVED / "composition",
    anchor=SAVED / "anchor",
    augmenting={"same": SAVED / "same", "other": SAVED / "other"},
  )


def test_it_has_the_names_of_then(model):
  leaves = trees.flatten({"composition": model.params["composition"]})
  assert sorted(leaves) == EXPECTED["leaves"]


def test_it_generates_the_same(model):
  prompts = EXPECTED["prompts"]
  assert model.generate(prompts, 12) == EXPECTED["texts"]
  sampled = model.generate(prompts, 12, temperature=1.0, seed=3)
  assert sampled == EXPECTED["sampled"]


def test_it_scores_the_same(model):
  scores = model.score(EXPECTED["prompts"], EXPECTED["completions"])
  for score, expected in zip(scores, EXPECTED["scores"], strict=True):
    np.testing.assert_allclose(score.logprob, expected[0], rtol=1e-5)
    assert list(score[1:]) == expected[1:]


def test_it_refuses_another_model(model):
  with pytest.raises(calm_jax.InputError, match=r"config\.json has changed"):
    calm_jax.load_composed(
      SAVED / "composition",
      anchor=SAVED / "anchor",
      augmenting={"same": SAVED / "other", "other": SAVED / "other"},
    )
