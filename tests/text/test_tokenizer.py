"""Tests of calm_jax.text.tokenizer."""

import json
import os
import shutil
from pathlib import Path

import helpers
import pytest

from calm_jax.core.errors import InputError
from calm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

TEXTS = [
  "once upon a time there was a cat",
  "the cat sat on the mat; the end",
  "there was a time, and a mat, and 123 cats",
] * 5


def train(folder, name="tokenizer", **changes):
  settings = {"vocab_size": 60, "user_defined_symbols": ["subs:", "math:"]}
  return train_sentencepiece(TEXTS, folder / name, **settings | changes)


@pytest.fixture
def shared():
  if not os.environ.get("CALM_SHARED"):
    pytest.skip("CALM_SHARED is unset: the shared models are not here")
  return Path(os.environ["CALM_SHARED"])


def test_training_writes_the_same_bytes(tmp_path):
  train(tmp_path, "one")
  train(tmp_path / "elsewhere", "two")
  one = (tmp_path / "one.model").read_bytes()
  assert one == (tmp_path / "elsewhere" / "two.model").read_bytes()


def test_training_is_quiet(tmp_path, capfd):
  train(tmp_path)
  assert capfd.readouterr() == ("", "")


def test_trained_tokenizer(tmp_path):
  tokenizer = train(tmp_path)
  assert tokenizer.vocab_size == 60 == len(tokenizer.pieces)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.stop_ids == (2,)
  for text in ("the  cat", " a cat", "cat ", "subs:cats", "12 mats", ""):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert len(tokenizer.encode("subs:")) == 1
  assert len(tokenizer.encode("312")) == 3
  assert tokenizer.decode([1, *tokenizer.encode("cat"), 2, 0]) == "cat"
  assert tokenizer.decode([10_000, -1]) == ""


def test_fingerprint_is_of_the_vocabulary(tmp_path):
  one = train(tmp_path, "one")
  assert one.fingerprint == train(tmp_path, "same").fingerprint
  assert one.fingerprint != train(tmp_path, "b", vocab_size=61).fingerprint
  assert len(one.fingerprint) == 64


def test_vocabulary_that_cannot_be_filled(tmp_path):
  with pytest.raises(InputError, match="cannot train"):
    train(tmp_path, vocab_size=3)


def test_nothing_there(tmp_path):
  with pytest.raises(InputError, match=r"neither a file nor a folder"):
    load_tokenizer(tmp_path / "absent")
  with pytest.raises(InputError, match=r"folder with one of tokenizer\.json"):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_broken_file(tmp_path, name):
  (tmp_path / name).write_text("not a tokenizer")
  with pytest.raises(InputError, match="cannot read"):
    load_tokenizer(tmp_path)


def test_broken_config(tmp_path):
  train(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(InputError, match=r"config\.json"):
    load_tokenizer(tmp_path)


def write(path, **content):
  path.write_text(json.dumps(content))


def test_special_ids_by_name_come_first(tmp_path):
  train(tmp_path)
  write(
    tmp_path / "config.json", model_type="llama", bos_token_id=7, eos_token_id=8
  )
  write(tmp_path / "generation_config.json", eos_token_id=[2, 9])
  tokenizer = load_tokenizer(tmp_path)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
  assert tokenizer.stop_ids == (2, 9)
  write(
    tmp_path / "tokenizer_config.json",
    bos_token=None,
    add_bos_token=False,
    eos_token={"__type": "AddedToken", "content": "subs:"},
  )
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.bos_id is None
  assert tokenizer.pieces[tokenizer.eos_id] == "subs:"
  write(tmp_path / "tokenizer_config.json", eos_token="<absent>")
  with pytest.raises(InputError, match="<absent>"):
    load_tokenizer(tmp_path)


def byte_level(folder, **changes):
  """A tokenizer.json of single bytes and one merge, by hand."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {letter: i for i, letter in enumerate(letters)}
  vocab["ab"] = len(vocab)
  backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(["<end>"])
  backend.enable_truncation(4)
  backend.save(str(folder / "tokenizer.json"))
  return vocab


def test_tokenizer_json(tmp_path):
  byte_level(tmp_path)
  write(tmp_path / "config.json", eos_token_id=257, bos_token_id=-1)
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.vocab_size == 258
  assert (tokenizer.eos_id, tokenizer.bos_id) == (257, None)
  # The limit that the file was saved with is not a limit here.
  assert len(tokenizer.encode("abcdefgh")) == 7
  text = "  two\nlines, é and 日本"
  assert tokenizer.decode([*tokenizer.encode(text), 257]) == text


def test_continuation_completes_a_character(tmp_path):
  byte_level(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  ids = tokenizer.encode("caf\u00e9!")
  assert tokenizer.decode_continuation(ids[:4], ids[4:]) == "é!"


def test_continuation_across_a_merge(tmp_path):
  vocab = byte_level(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  # "ab" is one token, but a model prompted with "a" sees the token "a".
  assert tokenizer.encode_continuation("a", "b!") == [vocab["b"], vocab["!"]]
  assert tokenizer.encode_continuation("c", "ab") == [vocab["ab"]]


@helpers.transformers_5  # wrote their files
@pytest.mark.parametrize("name", ["stories260k", "babyllama"])
def test_shared_models_agree(shared, tmp_path, name):
  folder = shared / "models" / name
  fast = load_tokenizer(folder)
  for file in ("tokenizer.model", "tokenizer_config.json", "config.json"):
    shutil.copy(folder / file, tmp_path)
  slow = load_tokenizer(tmp_path)
  text = "Once upon a time, there was a little girl"
  assert fast.encode(text) == slow.encode(text)
  assert (
    fast.decode(fast.encode(text)) == text == slow.decode(slow.encode(text))
  )
  assert fast.fingerprint == slow.fingerprint
  for tokenizer in (fast, slow):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = [1, *tokenizer.encode(text)]
    for cut in range(1, len(ids)):
      head, tail = ids[:cut], ids[cut:]
      joined = tokenizer.decode(head)
      joined += tokenizer.decode_continuation(head, tail)
      assert joined == text
    for cut in range(1, len(text)):
      prompt, rest = text[:cut], text[cut:]
      ids = tokenizer.encode(prompt)
      new = tokenizer.encode_continuation(prompt, rest)
      # Not the parts: SentencePiece drops a space that ends the prompt.
      assert tokenizer.decode(ids + new) == text


def test_vocabulary_and_merges(shared, tmp_path):
  folder = shared / "tokenizers" / "gpt2_bpe"
  shutil.copy(folder / "encoder.json", tmp_path / "vocab.json")
  shutil.copy(folder / "vocab.bpe", tmp_path / "merges.txt")
  write(
    tmp_path / "tokenizer_config.json",
    tokenizer_class="GPT2Tokenizer",
    eos_token="<|endoftext|>",
  )
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.encode("Hello world") == [15496, 995]
  assert tokenizer.eos_id == 50256
  assert tokenizer.decode([15496, 995, 50256]) == "Hello world"
