"""No anchor token sees what the text holds after it, whatever the tokenizers.

The random strings of `make test` are few; for 10,000 of them:

    CALM_SHARED=... HYPOTHESIS_PROFILE=thorough python -m pytest \\
      tests/test_alignment.py -k random
"""

import os
from pathlib import Path

import numpy as np
import pytest
import real_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_jax.alignment import (
  MAX_CHUNK,
  AugmentingStream,
  ChunkEncoder,
  Chunker,
  align,
  chunks,
)

settings.register_profile("default", max_examples=300, deadline=None)
settings.register_profile("thorough", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Letters of the vocabularies, of none, that normalise to others, that are
# split into bytes; words, whitespace, and signs that join with their neighbour.
ALPHABET = "ab cde\n .\t'é\u0301ﬁﷺ①½日本かｶ한ไทยمر👍🏽\u200d\ufe0f\x00\u00a0\u3000<0xE4>▁~"
RANDOM = st.one_of(
  st.text(max_size=60),
  st.text(ALPHABET, max_size=60),
  st.lists(
    st.sampled_from([
      "the cat", " sat", "  ", "\n", "日本語", " straightforwardnesses", "👩‍👩‍👧",
      "</s>", "<unk>", "é", "e\u0301", "ﬁ", ".", "1234", " x", "สวัสดี",
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
  if "CALM_SHARED" not in os.environ:
    pytest.skip("CALM_SHARED is unset: the shared tokenizers are not here")
  made = real_tokenizers.real(
    Path(os.environ["CALM_SHARED"]), tmp_path_factory.mktemp("real")
  )
  return lambda: made.values()


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


def seen(anchor, encoder, text):
  """(anchor ids, their ends, what they see, the augmenting tokens)."""
  ids, ends = anchor.byte_ends(text)
  assert ids == anchor.encode(text)
  assert len(ends) == len(ids)
  assert (np.diff(ends, prepend=0) >= 0).all()
  assert not len(ends) or ends[-1] <= len(text.encode())
  tokens, closes = encoder.encode("", text)
  return ids, ends, align(ends, closes), tokens.tolist()


def check_future(anchor, encoder, text, other, size) -> int:
  """Two texts with the same first `size` bytes; returns tokens compared."""
  ids, ends, visible, tokens = seen(anchor, encoder, text)
  ids_2, ends_2, visible_2, tokens_2 = seen(anchor, encoder, other)
  compared = 0
  for t, (index, index_2) in enumerate(zip(ids, ids_2, strict=False)):
    if index != index_2 or max(ends[t], ends_2[t]) > size:
      break
    assert visible[t] == visible_2[t], (text, other, t)
    assert tokens[: visible[t]] == tokens_2[: visible[t]], (text, other, t)
    compared += 1
  return compared


def check_generation(anchor, encoder, text):
  """Token by token, the stream is where the finished text is."""
  ids = anchor.encode(text)
  data, ends = anchor.text_ends(ids)
  stream, finished, previous = *(AugmentingStream(encoder) for _ in "12"), []
  finished.push(data)
  counts = []
  for index in ids:
    [part] = anchor.spell([index], previous)
    before = len(stream.ids)
    assert stream.push(part) == stream.ids[before:]
    previous.append(index)
    counts.append(len(stream.ids))
  assert (stream.ids, stream.closes) == (finished.ids, finished.closes)
  if data == text.encode():
    assert (anchor.byte_ends(text)[1] == ends).all()
    tokens, closes = encoder.encode("", text)
    assert tokens.tolist() == stream.ids
    assert align(ends, closes).tolist() == counts


def check_all(anchors, augmenting, text, other, size):
  encoders = [ChunkEncoder(t) for t in augmenting]
  for anchor in anchors:
    for encoder in encoders:
      check_future(anchor, encoder, text, other, size)
      check_generation(anchor, encoder, text)


@given(text=RANDOM, one=RANDOM, other=RANDOM)
def test_random_futures_change_nothing_seen(toys, text, one, other):
  size = len(text.encode())
  check_all(toys(), toys(), text + one, text + other, size)


@given(text=RANDOM, one=RANDOM, other=RANDOM)
def test_random_futures_change_nothing_seen_by_real_tokenizers(
  real, text, one, other
):
  size = len(text.encode())
  check_all(real(), real(), text + one, text + other, size)
