"""Models as a user holds them: loaded, composed, asked."""

from __future__ import annotations

import os
import pathlib
import re

import helpers
import jax
import numpy as np
import pytest

import calm_jax
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.models.hf import export
from calm_jax.text import tokenizer

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 7))


def save(folder: pathlib.Path, seed: int, **changes) -> pathlib.Path:
  """A checkpoint without a tokenizer."""
  export.save_params(folder, *helpers.model(seed, **changes))
  return folder


def spell(folder: pathlib.Path, text: str) -> None:
  """Gives a checkpoint a tokenizer of one token a character."""
  vocab = 4 + len(set(text))
  tokenizer.train_sentencepiece([text], folder / "tokenizer", vocab_size=vocab)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  path = tmp_path_factory.mktemp("models")
  return {
    "anchor": save(path / "anchor", 1),
    "augmenting": save(path / "augmenting", 2, width=24, num_layers=8),
  }


@pytest.fixture(scope="module")
def models(folders):
  return {k: calm_jax.load_model(str(v)) for k, v in folders.items()}


@pytest.fixture(scope="module")
def composed(models):
  return calm_jax.compose(models["anchor"], models["augmenting"])


def test_a_loaded_model(models, folders):
  model = models["anchor"]
  config, params = helpers.model(1)
  logits = model.logits(TOKENS)
  assert logits.dtype == np.float32
  assert logits.shape == (2, 7, 61)
  sequence = helpers.rows(*([row] for row in TOKENS), length=7)
  want = helpers.decode_rows(params, config, sequence)
  np.testing.assert_allclose(logits, want, atol=1e-6)
  assert model.num_params == trees.count(params)
  assert model.num_composition_params == 0
  assert not model.is_composed
  assert model.origin == str(folders["anchor"])


def test_a_model_in_bfloat16_answers_in_float32(folders):
  model = calm_jax.load_model(str(folders["anchor"]), dtype="bfloat16")
  assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"bfloat16"}
  assert model.logits(TOKENS).dtype == np.float32


@pytest.mark.parametrize(
  ("tokens", "said"),
  [
    ([1, 2, 3], r"integers \[B, L\], got int64 \[3\]"),
    ([[1.0, 2.0]], "got float64"),
    ([["a"]], r"integers \[B, L\]"),
    ([[1, -1]], "from -1 to 1; the vocabulary has ids 0 to 60"),
    ([[1, 61]], "from 1 to 61"),
    ([[0] * 2049], "2049 tokens exceed.* 2048"),
  ],
  ids=["flat", "floats", "text", "negative", "outside", "long"],
)
def test_tokens_that_are_none(models, composed, tokens, said):
  for model in (models["anchor"], composed):
    with pytest.raises(InputError, match=said):
      model.logits(tokens)


def test_a_composition(models, composed):
  assert composed.is_composed
  assert composed.params.keys() == {"anchor", "augmenting", "composition"}
  assert composed.params["anchor"] is models["anchor"].params["anchor"]
  # Every fourth of the 8 layers, and the two norms of each connection.
  d_a, d_b, n = 24, 32, 2
  assert composed.num_composition_params == n * (
    d_a * d_b + 4 * d_b**2 + d_a + d_b
  )
  assert composed.num_params == composed.num_composition_params + sum(
    m.num_params for m in models.values()
  )
  bare = calm_jax.compose(models["anchor"], models["augmenting"], norm=False)
  assert bare.num_composition_params == n * (d_a * d_b + 4 * d_b**2)


def test_a_fresh_composition_is_the_anchor(models, composed):
  np.testing.assert_array_equal(
    composed.logits(TOKENS), models["anchor"].logits(TOKENS)
  )
  started = calm_jax.compose(
    models["anchor"], models["augmenting"], [(8, 2)], output_init="normal"
  )
  assert (
    np.asarray(started.logits(TOKENS)) != models["anchor"].logits(TOKENS)
  ).any()


