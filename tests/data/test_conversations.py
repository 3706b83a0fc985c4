"""Conversations as training data: only what an assistant says is learnt."""

from __future__ import annotations

import dataclasses
import json
import random

import chats
import numpy as np
import pytest
import text_data

from calm_jax.core.errors import InputError
from calm_jax.data import documents
from calm_jax.data.examples import ExampleSource, TextExample, read_examples
from calm_jax.text import chat
from calm_jax.text.alignment import AlignedReader
from calm_jax.text.tokenizer import load_tokenizer

TALK = [
  {"role": "system", "content": "x"},
  {"role": "user", "content": "once upon"},
  {"role": "assistant", "content": "the cat sat"},
  {"role": "user", "content": "12 cats"},
  {"role": "assistant", "content": "a mat."},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
  path = tmp_path_factory.mktemp("chats")
  return {
    name: load_tokenizer(chats.write(path / name, name))
    for name in ("llama_3", "qwen_3")
  }


def read(path, records, **fields):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return read_examples(ExampleSource(str(path), **fields))


def example(messages, origin="talk line 1"):
  return TextExample("what is asked", "what is said", origin, messages)


def test_records_of_conversations(tmp_path):
  path = tmp_path / "talks.jsonl"
  record = {"prompt": "unused", "messages": TALK, "text": "unused"}
  pair = {"prompt": "a", "completion": "b", "messages": TALK}
  found = read(path, [record, pair, {"text": "plain"}])
  assert found[0] == TextExample(
    "x\nonce upon\n12 cats", "the cat sata mat.", f"{path} line 1", TALK
  )
  assert found[1:] == [
    TextExample("a", "b", f"{path} line 2"),
    TextExample("", "plain", f"{path} line 3"),
  ]
  assert [each.is_plain for each in found] == [False, False, True]
  [renamed] = read(path, [{"talk": TALK}], messages_field="talk")
  assert renamed.messages == TALK


@pytest.mark.parametrize(
  ("messages", "said"),
  [
    ("hi", "line 1: messages must be a list of messages"),
    ([{"role": "user"}], r"line 1: messages\[0\]\['content'\] is a NoneType"),
    (TALK[:2], "line 1: there is no text to learn"),
  ],
)
def test_bad_conversations_are_bad_lines(tmp_path, messages, said):
  with pytest.raises(InputError, match=said):
    read(tmp_path / "a.jsonl", [{"messages": messages}])


def spelled(tokenizer, batch) -> list[str]:
  """By row, the pieces of the targets with a weight."""
  return [
    "".join(tokenizer.pieces[i] for i in targets[weights > 0])
    for targets, weights in zip(batch.targets, batch.weights, strict=True)
  ]


def test_only_answers_have_weight(tokenizers):
  tokenizer, rng = tokenizers["llama_3"], random.Random(0)
  talks = [chats.talk(rng, "llama_3") for _ in range(40)]
  examples = [example(talk, f"line {i}") for i, talk in enumerate(talks)]
  plain = [TextExample("the ", "cat", "pair")]
  source = text_data.make_source(
    [*examples, *plain], tokenizer, batch_size=8, length=512, seed=None
  )
  said = "".join("".join(spelled(tokenizer, b)) for b in map(
    source.__getitem__, range(len(source))
  ))  # fmt: skip
  answers = [
    "".join(tokenizer.pieces[i] for i in tokenizer.encode(text))
    for talk in talks
    for message in talk
    if message["role"] == "assistant"
    for text in [message["content"].strip() + "<|eot_id|>"]
  ]
  pair = "".join(tokenizer.pieces[i] for i in tokenizer.encode("cat"))
  assert said == "".join(answers) + pair + "<|end_of_text|>"
  assert source.num_rows < len(talks)  # They are packed.
  without = text_data.make_source(
    plain, tokenizer, batch_size=8, length=512, seed=None
  )
  assert spelled(tokenizer, without[0])[0] == pair + "<|end_of_text|>"


def test_what_is_learnt_is_part_of_the_datas_name(tokenizers, monkeypatch):
  prints = set()
  for last in (True, False, True):
    made = chat.Conversation([1, 2, 3, 4], [False, True, True, last])
    monkeypatch.setattr(chat, "conversations", lambda *_, made=made: [made])
    source = text_data.make_source(
      [example(TALK)], tokenizers["llama_3"], batch_size=1, length=8, seed=0
    )
    assert source[0].weights.sum() == 2 + last
    prints.add(source.fingerprint)
  assert len(prints) == 2


def test_an_answer_that_history_drops_is_learnt_by_itself(tokenizers):
  tokenizer = tokenizers["qwen_3"]
  [batch] = text_data.one_pass(
    [example(TALK)], tokenizer, batch_size=2, length=128
  )
  thought = "<think>ĊĊ</think>ĊĊ"
  assert spelled(tokenizer, batch) == [
    f"{thought}theĠcatĠsat<|im_end|>", f"{thought}aĠmat.<|im_end|>"
  ]  # fmt: skip


def test_conversations_that_are_too_long(tokenizers):
  tokenizer = tokenizers["llama_3"]
  [whole] = chat.conversations(tokenizer, TALK)
  first = whole.learnt.index(True)
  length = first + 3
  options = {"batch_size": 1, "length": length}
  with pytest.raises(InputError, match=r"talk line 1: .* tokens with its"):
    text_data.one_pass([example(TALK)], tokenizer, **options)
  [batch] = text_data.one_pass(
    [example(TALK)], tokenizer, too_long="cut", **options
  )
  np.testing.assert_array_equal(batch.anchor.tokens[0], whole.ids[:length])
  learnt = np.flatnonzero(batch.weights[0]).tolist()
  assert learnt == [*range(first - 1, length - 1)]
  short = {"batch_size": 1, "length": first}
  for too_long in ("cut", "drop"):
    with pytest.raises(InputError, match="were dropped"):
      text_data.one_pass([example(TALK)], tokenizer, too_long=too_long, **short)
  with pytest.raises(InputError, match=r"talk line 1: .*no chat template"):
    bare = dataclasses.replace(tokenizer, chat_template=None)
    text_data.one_pass([example(TALK)], bare, batch_size=1, length=512)


def test_other_tokenizers_see_what_they_do_in_generation(tokenizers, tmp_path):
  tokenizer = tokenizers["llama_3"]
  augmenting = text_data.augmenting(tmp_path)
  [batch] = text_data.one_pass(
    [example(TALK)], tokenizer, batch_size=2, length=256, augmenting=augmenting
  )
  for row, end in enumerate((3, 5)):
    prompt = chat.encode_prompt(tokenizer, TALK[: end - 1])
    tokens = batch.anchor.tokens[row][batch.anchor.segments[row] > 0].tolist()
    assert tokens[: len(prompt)] == prompt
    reader = AlignedReader(tokenizer, augmenting["letters"])
    _, counts = reader.read(tokens, len(prompt))
    seen = batch.visible["letters"][row][: len(tokens)]
    np.testing.assert_array_equal(seen, counts)
    assert batch.prompt_ends[row, 0] == len(prompt)
    assert np.flatnonzero(batch.weights[row])[0] == len(prompt) - 1


def test_texts_of_the_last_answer(tokenizers):
  tokenizer = tokenizers["llama_3"]
  prompt, completion = documents.texts(example(TALK), tokenizer)
  assert prompt.endswith("12 cats<|eot_id|><|start_header_id|>assistant"
                         "<|end_header_id|>\n\n")  # fmt: skip
  assert completion == "a mat."
  pair = TextExample("a", "b", "x")
  assert documents.texts(pair, tokenizer) == ("a", "b")
