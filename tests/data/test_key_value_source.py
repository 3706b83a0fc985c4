"""Tests of the key-value task as text and as batches."""

import dataclasses
import re

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from text_data import assert_same, joined

from calm_jax.core.errors import InputError
from calm_jax.data.key_value_source import KeyValueSource
from calm_jax.data.key_value_text import (
  PROMPTS,
  TASKS,
  make_examples,
  train_tokenizer,
)
from calm_jax.data.key_values import (
  ExpressionOptions,
  evaluate,
  is_eval,
  make_dictionary,
  sample_expressions,
)
from calm_jax.text.tokenizer import train_sentencepiece

KV = make_dictionary(40, 0.5, seed=0)
BIG_KV = make_dictionary(25_000, 0.2, seed=0)
# Values as large over few keys, which make short tables.
SPREAD_KV = dataclasses.replace(KV, values=KV.values * 625)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return train_tokenizer(KV, tmp_path_factory.mktemp("kv") / "tokenizer")


OPTIONS = ExpressionOptions(2, 3)


def source(tokenizer, tasks=("kv_math",), kv=KV, options=OPTIONS, **changes):
  settings = {"seed": 3, "batch_size": 8, "length": 48} | changes
  weights = dict.fromkeys(tasks, 1.0)
  return KeyValueSource(kv, tokenizer, weights, options, **settings)


def segments_of(batch):
  """(prompt ids, completion ids) of every segment, checking every array."""
  found = []
  for row in range(len(batch.anchor.tokens)):
    arrays = jax.tree.map(lambda values, row=row: values[row], batch)
    numbers = arrays.anchor.segments
    used = int((numbers > 0).sum())
    assert (numbers[used:] == 0).all() and (np.diff(numbers[:used]) >= 0).all()
    assert set(numbers[:used]) == set(range(1, numbers.max(initial=0) + 1))
    for values in jax.tree.leaves(arrays):
      assert (values[used:] == 0).all()
    for number in range(1, numbers.max(initial=0) + 1):
      slots = np.flatnonzero(numbers == number)
      tokens = arrays.anchor.tokens[slots]
      ends = set(arrays.prompt_ends[slots])
      assert len(ends) == 1
      prompt = int(ends.pop() - slots[0])
      within = np.arange(len(slots))
      counts = (within + 1 >= prompt) & (within + 1 < len(slots))
      for values, expected in (
        (arrays.anchor.positions, within),
        (arrays.targets, np.append(tokens[1:], 0)),
        (arrays.weights, counts),
      ):
        np.testing.assert_array_equal(values[slots], expected)
      found.append((tokens[:prompt].tolist(), tokens[prompt:].tolist()))
  return found


def test_texts_of_the_tasks():
  drawn = np.array([[0, 0, 1, -1, -1], [2, 1, 3, 2, 4]])
  a, b, c, d, e = KV.keys[:5]
  v, w, x, y, z = (int(value) for value in KV.values[:5])

  def texts(task):
    examples = make_examples(KV, drawn, task)
    return [(example.prompt, example.completion) for example in examples]

  assert texts("kv_subs") == [
    (f"subs:{a}+{b}=", f"{v}+{w}"),
    (f"subs:{c}-{d}*{e}=", f"{x}-{y}*{z}"),
  ]
  assert texts("kv_math")[1] == (f"math:{c}-{d}*{e}=", str(x - y * z))
  assert texts("kv_math_steps")[0] == (f"show:{a}+{b}=", f"{v}+{w}={v + w}")
  assert texts("num_math")[0] == (f"math:{v}+{w}=", str(v + w))
  example = make_examples(KV, drawn, "num_math")[0]
  assert example.origin == f"the expression math:{v}+{w}={v + w}"
  assert make_examples(KV, drawn, "num_math_steps")[0].completion == (
    f"{v}+{w}={v + w}"
  )
  assert make_examples(KV, drawn, "num_math_steps")[1].completion == (
    f"{x}-{y}*{z}={x}-{y * z}={x - y * z}"
  )
  with pytest.raises(InputError, match=r"kv_subs.*num_math_given"):
    make_examples(KV, drawn, "math")


def written_out(text):
  """An expression in numbers after each of its operations, in plain Python."""
  numbers = [int(number) for number in re.split("[-+*]", text)]
  signs, found = re.findall("[-+*]", text), []
  while signs:
    at = signs.index("*") if "*" in signs else 0
    left, right = numbers[at : at + 2]
    found_here = {"+": left + right, "-": left - right, "*": left * right}
    numbers[at : at + 2] = [found_here[signs.pop(at)]]
    rest = zip(signs, map(str, numbers[1:]), strict=True)
    found.append(str(numbers[0]) + "".join(map("".join, rest)))
  return found or [text]