def test_connections_and_names(models):
  two = {"kv": models["augmenting"], "code": models["augmenting"]}
  theta = calm_jax.compose(models["anchor"], two, 1).params["composition"]
  assert {k: list(v) for k, v in theta.items()} == {
    "kv": ["layer_8_to_4"], "code": ["layer_8_to_4"]
  }  # fmt: skip
  pairs = calm_jax.compose(
    models["anchor"], models["augmenting"], [(1, 2), (3, 2)]
  )
  assert list(pairs.params["composition"]["augmenting"]) == [
    "layer_1_to_2", "layer_3_to_2"
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("connections", "said"),
  [(5, "5 connections"), ([(9, 1)], "1 to 8, not 9"), ([(1, 5)], "not 5")],
)
def test_connections_that_cannot_be(models, connections, said):
  with pytest.raises(InputError, match=said):
    calm_jax.compose(models["anchor"], models["augmenting"], connections)


def test_compositions_of_compositions_and_of_nothing(models, composed):
  with pytest.raises(InputError, match="single models"):
    calm_jax.compose(composed, models["anchor"])
  with pytest.raises(InputError, match="single models"):
    calm_jax.compose(models["anchor"], composed)
  with pytest.raises(InputError, match="no augmenting model"):
    calm_jax.compose(models["anchor"], {})


def test_vocabularies_of_unlike_size(models, tmp_path):
  other = calm_jax.load_model(str(save(tmp_path / "other", 3, vocab_size=60)))
  with pytest.raises(
    InputError, match=r"vocabulary of 60, the anchor one of 61.* tokenizer"
  ):
    calm_jax.compose(models["anchor"], other)


def test_vocabularies_of_the_same_size_with_other_pieces(tmp_path):
  both = []
  for i, text in enumerate(("abcdefghij", "klmnopqrst")):
    folder = save(tmp_path / text, i, vocab_size=14)
    spell(folder, text)
    both.append(calm_jax.load_model(str(folder)))
  model = calm_jax.compose(*both)
  assert model.tokenizers == {"augmenting": both[1].tokenizer}
  ids = model.tokenizer.encode("abcd")
  np.testing.assert_array_equal(model.logits([ids]), both[0].logits([ids]))
  assert not calm_jax.compose(both[0], both[0]).tokenizers


def test_a_folder_without_a_tokenizer_has_no_text(models, composed):
  for model in (models["anchor"], composed):
    assert model.tokenizer is None
    with pytest.raises(InputError, match=r"anchor was loaded without a token"):
      model.generate(["a"])


def test_text(tmp_path):
  folder = save(tmp_path / "model", 1, vocab_size=14)
  spell(folder, "abcdefghij")
  model = calm_jax.load_model(str(folder))
  texts = model.generate(["abc", "", "j"], 5)
  assert all(set(text) <= set("abcdefghij") for text in texts)
  # BOS is put before each prompt, so that an empty one can be continued.
  assert model.generate([""], 5) == texts[1:2]
  assert model.generate(["abc"], 5, temperature=1.0, seed=1) == model.generate(
    ["abc"], 5, temperature=1.0, seed=1
  )
  assert model.generate("abc", 5) == texts[0]
  with pytest.raises(InputError, match="2 seeds for 1 prompts"):
    model.generate("abc", seed=[1, 2])
  with pytest.raises(InputError, match="length limit of 2048"):
    model.generate(["abc" * 700])


def test_streams_what_it_generates(tmp_path):
  folder = save(tmp_path / "model", 1, vocab_size=14)
  spell(folder, "abcdefghij")
  model = calm_jax.load_model(str(folder))
  whole = model.generate("abc", 40)
  assert len(whole) > 16  # of more than one look of the host
  pieces = list(model.stream("abc", 40))
  assert len(pieces) > 1
  assert "".join(pieces) == whole
  drawn = {"temperature": 2.0, "top_k": 9, "seed": 5}
  assert "".join(model.stream("abc", 40, **drawn)) == model.generate(
    "abc", 40, **drawn
  )
  # Stop strings of two characters may lie across two pieces.
  for at in (3, 15, 17):
    stop = whole[at : at + 2]
    want = whole[: whole.index(stop)]
    assert model.generate(["abc"], 40, stop=["zz", stop]) == [want]
    assert "".join(model.stream("abc", 40, stop=stop)) == want


