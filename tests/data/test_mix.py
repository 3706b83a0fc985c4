"""Tests of mixtures, and of exactness with and without them."""

import json
import re

import numpy as np
import pytest
import text_data
from text_data import (
  assert_same,
  documents,
  flat,
  joined,
  make_source,
  questions,
  texts_of,
)

from calm_jax.core.errors import InputError
from calm_jax.data.pipeline import BatchIterator


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return text_data.train_tokenizer(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def augmenting(tmp_path_factory):
  return text_data.augmenting(tmp_path_factory.mktemp("letters"))


PARTS = {
  "words": (documents(40), 3.0),
  "long": (documents(15, words=30, name="b.txt", seed=1), 1.0),
  "asked": (questions(23), 2.0),
}


def make(tokenizer, kind="mixture", **changes):
  settings = {"batch_size": 4, "length": 32, "seed": 0} | changes
  if kind == "mixture":
    return make_source(PARTS, tokenizer, **settings)
  return make_source(PARTS["long"][0], tokenizer, **settings)


def rows_of(source, count):
  """Origins of the examples of the first `count` rows."""
  batches = range(-(-count // source.options.batch_size))
  return flat(source.row_origins(i) for i in batches)[:count]


@pytest.mark.parametrize("kind", ["text", "mixture", "two tokenizers"])
def test_stopped_at_100_random_steps(tokenizer, augmenting, kind):
  options = {"augmenting": augmenting} if kind == "two tokenizers" else {}
  kind = "text" if kind == "text" else "mixture"

  def fresh():
    return make(tokenizer, kind, **options)

  length = 400  # tens of epochs
  unbroken = BatchIterator(fresh())
  batches, states = [], []
  for _ in range(length):
    states.append(json.dumps(unbroken.get_state()))
    batches.append(next(unbroken))
  unbroken.close()
  stops = np.random.default_rng(0).integers(0, length - 2, 100)
  for stop in stops.tolist():
    state = json.loads(states[stop])
    resumed = BatchIterator(fresh())
    resumed.set_state(state)
    for batch in batches[stop : stop + 3]:
      assert_same(next(resumed), batch)
    resumed.close()


@pytest.mark.parametrize("kind", ["text", "mixture", "two tokenizers"])
def test_1_2_and_4_hosts_make_the_same_global_batches(
  tokenizer, augmenting, kind
):
  options = {"augmenting": augmenting} if kind == "two tokenizers" else {}
  kind = "text" if kind == "text" else "mixture"
  whole = make(tokenizer, kind, **options)
  assert_same(whole[0], make(tokenizer, kind, **options, process_count=1)[0])
  for count in (2, 4):
    hosts = [
      make(tokenizer, kind, **options, process_index=i, process_count=count)
      for i in range(count)
    ]
    assert {host.fingerprint for host in hosts} == {whole.fingerprint}
    for index in (0, 1, 17, 300):
      shares = [host[index] for host in hosts]
      assert all(len(share.anchor.tokens) == 4 // count for share in shares)
      assert_same(joined(shares), whole[index])
      assert {host.describe(index) for host in hosts} == {whole.describe(index)}


def test_shares_of_the_rows_follow_the_weights(tokenizer):
  for weights in ((3, 1, 2), (0.3, 0.1, 0.2), (1, 0.003, 0.7)):
    parts = {
      name: (examples, weight)
      for (name, (examples, _)), weight in zip(
        PARTS.items(), weights, strict=True
      )
    }
    source = make_source(parts, tokenizer, batch_size=5, length=32, seed=0)
    count = 5000
    files = [origins[0].split()[0] for origins in rows_of(source, count)]
    names = dict(zip(("a.txt", "b.txt", "q.jsonl"), weights, strict=True))
    for file, weight in names.items():
      share = weight / sum(weights)
      # To the row, but for weights that are rounded to 0.5%.
      assert abs(files.count(file) - share * count) < 2 + 0.005 * share * count


def test_no_row_comes_twice_in_an_epoch_of_its_part(tokenizer):
  source = make(tokenizer, pack=False, length=200)  # an example a row
  origins = flat(rows_of(source, 1000))
  for examples, _ in PARTS.values():
    expected = sorted(example.origin for example in examples)
    own = [origin for origin in origins if origin in expected]
    count = len(examples)
    starts = range(0, len(own) - count + 1, count)
    epochs = [own[start : start + count] for start in starts]
    assert len(epochs) > 5
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)


def test_a_part_has_its_order_whatever_the_others_are(tokenizer):
  def order(parts):
    source = make_source(parts, tokenizer, batch_size=4, length=32, seed=0)
    rows = map(tuple, rows_of(source, 400))
    return [row for row in rows if row[0].startswith("a.txt")][:100]

  others = {"more": (questions(9), 0.5), "words": (PARTS["words"][0], 0.2)}
  assert order(PARTS) == order(others)


def test_rows_of_two_tokenizers_have_the_shape_of_the_longest(
  tokenizer, augmenting
):
  alone = [
    make_source(
      examples, tokenizer, augmenting=augmenting, batch_size=4, length=32,
      seed=None,
    ).augmenting_lengths["letters"]
    for examples, _ in PARTS.values()
  ]  # fmt: skip
  source = make(tokenizer, augmenting=augmenting)
  # Each part is shuffled before it is packed, so its longest row may differ.
  assert source.augmenting_lengths["letters"] >= max(alone) - 16
  for i in range(50):
    batch = source[i]
    shape = (4, source.augmenting_lengths["letters"])
    assert batch.augmenting["letters"].tokens.shape == shape
  given = make(tokenizer, augmenting=augmenting, augmenting_length=160)
  assert given[0].augmenting["letters"].tokens.shape == (4, 160)


def test_batches_hold_the_texts_of_all_parts(tokenizer):
  source = make(tokenizer, pack=False, length=200)
  seen = flat(flat(texts_of(source[i], tokenizer)) for i in range(60))
  for examples, _ in PARTS.values():
    assert {e.prompt + e.completion for e in examples} <= set(seen)


def test_one_part_is_the_source_of_its_examples(tokenizer):
  alone = make_source(documents(9), tokenizer, batch_size=2, length=32, seed=5)
  one = {"a": (documents(9), 0.25)}
  mixed = make_source(one, tokenizer, batch_size=2, length=32, seed=5)
  assert mixed.fingerprint == alone.fingerprint
  for i in range(9):
    assert_same(mixed[i], alone[i])
    assert mixed.describe(i) == alone.describe(i)


def test_the_fingerprint_follows_the_mixture(tokenizer):
  def fingerprint(parts, **changes):
    settings = {"batch_size": 4, "length": 32, "seed": 0}
    return make_source(parts, tokenizer, **settings | changes).fingerprint

  renamed = {f"{name}2": part for name, part in PARTS.items()}
  weighed = PARTS | {"asked": (PARTS["asked"][0], 4.0)}
  made = {fingerprint(p) for p in (PARTS, renamed, weighed)}
  assert len(made) == 3
  assert fingerprint(PARTS, seed=1) not in made
  assert fingerprint(dict(PARTS)) in made


def test_describe_names_the_part(tokenizer):
  text = make(tokenizer).describe(2)
  assert text.startswith("batch 2: ")
  assert re.search(
    r"(words: a\.txt|long: b\.txt|asked: q\.jsonl) line \d", text
  )
  line = make(tokenizer).describe_truncation()
  assert re.fullmatch(
    r"words: 40 examples of [\d,]+ tokens, none too long for a row;"
    r" long: 15 examples of [\d,]+ tokens, 15 go on in further windows"
    r" \([\d,]+ tokens\); asked: 23 examples of [\d,]+ tokens, none too long"
    r" for a row",
    line,
  )


@pytest.mark.parametrize(
  "parts, message",
  [
    ({}, "without parts"),
    ({"a": ([], 1)}, "'a' of the mixture has no examples"),
    ({"a": (questions(3), 1), "b": (questions(3), 0)}, "'b'.*weight 0"),
    ({"a": (questions(3), -1)}, "above 0"),
    ({"a": (questions(3), float("nan"))}, "above 0"),
  ],
)
def test_bad_mixtures(tokenizer, parts, message):
  with pytest.raises(InputError, match=message):
    make_source(parts, tokenizer, batch_size=4, length=32, seed=0)


def test_a_mixture_takes_a_seed(tokenizer):
  with pytest.raises(InputError, match="seed"):
    make(tokenizer, seed=None)
