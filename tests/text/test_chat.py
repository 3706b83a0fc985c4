"""Chat templates: their tokens are transformers', and answers are found."""

from __future__ import annotations

import random

import chats
import pytest
import transformers

from calm_jax.core.errors import InputError
from calm_jax.text import chat
from calm_jax.text.tokenizer import load_tokenizer

HELLO = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  path = tmp_path_factory.mktemp("chats")
  return {name: chats.write(path / name, name) for name in chats.FAMILIES}


@pytest.fixture(scope="module")
def pairs(folders):
  """Our tokenizer of each family, and transformers'."""
  return {
    name: (
      load_tokenizer(folder),
      transformers.AutoTokenizer.from_pretrained(str(folder)),
    )
    for name, folder in folders.items()
  }


def applied(theirs, messages, **options) -> list[int]:
  out = theirs.apply_chat_template(messages, return_dict=True, **options)
  return out["input_ids"]


def expected(theirs, pieces) -> tuple[list[int], list[bool] | None]:
  """The ids of pieces of text, and which lie in pieces that are learnt; None if
  a token lies in two."""
  text, starts, kinds = "", [], []
  for piece, is_learnt in pieces:
    starts.append(len(text))
    kinds.append(is_learnt)
    text += piece
  out = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
  learnt = []
  for start, end in out["offset_mapping"]:
    # The last piece that begins at or before the token, and is not empty.
    at = max(n for n, s in enumerate(starts) if s <= start)
    bound = starts[at + 1] if at + 1 < len(starts) else len(text)
    if end > bound:
      return out["input_ids"], None
    learnt.append(kinds[at])
  return out["input_ids"], learnt


@pytest.mark.parametrize("name", chats.FAMILIES)
def test_generated_conversations(pairs, name):
  ours, theirs = pairs[name]
  rng, count, straddled = random.Random(name), 0, 0
  for _ in range(200):
    messages = chats.talk(rng, name)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    found = chat.conversations(ours, chat.check(messages))
    rows = chats.written(name, messages)
    # Mistral's leaves a system message out of what does not end with a user.
    dropped = name == "mistral" and messages[0]["role"] == "system"
    if len(rows) == 1 and not dropped:
      ids = applied(theirs, messages[: answers[-1] + 1])
      assert ids == expected(theirs, rows[0])[0]
    prompts = [
      ids[:n]
      for ids, learnt in found
      for n in range(1, len(ids))
      if learnt[n] and not learnt[n - 1]
    ]
    for prompt, i in zip(prompts, answers, strict=True):
      want = applied(theirs, messages[:i], add_generation_prompt=True)
      assert prompt == want == chat.encode_prompt(ours, messages[:i])
    expectations = [expected(theirs, row) for row in rows]
    count += 1
    if any(learnt is None for _, learnt in expectations):
      # A token of the prompt would reach into an answer, which a model that is
      # asked with the prompt alone never sees: only the text is the same.
      straddled += 1
      assert theirs.decode(found[-1].ids) == theirs.decode(expectations[-1][0])
      continue
    assert found == expectations
  assert straddled < count / 5
  if name in ("llama_3", "gemma", "mistral"):  # They trim an answer.
    assert not straddled


def test_answers_are_those_between_the_tags_of_a_template(pairs):
  ours, theirs = pairs["smollm"]
  rng = random.Random(0)
  for _ in range(50):
    messages = [
      {**message, "content": message["content"].strip() or "x"}
      for message in chats.talk(rng, "smollm")
    ]
    if messages[-1]["role"] == "user":
      messages.pop()
    out = theirs.apply_chat_template(
      messages, return_dict=True, return_assistant_tokens_mask=True
    )
    [(ids, learnt)] = chat.conversations(ours, messages)
    assert ids == out["input_ids"]
    assert learnt == [bool(each) for each in out["assistant_masks"]]


@pytest.mark.parametrize("name", chats.FAMILIES)
def test_the_template_says_what_ends_an_answer(pairs, name):
  ours, _ = pairs[name]
  family = chats.FAMILIES[name]
  frame = chat.frame(ours)
  stops = [ours.pieces[i] for i in frame.stop_ids]
  assert stops == list(dict.fromkeys([family.eos, family.end]))
  leads = {"mistral": " ", "qwen_3": "<think>\n\n</think>\n\n"}
  assert frame.before == leads.get(name, "")
  assert chat.without_lead(ours, frame.before + "the cat") == "the cat"
  assert chat.without_lead(ours, frame.before[:3]) == ""


def test_each_answer_by_itself(pairs):
  ours, theirs = pairs["llama_3"]
  messages = [*HELLO, {"role": "assistant", "content": "one"}] * 3
  [together] = chat.conversations(ours, messages)
  apart = chat.conversations(ours, messages, apart=True)
  assert len(apart) == 3
  for n, (ids, learnt) in enumerate(apart, start=1):
    assert ids == together.ids[: len(ids)]
    first = len(applied(theirs, messages[: 2 * n - 1], add_generation_prompt=1))
    assert learnt == [False] * first + [True] * (len(ids) - first)


def test_what_is_no_conversation(pairs):
  ours, _ = pairs["gemma"]
  for messages, said in (
    ("hi", "must be a list of messages"), ([], "must be a list"),
    (["hi"], r"messages\[0\] is a str, not a dict"),
    ([{"role": "user"}], r"\['content'\] is a NoneType"),
    ([{"content": "a"}], r"\['role'\] is a NoneType"),
    ([{"role": "user", "content": "a\ud800"}], "not text"),
  ):  # fmt: skip
    with pytest.raises(InputError, match=said):
      chat.check(messages)
  with pytest.raises(InputError, match="roles must alternate"):
    chat.encode_prompt(ours, HELLO * 2)
  with pytest.raises(InputError, match="no message has the role 'assistant'"):
    chat.conversations(ours, HELLO)
  assert chat.check([{**HELLO[0], "name": None}]) == HELLO


def change(folder, template):
  chats.write(folder, "llama_3")
  (folder / "chat_template.jinja").write_bytes(template)
  return load_tokenizer(folder)


def test_templates_that_cannot_be_used(tmp_path):
  bare = change(tmp_path / "bare", b"")
  (tmp_path / "bare" / "chat_template.jinja").unlink()
  bare = load_tokenizer(tmp_path / "bare")
  with pytest.raises(InputError, match=r"bare has no chat template.*jinja"):
    chat.encode_prompt(bare, HELLO)
  with pytest.raises(InputError, match="not UTF-8"):
    change(tmp_path / "bytes", b"\xff")
  broken = change(tmp_path / "broken", b"{% if %}")
  with pytest.raises(InputError, match="does not take the conversation"):
    chat.encode_prompt(broken, HELLO)
  deaf = change(tmp_path / "deaf", b"{{ messages[0].content }}")
  with pytest.raises(InputError, match="does not write the content"):
    chat.conversations(deaf, HELLO)
  thinks = change(
    tmp_path / "thinks",
    b"{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    b"{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}",
  )
  said = [*HELLO, {"role": "assistant", "content": "x"}]
  assert chat.frame(thinks).before is None
  assert chat.without_lead(thinks, "x") == "x"
  with pytest.raises(InputError, match=r"asks for an answer by .*<think>"):
    chat.conversations(thinks, said)
