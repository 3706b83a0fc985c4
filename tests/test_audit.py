"""The audit of compositions that use m_A's content, and of some that cheat.

An example is a key and two random answers, which an m_A that knows holds in its
embedding of the key; the anchor knows none. Θ_C is trained on some of the keys.
"""

from __future__ import annotations

import functools
import types

import helpers
import jax
import numpy as np
import optax
import pytest

from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.core.batch import Batch, plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.generation import decode_steps, scoring
from calm_jax.language_model import LanguageModel
from calm_jax.text.tokenizer import Tokenizer
from calm_jax.training import step

ANSWERS, HELD_IN, TESTED = 8, 240, 100
KEYS = HELD_IN + TESTED
RANDOM = np.random.default_rng(0)
FIRST = 2 * ANSWERS  # of the keys' ids
VALUES = np.array([0, ANSWERS]) + RANDOM.integers(0, ANSWERS, (KEYS, 2))
VOCAB = FIRST + KEYS
PROMPTS = [str(FIRST + k) for k in range(HELD_IN, KEYS)]
COMPLETIONS = [f" {a} {b}" for a, b in VALUES[HELD_IN:]]


def words() -> Tokenizer:
  """A tokenizer of numbers with spaces between."""
  pieces = tuple(map(str, range(VOCAB)))
  backend = types.SimpleNamespace(
    vocab={p: i for i, p in enumerate(pieces)},
    encode=lambda text: [int(word) for word in text.split()],
    decode=lambda ids: "".join(f" {i}" for i in ids),
  )
  return Tokenizer(pieces, None, None, (), frozenset(), "words", backend)


@functools.cache
def trained(
  knows: bool,
  visibility: str = "causal",
  control: str = "none",
  steps: int = 300,
):
  """A composition of two connections after some steps on the held-in keys."""
  shape = {"vocab_size": VOCAB, "num_layers": 2}
  anchor, anchor_params = helpers.model(1, **shape)
  config, params = helpers.model(
    2, **shape, width=24, num_heads=3, num_kv_heads=1
  )
  if knows:
    table = np.array(params["embed"]["embedding"])
    table[FIRST:, :FIRST] = 3 * np.eye(FIRST)[VALUES].sum(1)
    params["embed"]["embedding"] = table
  joined = Augmenting(
    config,
    (Connection(1, 1), Connection(1, 2)),
    visibility=visibility,
    control=control,
  )
  spec = Composition(anchor, (("kv", joined),))
  frozen = {"anchor": anchor_params, "augmenting": {"kv": params}}
  keys = np.arange(HELD_IN)
  tokens_BL = np.stack([FIRST + keys, VALUES[keys, 0]], 1).astype(np.int32)
  batch = Batch(
    plain_sequence(tokens_BL),
    {},
    {},
    np.ones(tokens_BL.shape, np.int32),
    VALUES[keys].astype(np.int32),
    np.ones(tokens_BL.shape, np.float32),
  )
  optimizer = optax.adam(1e-2)

  def loss(theta):
    return step.summed_loss(frozen | {"composition": theta}, spec, batch)

  @jax.jit
  def train(theta):
    def update(_, carry):
      theta, state = carry
      grads = jax.grad(loss)(theta)
      updates, state = optimizer.update(grads, state)
      return optax.apply_updates(theta, updates), state

    return jax.lax.fori_loop(0, steps, update, (theta, optimizer.init(theta)))[
      0
    ]

  theta = train(cross_attention.init(jax.random.key(0), spec))
  return LanguageModel(spec, frozen | {"composition": theta}, words())


def audit(model: LanguageModel, **options):
  return model.audit(
    PROMPTS, COMPLETIONS, max_new_tokens=2, batch_size=128, **options
  )


def test_content_that_is_used_is_found():
  made = audit(trained(knows=True))
  answers, likelihood = made["answers"], made["likelihood"]
  assert answers["scores"]["correct"]["value"] > 70
  assert answers["content"]["low"] > 60
  assert answers["chance"] == pytest.approx(100 / ANSWERS**2, abs=1)
  # With another's states it gives another's answers.
  mismatched = answers["scores"]["mismatched"]
  assert mismatched["low"] <= answers["chance"] <= mismatched["high"] + 1
  assert likelihood["content"]["low"] > 1
  assert likelihood["left_over"]["high"] < likelihood["content"]["low"]
  for kind in made.values():
    zeroed, anchor = (kind["scores"][n] for n in ("zeroed", "anchor"))
    assert zeroed == pytest.approx(anchor, abs=1e-3)
    assert kind["examples"] == TESTED


CHEATS = {
  # m_A's states of the answer itself, when the answer is there to be read.
  "unmasked": {"knows": False, "visibility": "unmasked", "steps": 50},
  # What Θ_C has learnt of answers in general, and of the keys it saw.
  "encoder": {"knows": False, "visibility": "encoder", "steps": 50},
  # The same, though m_A knows.
  "shuffled": {"knows": True, "control": "shuffled", "steps": 50},
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_content_is_none(cheat):
  model = trained(**CHEATS[cheat])
  made = audit(model)
  for kind in made.values():
    # One of twenty intervals may just miss it.
    assert kind["content"]["low"] - 0.1 <= 0 <= kind["content"]["high"] + 0.1
  # The cheat pays: it is what is left over.
  assert made["likelihood"]["left_over"]["low"] > 0.1
  scores = model.score(PROMPTS, COMPLETIONS)
  plain = sum(s.logprob for s in scores) / sum(map(len, COMPLETIONS))
  audited = made["likelihood"]["scores"]["correct"]["value"]
  if cheat == "unmasked":
    assert plain > audited + 0.3  # as it is measured in training
  if cheat == "encoder":
    assert plain == pytest.approx(audited, abs=1e-3)


def test_an_audit_compiles_what_an_evaluation_does():
  model = trained(knows=True)
  parts = [model, model.part("anchor"), model.part("augmenting/kv")]

  def compiled(run) -> int:
    jax.clear_caches()
    run()
    advance = decode_steps.advance_on("cpu", model.params)
    programs = decode_steps.start, advance, scoring._token_scores
    return sum(program._cache_size() for program in programs)

  def evaluate():
    for part in parts:
      part.generate(PROMPTS, 2, batch_size=128)
      part.score(PROMPTS, COMPLETIONS, batch_size=128)

  assert compiled(lambda: audit(model)) <= compiled(evaluate) + 2


def test_what_cannot_be_audited():
  model = trained(knows=True)
  with pytest.raises(InputError, match="only a composition can be audited"):
    model.part("anchor").audit(PROMPTS, COMPLETIONS)
  with pytest.raises(InputError, match="100 prompts, 99 completions"):
    model.audit(PROMPTS, COMPLETIONS[1:])
  with pytest.raises(InputError, match="give more of them"):
    model.audit(PROMPTS[:1] * 3, COMPLETIONS[:1] * 3)
