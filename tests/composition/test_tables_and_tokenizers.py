"""Tables of embeddings with more, or fewer, rows than there are tokens."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import spelled

import calm_jax
from calm_jax.core.errors import InputError
from calm_jax.generation import batching, decode, scoring
from calm_jax.generation.sampling import Sampler

V, PADDED = spelled.VOCAB, spelled.VOCAB + 7
PROMPTS = ["ab", "cd ef gh.", "k"]
FILTERED = {
  "temperature": 1.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01,
  "repetition_penalty": 1.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """By name: one whose table fits, one padded, one that lacks a row."""
  folder = tmp_path_factory.mktemp("models")
  sizes = {"fits": V, "padded": PADDED, "short": V - 1}
  other = spelled.save(folder / "other", 3, text=spelled.ALPHABET + "xyz")
  return {"other": calm_jax.load_model(other)} | {
    name: calm_jax.load_model(
      spelled.save(folder / name, seed, vocab_size=size)
    )
    for seed, (name, size) in enumerate(sizes.items())
  }


def likes_padding(model):
  """The model with rows of padding as its likeliest tokens, but the last."""
  kernel = model.params["anchor"]["head"]["kernel"]
  size = kernel.shape[1]
  kernel = jnp.concatenate([kernel[:, :V], 9 * kernel[:, : size - V]], axis=1)
  anchor = model.params["anchor"] | {"head": {"kernel": kernel}}
  changed = type(model)(
    model.spec, model.params | {"anchor": anchor}, model.tokenizer, "",
    model.tokenizers,
  )  # fmt: skip
  best = np.asarray(changed.logits([[1, 5, 6, 7]])).argmax(-1)
  assert best.max() >= V
  return changed


@pytest.mark.parametrize("anchor", ["fits", "padded"])
def test_the_same_tokens_in_tables_of_different_size(models, anchor):
  other = {"fits": "padded", "padded": "fits"}[anchor]
  model = calm_jax.compose(models[anchor], models[other])
  assert not model.tokenizers and model.num_ids == V
  batch = batching.token_batch(model, [[1, 5, 6, 7]])
  assert batch.augmenting == batch.visible == {}
  assert model.generate(PROMPTS, 6) == models[anchor].generate(PROMPTS, 6)
  # Ids of the padding are not the other model's.
  with pytest.raises(InputError, match=f"to {V}; .* 0 to {V - 1}"):
    model.logits([[1, V]])


def test_a_table_that_lacks_a_token_is_aligned_by_the_text(models):
  model = calm_jax.compose(models["fits"], models["short"])
  assert model.tokenizers.keys() == {"augmenting"}
  # All that a short anchor can be given is in the other table.
  assert not calm_jax.compose(models["short"], models["fits"]).tokenizers


@pytest.mark.parametrize(
  ("other", "options"),
  [
    (None, {}), (None, {"temperature": 1.0}), (None, FILTERED), ("fits", {}),
    ("fits", {"temperature": 1.0}), ("other", {}),
  ],
)  # fmt: skip
def test_padding_is_never_picked(models, other, options):
  model = models["padded"]
  if other:
    model = calm_jax.compose(model, models[other])
    assert bool(model.tokenizers) == (other == "other")
  model = likes_padding(model)
  prompts = [[1, *model.tokenizer.encode(text)] for text in PROMPTS]
  made = decode.generate(
    model,
    prompts,
    max_new_tokens=12,
    sampler=Sampler(**options),
    seeds=[1, 2, 3],
  )
  assert max(map(max, filter(None, made))) < V
  streamed = "".join(model.stream(PROMPTS[0], 12, seed=1, **options))
  assert streamed == model.generate(PROMPTS[0], 12, seed=1, **options)
  if options:
    return
  # What greedy decoding writes is what scoring calls greedy.
  scores = scoring.score(model, prompts, made)
  assert all(score.is_greedy for score in scores)
  if other == "fits":
    with pytest.raises(InputError, match=f"completion 0: .* to {V};"):
      scoring.score(model, prompts[:1], [[V]])
  else:
    [padding] = scoring.score(model, prompts[:1], [[V]])
    assert not padding.is_greedy and np.isfinite(padding.logprob)


def test_a_table_without_padding_has_no_mask(models):
  assert batching.allowed_ids(models["fits"]) is None
  assert batching.allowed_ids(models["padded"]).tolist() == [True] * V + [
    False
  ] * (PADDED - V)


def test_a_composition_stays_aligned_as_it_was_saved(models, tmp_path):
  model = calm_jax.compose(models["padded"], models["fits"])
  model.save(tmp_path / "new")
  path = tmp_path / "new" / "calm_config.json"
  assert not calm_jax.load_composed(path.parent).tokenizers
  saved = json.loads(path.read_text())
  # Before tables of different size were the same tokens, and before it was
  # written down.
  assert saved["models"]["augmenting/augmenting"].pop("same_tokens") is True
  path.write_text(json.dumps(saved))
  old = calm_jax.load_composed(path.parent)
  assert old.tokenizers.keys() == {"augmenting"}
  assert old.generate(PROMPTS, 6) == models["padded"].generate(PROMPTS, 6)
  old.save(tmp_path / "again")
  again = calm_jax.load_composed(tmp_path / "again")
  assert again.tokenizers.keys() == {"augmenting"}
  parts = again.add("more", models["fits"]).drop("augmenting")
  assert not parts.tokenizers


def test_a_token_beyond_the_table_is_named(models):
  model = models["short"]
  last = model.tokenizer.pieces[-1]
  text = f"a{last}b"
  said = rf"{last!r} has id {V - 1}.*{V - 1} rows.*short"
  calls = [
    lambda: model.tokenizer.encode_prompt(text),
    lambda: model.tokenizer.encode_pair("a", text),
    lambda: model.tokenizer.encode_within(text),
    lambda: model.tokenizer.encode_continuation("a", text),
    lambda: model.tokenizer.encode_prompt(text),
    lambda: model.tokenizer.encode_pair("a", text),
    lambda: model.generate(text, 3),
    lambda: list(model.stream(text, 3)),
    lambda: model.score(["a"], [text]),
    lambda: model.score([text], ["a"]),
    # As the augmenting model of an anchor that has the token.
    lambda: calm_jax.compose(models["fits"], model).generate(text, 3),
    lambda: calm_jax.compose(models["fits"], model).score(["a"], [text + " a"]),
    lambda: calm_jax.compose(models["fits"], model).attention(text, " a"),
    lambda: calm_jax.compose(model, models["fits"]).attention("a", text),
  ]
  for call in calls:
    with pytest.raises(InputError, match=said):
      call()
  ids = model.tokenizer.encode(text)
  assert max(ids) == V - 1
  ids_are_given = [
    lambda: model.logits([ids]),
    lambda: decode.generate(model, [ids], max_new_tokens=3),
    lambda: scoring.score(model, [ids], [[5]]),
    lambda: scoring.score(model, [[5]], [ids]),
    lambda: calm_jax.compose(model, models["fits"]).cross_attention(ids, 1),
  ]
  for call in ids_are_given:
    with pytest.raises(
      InputError, match=rf"to {V - 1} \({last!r}\); .*{V - 2}"
    ):
      call()
  part = calm_jax.compose(model, models["padded"]).part("augmenting/augmenting")
  assert part.tokenizer.encode(text)[1] == V - 1


def test_ids_of_any_kind_of_array_and_of_none(models):
  model = models["fits"]
  lists = decode.generate(model, [[1, 5], [6]], max_new_tokens=3)
  arrays = [np.array([1, 5], np.uint16), np.array([6])]
  assert decode.generate(model, arrays, max_new_tokens=3) == lists
  scored = scoring.score(model, [[1, 5]], [[6, 7]])
  assert scoring.score(model, arrays[:1], [np.array([6, 7])]) == scored
  for ids, said in {
    (1, -1): "from -1 to 1", (1.0, 2.0): "got float", (True, False): "got bool",
    (1, 2**40): f"to {2**40}", ((1, 2),): "must be integers",
  }.items():  # fmt: skip
    for call in (
      lambda ids: decode.generate(model, [[1], ids], max_new_tokens=3),
      lambda ids: scoring.score(model, [[1], ids], [[1], [1]]),
      lambda ids: scoring.score(model, [[1], [1]], [[1], ids]),
      lambda ids: model.logits([ids]),
    ):
      with pytest.raises(InputError, match=said):
        call(ids)
