"""An augmenting model reads what the anchor's ids spell, up to each of them."""

import dataclasses
import json
import os
import types
from itertools import islice
from pathlib import Path

import pytest
import real_tokenizers
from hypothesis import given
from hypothesis import strategies as st
from random_texts import RANDOM

from calm_jax.core.errors import InputError
from calm_jax.text.alignment import (
  MAX_CHUNK,
  AlignedReader,
  ChunkEncoder,
  Chunker,
)
from calm_jax.text.backends import Spelling
from calm_jax.text.tokenizer import train_sentencepiece


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


def chunks(text, digits_alone=False):
  """The closed chunks of a text."""
  data = text.encode() if isinstance(text, str) else text
  return Chunker(digits_alone).push(data)


def test_words_close_at_the_whitespace_after_them():
  assert chunks("Hello  big\n world") == ["Hello", "  big"]
  assert chunks("Hello  big\n worl ") == ["Hello", "  big", "\n worl"]


def test_ideographs_close_at_once():
  assert chunks("a日本 かx") == ["a", "日", "本", " ", "か"]


def test_digits_close_at_once_where_no_token_has_two(tmp_path):
  text = "a 1907, x12\n3"
  assert chunks(text) == ["a", " 1907,", " x12"]
  assert chunks(text, digits_alone=True) == [
    *("a", " 1", "9", "0", "7", ",", " x", "1", "2", "\n3")
  ]
  texts = ["the year 1907", "the code 4711, the house 23568"] * 20
  for split in (True, False):
    tokenizer = train_sentencepiece(
      texts, tmp_path / str(split), vocab_size=40, split_digits=split
    )
    assert ChunkEncoder(tokenizer).digits_alone == split


def test_long_words_are_cut():
  assert chunks("é" * (2 * MAX_CHUNK + 3)) == ["é" * MAX_CHUNK] * 2


def test_a_prompts_end_closes_a_chunk():
  for prompt, closed in (("ab cd", [" cd"]), ("ab cd ", []), ("", [])):
    chunker = Chunker()
    chunker.push(prompt.encode())
    assert chunker.cut() == closed
  chunker = Chunker()
  chunker.push(b"ab  ")
  assert chunker.cut() == []
  assert chunker.push(b"cd ") == ["  cd"]


@given(st.binary(max_size=40), st.data())
def test_random_pieces_give_the_same_chunks(data, draw):
  """Of any bytes, UTF-8 or not."""
  whole = chunks(data)
  read = "".join(whole)
  assert data.decode("utf-8", "replace").startswith(read)
  chunker, closed, at = Chunker(), [], 0
  while at < len(data):
    size = draw.draw(st.integers(1, len(data) - at))
    closed += chunker.push(data[at : at + size])
    at += size
  assert closed == whole


def check_generation(anchor, encoders, text):
  """Token by token is all at once, and no token sees what comes after it."""
  ids = anchor.encode(text)
  parts = [anchor.spell([i], ids[:t])[0] for t, i in enumerate(ids)]
  assert parts == anchor.spell(ids)
  for encoder in encoders:
    reader, counts = AlignedReader(anchor, encoder), []
    for token in ids:
      before = len(reader.ids)
      assert reader.push(token) == reader.ids[before:]
      counts.append(len(reader.ids))
    at_once = AlignedReader(anchor, encoder)
    assert at_once.read(ids) == (reader.ids, counts)
    # Tokens of the chunks of the text that the ids spell, and nothing else.
    texts = chunks(b"".join(parts), encoder.digits_alone)
    read = encoder.tokenizer.with_bos([])
    for number, chunk in enumerate(texts):
      read += encoder.tokens(chunk, number == 0)
    assert read == reader.ids


@given(text=RANDOM)
def test_random_texts_token_by_token(toys, text):
  kinds = toys()
  encoders = [ChunkEncoder(t) for t in kinds]
  for anchor in kinds:
    check_generation(anchor, encoders, text)


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