def test_expressions_are_written_out_in_this_order():
  assert written_out("10+22*3") == ["10+66", "76"]
  assert written_out("3-10+4") == ["-7+4", "-3"]
  assert written_out("3-10-4*2*5-1") == [
    "3-10-8*5-1", "3-10-40-1", "-7-40-1", "-47-1", "-48"
  ]  # fmt: skip
  assert written_out("7") == ["7"]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  big=st.booleans(),
  operators=st.sampled_from(["+", "-", "*", "+-", "+*", "-*", "+-*"]),
  terms=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(sorted),
  seed=st.integers(0, 9999),
)
def test_one_operation_at_a_time(big, operators, terms, seed):
  kv = SPREAD_KV if big else KV
  options = ExpressionOptions(*terms, operators, part="any")
  drawn = sample_expressions(np.random.default_rng(seed), kv, 9, options)
  values = [e.completion for e in make_examples(kv, drawn, "kv_subs")]
  for value, *of_task in zip(
    values, *(make_examples(kv, drawn, task) for task in TASKS), strict=True
  ):
    answers = {
      task: (example.prompt, example.completion)
      for task, example in zip(TASKS, of_task, strict=True)
    }
    *_, result = steps = written_out(value)
    assert answers["num_math"] == (f"math:{value}=", result)
    assert answers["kv_math"][1] == result
    shown = "=".join([value, *steps])
    assert answers["num_math_steps"] == (f"show:{value}=", shown)
    assert answers["kv_math_steps"][1] == shown
    assert answers["num_math_given"][0].endswith(f"={value}=")
    assert answers["num_math_given"][1] == "=".join(steps)
  # A task's examples do not depend on what stands beside them.
  for i in range(2):
    assert (
      make_examples(kv, drawn[i : i + 1], "kv_math_steps")
      == (make_examples(kv, drawn, "kv_math_steps")[i : i + 1])
    )


def test_results_beyond_int64():
  top = int(np.argmax(BIG_KV.values))
  drawn = np.full((2, 11), top)
  drawn[:, 1::2] = [[2, 2, 2, 2, 2], [1, 0, -1, -1, -1]]
  drawn[1, 6::2] = -1
  texts = [e.completion for e in make_examples(BIG_KV, drawn, "num_math_steps")]
  assert texts[0].endswith(f"={25_000**5}*25000={25_000**6}")
  assert texts[1] == "25000-25000+25000=0+25000=25000"


@pytest.mark.parametrize("keys", ["pieces", "characters"])
@pytest.mark.parametrize("digits", ["single", "grouped"])
def test_tokenizer_pieces(tmp_path, keys, digits):
  made = train_tokenizer(KV, tmp_path / "t", keys=keys, digits=digits)
  for key in KV.keys:
    assert len(made.encode(key)) == (1 if keys == "pieces" else len(key))
    assert made.decode(made.encode(key)) == key
  for task in ("subs:", "math:"):
    assert len(made.encode(task)) == 1
  assert len(made.encode("1234")) == (4 if digits == "single" else 2)
  again = train_tokenizer(KV, tmp_path / "u", keys=keys, digits=digits)
  assert again.fingerprint == made.fingerprint
  assert (tmp_path / "t.model").read_bytes() == (
    tmp_path / "u.model"
  ).read_bytes()


def test_tokenizer_choices(tmp_path):
  with pytest.raises(InputError, match=r"pieces.*characters"):
    train_tokenizer(KV, tmp_path / "t", keys="words")
  with pytest.raises(InputError, match=r"single.*grouped"):
    train_tokenizer(KV, tmp_path / "t", digits="two")


@pytest.mark.parametrize("keys", ["pieces", "characters"])
@pytest.mark.parametrize("digits", ["single", "grouped"])
def test_tokens_equal_the_tokenizer(tmp_path, keys, digits):
  made = train_tokenizer(KV, tmp_path / "t", keys=keys, digits=digits)
  batch = source(made, TASKS, length=96, batch_size=32)[0]
  found = segments_of(batch)
  assert len(found) > 64
  lines = set()
  for prompt, completion in found:
    texts = made.decode(prompt), made.decode(completion)
    assert prompt == [made.bos_id, *made.encode(texts[0])]
    assert completion == [*made.encode(texts[1]), made.eos_id]
    lines.add(texts[0][:5] + ("n" if texts[0][5].isdigit() else "k"))
    *_, right = answers = texts[1].split("=")
    *asked, written = texts[0].removesuffix("=")[5:].split("=")
    shows = texts[0].startswith("show:")
    operations = len(re.findall("[-+*]", written))
    assert len(answers) == (operations + (not asked) if shows else 1)
    if asked:  # names that have nothing to do with the numbers
      assert set(re.split("[-+*]", asked[0])) <= set(KV.keys)
      assert written[0].isdigit()
      lines.add("given")
    if not texts[0].startswith("subs:"):
      values = dict(zip(KV.keys, KV.values.tolist(), strict=True))
      assert eval(written, values) == int(right)
  assert lines == {"subs:k", "math:k", "math:n", "show:k", "show:n", "given"}


