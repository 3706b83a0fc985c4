"""No anchor token sees what the text holds after it, whatever the tokenizers.

The random strings of `make test` are few; for 10,000 of them:

    CALM_SHARED=... HYPOTHESIS_PROFILE=thorough python -m pytest \\
      tests/test_alignment.py -k random
"""

import dataclasses
import json
import os
import random
import types
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import real_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_jax.core.errors import InputError
from calm_jax.text.alignment import (
  MAX_CHUNK,
  AlignedReader,
  ChunkEncoder,
  Chunker,
  align,
  prompt_ends,
)
from calm_jax.text.backends import Spelling

settings.register_profile("default", max_examples=300, deadline=None)
settings.register_profile("thorough", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def text_ends(tokenizer, ids) -> tuple[bytes, np.ndarray]:
  """The bytes that ids spell, and how many of them up to each id."""
  parts = tokenizer.spell(ids)
  return b"".join(parts), np.cumsum([len(p) for p in parts], dtype=np.int64)


# Letters of the vocabularies and of none, that normalise to others, that are
# split into bytes; whitespace; signs that join with their neighbours.
ALPHABET = (
  "ab cde\n .\t'é\u0301ﬁﷺ①½日本かｶ한ไทยمر👍🏽\u200d\ufe0f\x00\u00a0\u3000"
  "<0xE4>▁~"
)
RANDOM = st.one_of(
  st.text(max_size=60),
  st.text(ALPHABET, max_size=60),
  st.lists(
    st.sampled_from([
      "the cat", " sat", "  ", "\n", "日本語", " straightforwardnesses",
      "👩‍👩‍👧", "</s>", "<unk>", "é", "e\u0301", "ﬁ", ".", "1234", " x", "สวัสดี",
    ]),
    max_size=12,
  ).map("".join),
)  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
  made = real_tokenizers.toys(tmp_path_factory.mktemp("toys"))
  return lambda: made.values()  # Hypothesis would print them all.


@pytest.fixture(scope="module")
def real(tmp_path_factory):
  if not os.environ.get("CALM_SHARED"):
    pytest.skip("CALM_SHARED is unset: the shared tokenizers are not here")
  made = real_tokenizers.real(
    Path(os.environ["CALM_SHARED"]), tmp_path_factory.mktemp("real")
  )
  return lambda: made.values()


def chunks(text):
  """The closed chunks of a text."""
  return Chunker().push(text.encode() if isinstance(text, str) else text)


def texts(lists):
  return [c.text for c in lists]


def test_words_close_at_the_whitespace_after_them():
  assert chunks("Hello  big\n world") == [
    ("Hello", 0, 5, 6), ("  big", 5, 10, 11)
  ]  # fmt: skip


def test_ideographs_close_at_once():
  assert chunks("a日本 かx") == [
    ("a", 0, 1, 4), ("日", 1, 4, 4), ("本", 4, 7, 7), (" ", 7, 8, 11),
    ("か", 8, 11, 11),
  ]  # fmt: skip


def test_long_words_are_cut():
  word = "é" * (2 * MAX_CHUNK + 3)
  half = 2 * MAX_CHUNK
  assert chunks(word) == [
    ("é" * MAX_CHUNK, 0, half, half),
    ("é" * MAX_CHUNK, half, 2 * half, 2 * half),
  ]


def test_a_prompts_end_closes_a_chunk():
  for prompt, closed in (("ab cd", [" cd"]), ("ab cd ", []), ("", [])):
    chunker = Chunker()
    chunker.push(prompt.encode())
    assert texts(chunker.cut()) == closed
    assert all(c.close == len(prompt) for c in chunker.cut())
  chunker = Chunker()
  chunker.push(b"ab  ")
  assert chunker.cut() == []
  assert texts(chunker.push(b"cd ")) == ["  cd"]


@given(st.binary(max_size=40), st.data())
def test_random_pieces_give_the_same_chunks(data, draw):
  """Of any bytes, UTF-8 or not."""
  whole = chunks(data)
  assert (
    "".join(texts(whole)).encode().decode()
    == data.decode("utf-8", "replace")[: sum(len(c.text) for c in whole)]
  )
  chunker, found, at = Chunker(), [], 0
  while at < len(data):
    size = draw.draw(st.integers(1, len(data) - at))
    found += chunker.push(data[at : at + size])
    at += size
    # Known at its close, and not before.
    assert found == [c for c in whole if c.close <= at]
  assert found == whole


@given(RANDOM, RANDOM, RANDOM)
def test_random_futures_close_the_same_chunks(text, one, other):
  size = len(text.encode())
  kept = [
    [c for c in chunks(text + future) if c.close <= size]
    for future in (one, other)
  ]
  assert kept[0] == kept[1] == chunks(text)


def read_by_anchor(anchor, text):
  """(ids, their ends), with what must hold of them."""
  ids, ends = anchor.byte_ends(text)
  assert ids == anchor.encode(text)
  assert len(ends) == len(ids)
  assert (np.diff(ends, prepend=0) >= 0).all()
  assert not len(ends) or ends[-1] <= len(text.encode())
  return ids, ends


def check_futures(anchors, encoders, texts, size) -> int:
  """Of two texts that share their first `size` bytes, tokens up to there see
  the same; returns how many tokens were compared.

  An unknown token is the same if it stands for the same text.
  """
  read = [[read_by_anchor(a, text) for text in texts] for a in anchors]
  compared = 0
  for encoder in encoders:
    (tokens, closes), (tokens_2, closes_2) = (
      encoder.encode("", text) for text in texts
    )
    for anchor, ((ids, ends), (ids_2, ends_2)) in zip(
      anchors, read, strict=True
    ):
      visible, visible_2 = align(ends, closes), align(ends_2, closes_2)
      pairs = zip(ids, ids_2, ends, ends_2, strict=False)
      for t, (index, index_2, end, end_2) in enumerate(pairs):
        if index != index_2 or max(end, end_2) > size:
          break
        if end != end_2 and anchor.spell([index]) == [b""]:
          break
        count = visible[t]
        assert count == visible_2[t], (texts, t)
        assert (tokens[:count] == tokens_2[:count]).all(), (texts, t)
        compared += 1
  return compared


def check_generation(anchor, encoders, text):
  """Token by token, the streams are where the finished text is."""
  ids = anchor.encode(text)
  data, ends = text_ends(anchor, ids)
  parts = [anchor.spell([i], ids[:t])[0] for t, i in enumerate(ids)]
  assert b"".join(parts) == data
  for encoder in encoders:
    reader = AlignedReader(anchor, encoder)
    counts = []
    for token in ids:
      before = len(reader.ids)
      assert reader.push(token) == reader.ids[before:]
      counts.append(len(reader.ids))
    tokens, closes = encoder.encode("", data.decode())
    assert tokens.tolist() == reader.ids
    assert align(ends, closes).tolist() == counts
    at_once = AlignedReader(anchor, encoder)
    assert at_once.read(ids, 0) == (reader.ids, counts)
    if data == text.encode():
      assert (anchor.byte_ends(text)[1] == ends).all()
      again, ends_again = encoder.encode("", text)
      assert (again == tokens).all() and (ends_again == closes).all()


def check_all(kinds, text, one, other):
  encoders = [ChunkEncoder(t) for t in kinds]
  size = len(text.encode())
  check_futures(kinds, encoders, (text + one, text + other), size)
  for anchor in kinds:
    check_generation(anchor, encoders, text + one)


@given(text=RANDOM, one=RANDOM, other=RANDOM)
def test_random_futures_change_nothing_seen(toys, text, one, other):
  check_all(toys(), text, one, other)


@given(text=RANDOM, one=RANDOM, other=RANDOM)
def test_random_futures_change_nothing_real_tokenizers_see(
  real, text, one, other
):
  check_all(real(), text, one, other)


def real_texts(shared):
  """A few lines of each of nine languages of two corpora, code and emoji."""
  for path in sorted(shared.glob("data/nllb_seed/*.txt")):
    yield path.stem, path.read_text(encoding="utf-8").splitlines()[:3]
  for path in sorted(shared.glob("data/ntrex128/newstest2019-*.txt")):
    yield path.stem, path.read_text(encoding="utf-8").splitlines()[:3]
  with (shared / "data/mbpp/mbpp.jsonl").open() as file:
    yield "code", [json.loads(line)["code"] for line in islice(file, 4)]
  yield (
    "emoji",
    [
      "I 👍🏽 love 👩‍👩‍👧 it 🎉🎉!",
      "日本語のテキスト と 한국어 🇯🇵🇰🇷 ﬁn e\u0301",
    ],
  )


def test_scrambled_real_text_changes_nothing_seen_before(real):
  shared = Path(os.environ["CALM_SHARED"])
  kinds = list(real())
  encoders = [ChunkEncoder(t) for t in kinds]
  shuffle = random.Random(0)
  compared = {}
  for name, lines in real_texts(shared):
    for line in lines:
      for kind in kinds:
        check_generation(kind, encoders, line)
      for _ in range(4):
        at = shuffle.randrange(len(line))
        rest = list(line[at:])
        shuffle.shuffle(rest)
        texts = line, line[:at] + "".join(rest)
        size = len(line[:at].encode())
        compared[name] = compared.get(name, 0) + check_futures(
          kinds, encoders, texts, size
        )
  assert len(compared) == 19
  assert min(compared.values()) > 1000, compared


def test_share_of_text_that_chunks_split_as_the_tokenizer_does(real):
  """The price of chunks: other tokens where words are long."""
  shared = Path(os.environ["CALM_SHARED"])
  path = shared / "data" / "gsm8k" / "test.jsonl"
  with path.open() as file:
    lines = [json.loads(line)["question"] for line in islice(file, 50)]
  for tokenizer in real():
    encoder, same = ChunkEncoder(tokenizer), 0
    for line in lines:
      ids = encoder.encode(line, "")[0].tolist()
      same += tokenizer.encode(line) == ids[tokenizer.bos_id is not None :]
    assert same == len(lines), tokenizer


def test_ends_of_tokens(toys):
  """By hand: bytes, dropped characters, what normalisation joins."""
  byte_level, _, dropped, _, _, unigram, characters = toys()
  ids, ends = byte_level.byte_ends("日x")
  assert ends[-2:].tolist() == [3, 4]
  assert ends.tolist() == text_ends(byte_level, ids)[1].tolist()
  # The mark of the text's beginning, then letters; "?" is in no token.
  ids, ends = dropped.byte_ends("a?é?b?")
  assert [dropped.pieces[i] for i in ids] == ["▁", "a", "é", "b"]
  assert ends.tolist() == [0, 1, 4, 6]
  assert text_ends(dropped, ids)[0] == "aéb".encode()
  # One unknown token for both ideographs.
  ids, ends = unigram.byte_ends("a㐀㐁 b")
  assert ends.tolist()[-2:] == [8, 9]
  # A space that it drops is in no token, not even the last.
  assert unigram.byte_ends("the cat  ")[1][-1] == 7
  ids, ends = characters.byte_ends("a㐀t")
  assert ends.tolist() == [1, 4, 5]
  assert text_ends(characters, ids)[0] == b"at"


def test_the_last_token_of_a_prompt_ends_with_it(toys):
  for anchor in toys():
    ids, ends = prompt_ends(anchor, "the cat  ")
    assert ends[-1] == 9
    assert ids[-1:] == anchor.encode("the cat  ")[-1:]
    whole, rest_ends = anchor.continuation_ends("the cat", " sat")
    assert whole == anchor.encode_continuation("the cat", " sat")
    assert rest_ends.tolist()[-1] == 11 and min(rest_ends) >= 7


def test_what_cannot_be_aligned_is_said(toys):
  toy = next(iter(toys()))
  backend = types.SimpleNamespace(
    spelling=Spelling(None, False, False),
    encode=toy._backend.encode,
    decode=lambda ids: str(len(ids)),
    spans=toy._backend.spans,
  )
  whimsical = dataclasses.replace(toy, _backend=backend)
  with pytest.raises(InputError, match="changes text that it has already"):
    whimsical.spell([0, 1])
  backend.spelling = Spelling((b"!",) * 999, False, True)
  with pytest.raises(InputError, match="passes over characters"):
    whimsical.byte_ends("a")