def test_real_text_token_by_token(real):
  shared = Path(os.environ["CALM_SHARED"])
  kinds = list(real())
  encoders = [ChunkEncoder(t) for t in kinds]
  names = set()
  for name, lines in real_texts(shared):
    names.add(name)
    for line in lines:
      for kind in kinds:
        check_generation(kind, encoders, line)
  assert len(names) == 19


def test_share_of_text_that_chunks_split_as_the_tokenizer_does(real):
  """The price of chunks: other tokens where words are long."""
  shared = Path(os.environ["CALM_SHARED"])
  path = shared / "data" / "gsm8k" / "test.jsonl"
  with path.open() as file:
    lines = [json.loads(line)["question"] for line in islice(file, 50)]
  for tokenizer in real():
    encoder, same = ChunkEncoder(tokenizer), 0
    for line in lines:
      reader = AlignedReader(tokenizer, encoder)
      ids, _ = reader.read(tokenizer.encode(line), len(tokenizer.encode(line)))
      same += tokenizer.with_bos(tokenizer.encode(line)) == ids
    assert same == len(lines), tokenizer


def read(anchor, other, ids, prompt_length=0):
  """The pieces that an augmenting model reads, and the counts."""
  reader = AlignedReader(anchor, ChunkEncoder(other))
  ids, counts = reader.read(ids, prompt_length)
  return [other.pieces[i] for i in ids], counts


def spelled(anchor, text) -> str:
  return b"".join(anchor.spell(anchor.encode(text))).decode()


def test_special_and_unknown_tokens_spell_nothing(toys, tmp_path):
  made = real_tokenizers.toys(tmp_path)
  anchor, other = made["chat"], made["one_dropped"]
  text = "<|user|>a<|end|>b<b> c </s>d"
  assert spelled(anchor, text) == "ab<b> c d"
  pieces, counts = read(anchor, other, anchor.encode_prompt(text))
  assert pieces == ["▁", "a", "b", "b", "▁", "c"]  # "<" is in none of its own
  # BOS, <|user|>, a, <|end|>, b, <b>; the first word ends behind it.
  assert counts[:7] == [0] * 6 + [4]
  assert spelled(made["byte_level_nfc"], "e\u0301") == "\u00e9"
  assert spelled(made["characters"], "a㐀t") == "at"
  assert spelled(made["one_dropped"], "a?é?b?") == "aéb"


def test_ids_that_files_use_as_special_spell_nothing(toys):
  toy = next(iter(toys()))
  a, b, c, d = (toy.encode(letter)[0] for letter in "abcd")
  used = dataclasses.replace(
    toy, bos_id=a, eos_id=b, stop_ids=(b, c), named_special_ids=frozenset([d])
  )
  ids = [a, b, c, d, *toy.encode("e")]
  assert b"".join(toy.spell(ids)) == b"abcde"
  assert used.spell(ids) == [b"", b"", b"", b"", b"e"]


def test_a_text_that_spells_the_augmenting_models_bos_gives_it_one(toys):
  anchor, *_ = toys()
  other = dataclasses.replace(anchor, bos_id=anchor.encode("</s>")[0])
  assert read(anchor, other, anchor.encode("<") + anchor.encode("/s> a b"))[0][
    :2
  ] == ["</s>", "Ġa"]


def test_decoders_of_unknown_kinds_spell_whole_characters(toys):
  toy = next(iter(toys()))
  backend = types.SimpleNamespace(
    spelling=Spelling(None, False), decode=toy._backend.decode
  )
  unknown = dataclasses.replace(toy, _backend=backend)
  ids = toy.encode("a日 b</s>c")
  assert [*filter(None, unknown.spell(ids))] == [
    b"a",
    "日".encode(),
    b" ",
    b"b",
    b"c",
  ]
  assert unknown.spell(ids[-2:], ids[:-2]) == [b"", b"c"]


def test_what_cannot_be_aligned_is_said(toys):
  toy = next(iter(toys()))
  backend = types.SimpleNamespace(
    spelling=Spelling(None, False),
    encode=toy._backend.encode,
    decode=lambda ids: str(len(ids)),
  )
  whimsical = dataclasses.replace(toy, _backend=backend)
  with pytest.raises(InputError, match="changes text that it has already"):
    whimsical.spell([0, 1])