def test_big_results_equal_the_tokenizer(tmp_path):
  made = train_tokenizer(BIG_KV, tmp_path / "t", digits="grouped")
  options = ExpressionOptions(2, 6, "*")
  batches = source(made, kv=BIG_KV, options=options, batch_size=64, pack=False)
  values = dict(zip(BIG_KV.keys, BIG_KV.values.tolist(), strict=True))
  longest = 0
  for prompt, completion in segments_of(batches[0]):
    text = made.decode(completion)
    assert completion == [*made.encode(text), made.eos_id]
    assert eval(made.decode(prompt)[5:-1], values) == int(text)
    longest = max(longest, len(text))
  assert longest > 19


def test_same_examples_as_the_texts(tokenizer):
  batch = source(tokenizer, ["kv_subs"], pack=False, batch_size=50)[7]
  rng = np.random.default_rng(np.random.SeedSequence((3, 7)))
  drawn = sample_expressions(rng, KV, 50, OPTIONS)
  assert [
    (tokenizer.decode(p), tokenizer.decode(c)) for p, c in segments_of(batch)
  ] == [(e.prompt, e.completion) for e in make_examples(KV, drawn, "kv_subs")]
  assert not is_eval(drawn).any()
  assert len(evaluate(KV, drawn)) == 50


def test_types_and_shapes(tokenizer):
  batch = source(tokenizer)[0]
  assert batch.augmenting == batch.visible == {}
  arrays = jax.tree.leaves(batch)
  assert len(arrays) == 6
  for values in arrays:
    assert values.shape == (8, 48)
    is_weights = values is batch.weights
    assert values.dtype == (np.float32 if is_weights else np.int32)


def test_rows_are_filled(tokenizer):
  for length in (16, 48, 500):
    for index in range(20):
      batch = source(tokenizer, length=length)[index]
      gaps = (batch.anchor.segments == 0).sum(axis=1)
      # No example of 2 or 3 terms is longer than 16 here.
      assert (gaps < 16).all()


def test_batches_follow_from_seed_and_index(tokenizer):
  one, same = source(tokenizer), source(tokenizer)
  same[0]
  other = source(tokenizer, seed=4)
  assert_same(one[5], same[5])
  tokens = one[5].anchor.tokens
  assert (tokens != one[6].anchor.tokens).any()
  assert (tokens != other[5].anchor.tokens).any()
  assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("pack", [True, False])
def test_hosts_share_the_global_batch(tokenizer, pack):
  whole = source(tokenizer, TASKS, pack=pack)
  parts = [
    source(tokenizer, TASKS, pack=pack, process_index=i, process_count=4)
    for i in range(4)
  ]
  assert_same(whole[2], joined([part[2] for part in parts]))
  assert {part.fingerprint for part in parts} == {whole.fingerprint}
  with pytest.raises(InputError, match="multiple of 3"):
    source(tokenizer, process_count=3)
  with pytest.raises(InputError, match="process_index"):
    source(tokenizer, process_index=2, process_count=2)


def test_too_long_an_example(tokenizer):
  with pytest.raises(InputError, match=r"math:.* tokens and a row has 8"):
    source(tokenizer, length=8)


@pytest.mark.parametrize(
  "tasks", [{}, {"kv_math": 0}, {"kv": 1}, {"kv_math": -1, "kv_subs": 2}]
)
def test_bad_mixtures(tokenizer, tasks):
  with pytest.raises(InputError, match="task"):
    KeyValueSource(
      KV, tokenizer, tasks, OPTIONS, seed=0, batch_size=8, length=48
    )


def test_a_tokenizer_that_merges_across_words(tmp_path):
  drawn = sample_expressions(np.random.default_rng(0), KV, 500, OPTIONS)
  texts = [e.prompt + e.completion for e in make_examples(KV, drawn, "kv_subs")]
  merging = train_sentencepiece(
    texts, tmp_path / "t", vocab_size=300, split_digits=False
  )
  with pytest.raises(InputError, match="train_tokenizer"):
    source(merging, ["kv_subs"], length=200)


def test_without_special_tokens(tokenizer):
  bare = dataclasses.replace(tokenizer, bos_id=None, eos_id=None)
  for prompt, completion in segments_of(source(bare)[0]):
    assert prompt == bare.encode(bare.decode(prompt))
    assert completion == bare.encode(bare.decode(completion))


def test_describe(tokenizer):
  made = source(tokenizer, ["kv_math", "num_math"])
  assert made.describe(17) == "batch 17 of kv_math+num_math, seed 3"


def test_any_prompt_changes_the_prompt_and_nothing_else(tokenizer):
  own = source(tokenizer, ["kv_subs"], batch_size=32)
  mixed = source(tokenizer, ["kv_subs"], batch_size=32, any_prompt=True)
  assert own.fingerprint != mixed.fingerprint
  found = set()
  for prompt, completion in segments_of(mixed[0]):
    asked, text = tokenizer.decode(prompt), tokenizer.decode(completion)
    found.add(asked[:5])
    values = dict(zip(KV.keys, KV.values.tolist(), strict=True))
    assert eval(asked[5:-1], values) == eval(text)
  assert found == set(PROMPTS)
