"""An augmenting model reads one text in training, scoring and generation.

For 10,000 texts and all pairs of the shared tokenizers:

    CALM_SHARED=... HYPOTHESIS_PROFILE=thorough python -m pytest \\
      tests/generation/test_one_text.py -k real
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest
import real_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from random_texts import RANDOM

import calm_jax
from calm_jax.composition.connections import Composition, connect
from calm_jax.composition.model import Model
from calm_jax.data import pipeline
from calm_jax.data.documents import RowOptions, make_segments
from calm_jax.data.examples import TextExample
from calm_jax.generation import batching
from calm_jax.language_model import LanguageModel
from calm_jax.models.config import ModelConfig
from calm_jax.text.alignment import ChunkEncoder
from calm_jax.training import step

CHAT = [
  ("", "<|begin|>the cat sat on a mat"),
  ("", "cafe\u0301 and a mat </s> of it"),
  ("<|user|>a time<|end|>\n", "there was <b> a mat"),
  ("<|begin|><|user|>cafe\u0301 ", "e\u0301 of <|user|> cats"),
  ("once <unk> upon", " a time\u200d 👩‍👩‍👧 \u2067مر\u2069 cat"),
]


def shape(tokenizer) -> ModelConfig:
  return helpers.model(1, vocab_size=tokenizer.vocab_size)[0]


def all_pairs(kinds: dict) -> list[tuple[Model, dict]]:
  """For each anchor a model beside all others, without parameters."""
  encoders = {name: ChunkEncoder(other) for name, other in kinds.items()}
  made = []
  for anchor in kinds.values():
    joined = tuple(
      (name, connect(shape(other), shape(anchor), 1))
      for name, other in kinds.items()
    )
    spec = Composition(shape(anchor), joined)
    made.append((Model(spec, {}, anchor, tokenizers=kinds), encoders))
  return made


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
  return real_tokenizers.toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def toy_pairs(toys):
  made = all_pairs(toys)
  return lambda: made  # Hypothesis would print them all.


@pytest.fixture(scope="module")
def real_pairs(tmp_path_factory):
  if not os.environ.get("CALM_SHARED"):
    pytest.skip("CALM_SHARED is unset: the shared tokenizers are not here")
  made = all_pairs(
    real_tokenizers.real(
      Path(os.environ["CALM_SHARED"]), tmp_path_factory.mktemp("real")
    )
  )
  return lambda: made


def real_tokens(rows) -> list[int]:
  return rows.tokens[0, rows.segments[0] > 0].tolist()


def check(model: Model, encoders: dict, prompt: str, completion: str) -> None:
  """Compares ids and counts of all ways from one text to a model's rows."""
  anchor = model.text()
  options = RowOptions(
    tokenizer=anchor, batch_size=1, length=4096, seed=None, augmenting=encoders
  )
  given, new = anchor.encode_pair(prompt, completion)
  ids = given + new
  if not given or len(ids) < 2:
    return
  example = TextExample(prompt, completion, "x")
  [segment], _ = make_segments([example], options, None)
  L = len(ids)
  assert segment.tokens[:L].tolist() == ids
  [(_, scored, _)] = batching.batches(model, [ids], [len(given)], 1)
  full = batching.token_batch(model, np.array([ids]), len(given))
  [(_, prompts, readers)] = batching.batches(model, [given], [len(given)], 1)
  for name in encoders:
    read, seen = segment.augmenting[name]
    read, seen = read.tolist(), seen[:L].tolist()
    assert real_tokens(full.augmenting[name]) == read[: seen[-1]]
    assert full.visible[name][0].tolist() == seen
    rows, visible = scored.augmenting[name], scored.visible[name]
    assert real_tokens(rows) == read[: seen[-1]]
    padding = int((rows.segments[0] == 0).sum())
    assert (visible[0, -L:] - padding).tolist() == seen
    grown = real_tokens(prompts.augmenting[name])
    assert grown == read[: seen[len(given) - 1]]
    for place, token in enumerate(new, start=len(given)):
      grown += readers[name][0].push(token)
      assert len(grown) == seen[place]
    assert grown == read[: seen[-1]]


@given(prompt=RANDOM, completion=RANDOM)
@settings(max_examples=settings().max_examples // 2)
def test_random_texts(toy_pairs, prompt, completion):
  for pair in toy_pairs():
    check(*pair, prompt, completion)


@given(prompt=st.one_of(st.just(""), RANDOM), completion=RANDOM)
def test_random_texts_of_real_tokenizers(real_pairs, prompt, completion):
  for pair in real_pairs():
    check(*pair, prompt, completion)


@pytest.mark.parametrize("prompt, completion", CHAT)
def test_chats(toy_pairs, prompt, completion):
  for pair in toy_pairs():
    check(*pair, prompt, completion)


def decoder(tokenizer, seed) -> LanguageModel:
  config, params = helpers.model(seed, vocab_size=tokenizer.vocab_size)
  return LanguageModel(Composition(config), {"anchor": params}, tokenizer)


@pytest.fixture(scope="module")
def models(toys):
  """One model, and compositions of it with the same and with other tokens."""
  anchor = decoder(toys["chat"], 1)
  made = {"one": anchor}
  for name, other in (("same", "chat"), ("other", "bpe_bytes")):
    composed = calm_jax.compose(anchor, decoder(toys[other], 2), 2)
    theta = helpers.random_params(composed.params["composition"], 5)
    params = composed.params | {"composition": theta}
    made[name] = dataclasses.replace(composed, params=params)
  return made


@pytest.mark.parametrize("name", ["one", "same", "other"])
def test_the_loss_of_an_example_is_its_score(models, name):
  model = models[name]
  assert bool(model.tokenizers) == (name == "other")
  options = RowOptions(
    tokenizer=model.text(),
    batch_size=len(CHAT),
    length=64,
    seed=None,
    pack=False,
    augmenting={n: ChunkEncoder(t) for n, t in model.tokenizers.items()},
  )
  examples = [TextExample(*texts, f"line {i}") for i, texts in enumerate(CHAT)]
  [batch] = pipeline.text_source({"": (examples, 1.0)}, options)
  row_losses = jax.jit(step.row_losses, static_argnums=1)
  nats, tokens = row_losses(model.params, model.spec, batch)
  # Training adds an EOS.
  prompts, completions = zip(*CHAT, strict=True)
  scores = model.score(prompts, [text + "</s>" for text in completions])
  np.testing.assert_allclose(nats, [-s.logprob for s in scores], atol=1e-4)
  assert tokens.tolist() == [s.num_tokens for s in scores]


def test_one_bos_whether_a_text_spells_it_or_not(models):
  model, text = models["other"], models["other"].text()
  bos = [text.bos_id]
  ids = text.encode("the cat")
  for spelled in ("the cat", "<|begin|>the cat"):
    assert text.encode_prompt(spelled) == bos + ids
    assert text.encode_pair("", spelled) == (bos, ids)
    assert text.encode_pair(spelled, " sat")[0] == bos + ids
  # A second one is the text's own.
  assert text.encode_prompt("<|begin|><|begin|>") == 2 * bos
  assert text.encode_pair("<|begin|>", "<|begin|>") == (bos, bos)
  both = ["the cat", "<|begin|>the cat"]
  written = {"".join(model.stream(text, 4)) for text in both}
  assert {model.generate(both[1], 4)} == written
  one, other = model.score(both, [" sat", " sat"])
  assert one == other
  one, other = model.score(["", ""], both)
  assert one == other and one.num_tokens == len(ids)
