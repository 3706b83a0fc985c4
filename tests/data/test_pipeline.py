"""Tests of calm_jax.data.pipeline."""

import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest
import text_data
from text_data import (
  assert_same,
  documents,
  flat,
  joined,
  make_source,
  one_pass,
  questions,
  texts_of,
)

from calm_jax.core.errors import InputError
from calm_jax.data.examples import TextExample
from calm_jax.data.key_value_source import KeyValueSource
from calm_jax.data.key_value_text import make_examples, train_tokenizer
from calm_jax.data.key_values import (
  ExpressionOptions,
  make_dictionary,
  sample_expressions,
)
from calm_jax.data.pipeline import BatchIterator


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return text_data.train_tokenizer(tmp_path_factory.mktemp("text"))


def make(tokenizer, data=None, **changes):
  settings = {"batch_size": 4, "length": 32, "seed": 0}
  return make_source(data or documents(30), tokenizer, **settings | changes)


def test_one_pass_in_order(tokenizer):
  data = questions(11)
  batches = one_pass(data, tokenizer, batch_size=4, length=32)
  assert len(batches) == 3
  rows = [row for batch in batches for row in texts_of(batch, tokenizer)]
  assert rows == [[e.prompt + e.completion] for e in data] + [[]]
  for values in jax.tree.leaves(batches[-1]):
    assert values.shape == (4, 32) and not values[-1].any()


def test_what_counts(tokenizer):
  data = questions(1)
  (batch,) = one_pass(data, tokenizer, batch_size=1, length=32)
  prompt = [tokenizer.bos_id, *tokenizer.encode(data[0].prompt)]
  completion = [*tokenizer.encode("0"), tokenizer.eos_id]
  ids, end = prompt + completion, len(prompt)
  used = slice(0, len(ids))
  tokens, targets = batch.anchor.tokens[0], batch.targets[0]
  assert tokens[used].tolist() == ids
  assert targets[used].tolist() == [*ids[1:], 0]
  assert np.flatnonzero(batch.weights[0]).tolist() == [end - 1, end]
  assert set(batch.prompt_ends[0][used]) == {end}


def test_plain_text_counts_from_the_bos(tokenizer):
  for bos in (1, None):
    changed = dataclasses.replace(tokenizer, bos_id=bos)
    (batch,) = one_pass(documents(1), changed, batch_size=1, length=64)
    used = int((batch.anchor.segments > 0).sum())
    assert batch.weights[0, : used - 1].all()
    assert batch.weights.sum() == used - 1
    assert set(batch.prompt_ends[0, :used]) == {1}


def test_packed_rows(tokenizer):
  data = questions(20)
  batches = one_pass(data, tokenizer, batch_size=2, length=40, pack=True)
  rows = [row for batch in batches for row in texts_of(batch, tokenizer)]
  assert flat(rows) == [e.prompt + e.completion for e in data]
  assert len(rows) < 12
  for batch in batches:
    for row in range(2):
      segments = batch.anchor.segments[row]
      starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
      assert (batch.anchor.positions[row, starts] == 0).all()
      assert (batch.anchor.tokens[row, starts] == tokenizer.bos_id).all()
      for start in starts:
        inside = segments == segments[start]
        assert (batch.prompt_ends[row, inside] > start).all()


def test_long_text_goes_on_in_windows(tokenizer):
  data = [*documents(1, words=40), *documents(1, words=2)]
  source = make(tokenizer, data, length=16, seed=None, pack=False)
  assert source.truncation[""].split[0] == 1
  ids = [1, *tokenizer.encode(data[0].completion), 2]
  targets, counted = [], []
  for i in range(len(source)):
    batch = source[i]
    keep = batch.weights > 0
    targets += batch.targets[keep].tolist()
    counted += batch.prompt_ends[keep].tolist()
  assert targets[: len(ids) - 1] == ids[1:]
  assert set(counted) == {1}


def test_too_long_with_a_prompt(tokenizer):
  with pytest.raises(InputError, match=r"q\.jsonl line 1: .* a row has 5"):
    make(tokenizer, questions(3), length=5)


def test_nothing_to_learn(tokenizer):
  with pytest.raises(InputError, match="no examples"):
    make_source([], tokenizer, batch_size=1, length=8, seed=0)
  bare = dataclasses.replace(tokenizer, bos_id=None, eos_id=None)
  with pytest.raises(InputError, match="x line 1: 1 tokens"):
    make(bare, [TextExample("", "7", "x line 1")])
  with pytest.raises(InputError, match="at least 2 slots"):
    make(tokenizer, length=1)


@pytest.mark.parametrize("count", [1, 11])
def test_every_epoch_has_every_row_in_another_order(tokenizer, count):
  source = make(tokenizer, questions(count), pack=False, batch_size=count)
  epochs = [flat(texts_of(source[i], tokenizer)) for i in range(6)]
  expected = sorted(e.prompt + e.completion for e in questions(count))
  assert [sorted(epoch) for epoch in epochs] == [expected] * 6
  if count > 1:
    assert len(set(map(tuple, epochs))) == 6


