"""Tests of what is too long for a row, and of what is told about it."""

import numpy as np
import pytest
import text_data
from text_data import flat, make_source, questions, texts_of

from calm_jax.core.errors import InputError
from calm_jax.data.documents import Truncation
from calm_jax.data.examples import TextExample

LONG = " ".join(text_data.WORDS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return text_data.train_tokenizer(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def augmenting(tmp_path_factory):
  return text_data.augmenting(tmp_path_factory.mktemp("letters"))


def make(tokenizer, data, **changes):
  settings = {"batch_size": 4, "length": 16, "seed": None, "pack": False}
  return make_source(data, tokenizer, **settings | changes)


def size(tokenizer, example):
  given = tokenizer.encode(example.prompt)
  new = tokenizer.encode_continuation(example.prompt, example.completion)
  return len(given) + len(new) + 2  # BOS and EOS


# Short; a completion that is too long; a prompt that is; plain text that is.
EXAMPLES = [
  TextExample("one: ", "1", "a line 1"),
  TextExample("two: ", LONG, "a line 2"),
  TextExample(f"{LONG}: ", "3", "a line 3"),
  TextExample("", LONG, "a line 4"),
]


def test_nothing_too_long(tokenizer):
  data = questions(20)
  source = make(tokenizer, data)
  tokens = sum(size(tokenizer, example) for example in data)
  assert source.truncation == {"": Truncation(20, tokens)}
  assert source.describe_truncation() == (
    f"20 examples of {tokens} tokens, none too long for a row"
  )


def test_cut(tokenizer):
  source = make(tokenizer, EXAMPLES, too_long="cut")
  sizes = [size(tokenizer, example) for example in EXAMPLES]
  assert min(sizes[1:]) > 16
  assert source.truncation[""] == Truncation(
    4,
    sum(sizes),
    split=(1, sizes[3] - 16),
    cut=(1, sizes[1] - 16),
    dropped=(1, sizes[2]),
  )
  batches = [source[i] for i in range(len(source))]
  rows = flat(texts_of(batch, tokenizer) for batch in batches)
  assert rows[0] == ["one: 1"]
  assert (f"two: {LONG}").startswith(rows[1][0])
  assert (batches[0].anchor.segments[1] == 1).all()  # all of its row
  assert not any("line 3" in o for o in flat(flat(
    source.row_origins(i) for i in range(len(source))
  )))  # fmt: skip
  # What is kept of the completion is learnt, and no end that is not there.
  prompt = len(tokenizer.encode("two: ")) + 1
  np.testing.assert_array_equal(
    np.flatnonzero(batches[0].weights[1]), np.arange(prompt - 1, 15)
  )
  assert tokenizer.eos_id not in batches[0].targets[1]


def test_drop(tokenizer):
  source = make(tokenizer, EXAMPLES, too_long="drop")
  sizes = [size(tokenizer, example) for example in EXAMPLES]
  found = source.truncation[""]
  assert (found.cut[0], found.split[0]) == (0, 1)
  assert found.dropped == (2, sizes[1] + sizes[2])
  assert source.describe_truncation() == (
    f"4 examples of {sum(sizes)} tokens, 1 go on in further windows"
    f" ({sizes[3] - 16} tokens), 2 were dropped ({found.dropped[1]} tokens)"
  )
  with pytest.raises(InputError, match="all 2 examples are longer"):
    make(tokenizer, EXAMPLES[1:3], too_long="drop")


def test_error(tokenizer):
  for seed in (None, 0, 1):
    with pytest.raises(
      InputError, match=r"a line 2: .* a row has 16 \(and 1 more\)"
    ):
      make(tokenizer, EXAMPLES, seed=seed)
  with pytest.raises(InputError, match="too_long='cats' is none of"):
    make(tokenizer, EXAMPLES, too_long="cats")


def test_too_long_for_the_augmenting_model(tokenizer, augmenting):
  options = {"augmenting": augmenting, "augmenting_length": 10, "length": 64}
  data = [*EXAMPLES[:2], TextExample("", LONG, "a line 3")]
  with pytest.raises(InputError, match="a line 2: the augmenting model reads"):
    make(tokenizer, data, **options)
  source = make(tokenizer, data, too_long="cut", **options)
  found = source.truncation[""]
  counts = found.cut[0], found.split[0], found.dropped[0]
  assert counts == (1, 1, 0)
  # Whole examples, less what is counted.
  whole = make(tokenizer, data, augmenting=augmenting, length=64)
  assert found.tokens == whole.truncation[""].tokens
  cut, full = source[0], whole[0]
  kept = int((cut.anchor.segments[1] > 0).sum())
  assert kept == int((full.anchor.segments[1] > 0).sum()) - found.cut[1]
  np.testing.assert_array_equal(
    cut.anchor.tokens[1, :kept], full.anchor.tokens[1, :kept]
  )
  seen, all_seen = cut.visible["letters"], full.visible["letters"]
  np.testing.assert_array_equal(seen[1, :kept], all_seen[1, :kept])
  assert seen.max() <= 10
  dropped = make(tokenizer, data, too_long="drop", **options)
  assert dropped.truncation[""].dropped[0] == 1