def test_a_draw_depends_on_its_own_seed_alone(tmp_path):
  folder = save(tmp_path / "model", 1, vocab_size=14)
  spell(folder, "abcdefghij")
  model = calm_jax.load_model(str(folder))
  options = {"temperature": 1.5, "top_p": 0.9}
  together = model.generate(["abc", "a", "j"], 9, seed=[7, 8, 9], **options)
  assert together == model.generate(["abc", "a", "j"], 9, seed=7, **options)
  for prompt, seed, want in zip(
    ["abc", "a", "j"], (7, 8, 9), together, strict=True
  ):
    assert model.generate(prompt, 9, seed=seed, **options) == want
  assert model.generate("abc", 9, seed=10, **options) != together[0]


def test_scores_are_the_log_probabilities_of_the_tokens(tmp_path):
  folder = save(tmp_path / "model", 1, vocab_size=14)
  spell(folder, "abcdefghij")
  model = calm_jax.load_model(str(folder))
  prompts, completions = ["abc", "", "jjj"], ["de", "a" * 40, ""]
  scores = model.score(prompts, completions)
  for prompt, completion, score in zip(
    prompts, completions, scores, strict=True
  ):
    given = model.tokenizer.with_bos(model.tokenizer.encode(prompt))
    ids = given + model.tokenizer.encode_continuation(prompt, completion)
    logits = np.asarray(model.logits(np.array([ids]))[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(len(given) - 1, len(ids) - 1)
    picked = logprobs[at, ids[len(given) :]]
    assert score.num_tokens == len(completion)
    np.testing.assert_allclose(score.logprob, picked.sum(), atol=1e-4)
    assert score.is_greedy == (
      logprobs[at].argmax(-1).tolist() == ids[len(given) :]
    )
  greedy = model.generate("abc", 3)
  assert model.score(["abc"], [greedy])[0].is_greedy
  with pytest.raises(InputError, match="1 prompts and 2 completions"):
    model.score(["a"], ["b", "c"])


def test_where_the_heads_look(composed, models):
  look = composed.cross_attention([3, 1, 4, 1, 5], 2)
  assert look["weights"].shape == (2, 4, 5, 5)
  np.testing.assert_allclose(look["weights"].sum(-1), 1, rtol=1e-5)
  assert list(look["tokens"]) == ["3", "1", "4", "1", "5"]
  assert list(look["connections"]) == [
    "augmenting/layer_4_to_2", "augmenting/layer_8_to_4"
  ]  # fmt: skip
  with pytest.raises(InputError, match="single model"):
    models["anchor"].cross_attention([1], 1)


def test_an_encoder_is_looked_at_through_the_prompt(models):
  encoder = calm_jax.compose(
    models["anchor"], models["augmenting"], [(8, 4)], visibility="encoder"
  )
  look = encoder.cross_attention([3, 1, 4, 1, 5], prompt_length=3)
  assert not look["weights"][..., 3:].any()
  np.testing.assert_allclose(look["weights"].sum(-1), 1, rtol=1e-5)
  with pytest.raises(InputError, match="encoder"):
    encoder.logits(TOKENS)


def shared_texts() -> dict[str, str]:
  """Greedy texts of the shared models, from their README."""
  readme = pathlib.Path(os.environ["CALM_SHARED"], "README.md").read_text()
  rows = re.findall(
    r"\| `models/(\w+)` .*reedy from BOS: \"(.*?)\" *\|", readme
  )
  return dict(rows)


@pytest.mark.skipif(
  not os.environ.get("CALM_SHARED"),
  reason="CALM_SHARED does not name the folder of shared models",
)
@pytest.mark.parametrize("name", ["stories260k", "babyllama"])
def test_shared_models_tell_their_stories(name):
  text = shared_texts()[name]
  folder = pathlib.Path(os.environ["CALM_SHARED"], "models", name)
  model = calm_jax.load_model(str(folder))
  [told] = model.generate([""], len(model.tokenizer.encode(text)))
  assert told.strip() == text