def test_batches_run_on_over_the_epochs(tokenizer):
  source = make(tokenizer, questions(6), pack=False, batch_size=4)
  seen = [flat(texts_of(source[i], tokenizer)) for i in range(3)]
  texts = flat(seen)
  assert len(set(texts[:6])) == len(set(texts[6:])) == 6
  assert len(source) > 10**15


def test_hosts_share_the_global_batch(tokenizer):
  for seed in (0, None):
    whole = make(tokenizer, documents(9), seed=seed)
    parts = [
      make(tokenizer, documents(9), seed=seed, process_index=i, process_count=2)
      for i in range(2)
    ]
    assert {part.fingerprint for part in parts} == {whole.fingerprint}
    for index in range(min(len(whole), 4)):
      assert_same(whole[index], joined([part[index] for part in parts]))


def key_value_source(tmp_path, **changes):
  kv = make_dictionary(20, 0.5, seed=0)
  made = train_tokenizer(kv, tmp_path / "kv")
  settings = {"seed": 0, "batch_size": 4, "length": 32} | changes
  return KeyValueSource(
    kv, made, {"kv_math": 1}, ExpressionOptions(2, 3), **settings
  )


@pytest.mark.parametrize("kind", ["text", "key values"])
def test_resume_is_exact(tokenizer, tmp_path, kind):
  def fresh(**changes):
    if kind == "text":
      return make(tokenizer, **changes)
    return key_value_source(tmp_path, **changes)

  iterator = BatchIterator(fresh())
  batches = [next(iterator) for _ in range(5)]
  state = json.loads(json.dumps(iterator.get_state()))
  assert state["next_index"] == 5
  later = [next(iterator) for _ in range(4)]
  # Back within the same iterator, and into a new one.
  iterator.set_state(state)
  other = BatchIterator(fresh())
  assert_same(next(other), batches[0])
  other.set_state(state)
  for batch in later:
    for resumed in (iterator, other):
      assert_same(next(resumed), batch)
  with pytest.raises(InputError, match="belongs to other data"):
    BatchIterator(fresh(seed=1)).set_state(state)
  for resumed in (iterator, other):
    resumed.close()


def test_resume_on_another_number_of_hosts(tokenizer):
  iterator = BatchIterator(make(tokenizer))
  next(iterator)
  state = iterator.get_state()
  halves = []
  for i in range(2):
    part = BatchIterator(make(tokenizer, process_index=i, process_count=2))
    part.set_state(state)
    halves.append(next(part))
  assert_same(next(iterator), joined(halves))


def test_a_single_pass_ends(tokenizer):
  source = make(tokenizer, seed=None)
  batches = list(BatchIterator(source))
  assert len(batches) == len(source)


def test_an_error_reaches_the_reader(tmp_path):
  class Broken:
    fingerprint = "broken"

    def __len__(self):
      return 5

    def __getitem__(self, index):
      if index == 2:
        raise InputError("batch 2 is bad")
      return {"index": np.array(index)}

  iterator = BatchIterator(Broken())
  assert [int(next(iterator)["index"]) for _ in range(2)] == [0, 1]
  with pytest.raises(InputError, match="batch 2 is bad"):
    next(iterator)
  iterator.close()


def test_close_ends_the_threads(tokenizer):
  before = threading.active_count()
  iterator = BatchIterator(make(tokenizer))
  next(iterator)
  iterator.close()
  patience = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < patience:
    time.sleep(0.01)
  assert threading.active_count() <= before


def test_describe(tokenizer):
  data = questions(30)
  source = make(tokenizer, data, seed=None, pack=False)
  assert source.describe(1) == (
    "batch 1 (epoch 0): q.jsonl line 5, q.jsonl line 6, q.jsonl line 7,"
    " q.jsonl line 8"
  )
  wide = make(tokenizer, data, seed=None, pack=False, batch_size=16)
  assert wide.describe(0).endswith("q.jsonl line 8 and 8 more")
  assert wide.describe(1).endswith("q.jsonl line 24 and 6 more")
  shuffled = make(tokenizer, data, pack=False, batch_size=2)
  first, second = texts_of(shuffled[20], tokenizer)
  lines = {e.prompt + e.completion: e.origin for e in data}
  assert shuffled.describe(20) == (
    f"batch 20 (epoch 1): {lines[first[0]]}, {lines[second[0]]}"
  )


def test_expressions_as_batches(tmp_path):
  kv = make_dictionary(20, 0.5, seed=0)
  made = train_tokenizer(kv, tmp_path / "kv")
  options = ExpressionOptions(2, 3, part="eval")
  drawn = sample_expressions(np.random.default_rng(0), kv, 10, options)
  data = make_examples(kv, drawn, "kv_math")
  batches = one_pass(data, made, batch_size=5, length=32)
  rows = [row for batch in batches for row in texts_of(batch, made)]
  assert rows == [[e.prompt + e.completion] for e in data]
