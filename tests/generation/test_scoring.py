"""Scoring at the edges: nothing to score, and the end of the limit."""

from __future__ import annotations

import helpers
import jax
import numpy as np
import pytest

from calm_jax.composition.connections import Composition
from calm_jax.composition.model import Model
from calm_jax.core.errors import InputError
from calm_jax.generation import scoring

LIMIT = 9


def test_the_last_token_is_predicted_and_not_read():
  config, params = helpers.model(1, max_length=LIMIT)
  ids = np.random.default_rng(0).integers(0, config.vocab_size, LIMIT + 1)
  prompts = [ids[:1].tolist(), ids[:4].tolist(), ids[:LIMIT].tolist()]
  completions = [ids[1:].tolist(), [], ids[LIMIT:].tolist()]
  model = Model(Composition(config), {"anchor": params})
  scores = scoring.score(model, prompts, completions)
  logits_LV = helpers.decode_rows(
    params, config, helpers.rows([ids[:LIMIT]], length=LIMIT)
  )[0]
  logprob_LV = np.asarray(jax.nn.log_softmax(logits_LV))
  each_L = logprob_LV[np.arange(LIMIT), ids[1:]]
  assert [score.num_tokens for score in scores] == [LIMIT, 0, 1]
  np.testing.assert_allclose(
    [score.logprob for score in scores],
    [each_L.sum(), 0, each_L[-1]],
    atol=1e-4,
  )
  assert scores[1].is_greedy
  likeliest = [int(logits_LV[-1].argmax())]
  [best] = scoring.score(model, prompts[2:], [likeliest])
  assert best.is_greedy
  with pytest.raises(InputError, match="length limit of 9"):
    scoring.score(model, prompts[2:], [[1, 2]])
