"""Tokens and options that only the files beside a tokenizer know.

What `transformers.AutoTokenizer` makes of the same folder is right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import helpers
import pytest
import transformers
from real_tokenizers import TEXTS, use_metaspace
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from calm_jax.core.errors import InputError
from calm_jax.text.tokenizer import load_tokenizer, train_sentencepiece

WRITTEN = [
  *TEXTS[:3], "<tool>a cat</tool> sat", "x<tool> y", "<|im_end|>\n\n the cat",
  "</s>the cat</s> sat", "  two  spaces ", "", " ", "\n", "é 日本",
]  # fmt: skip


def write(folder: Path, name: str, **content) -> None:
  (folder / f"{name}.json").write_text(json.dumps(content))


def token(content: str, **flags) -> dict:
  usual = dict.fromkeys(
    ("lstrip", "rstrip", "normalized", "single_word"), False
  )
  return {"content": content, "special": True} | usual | flags


def byte_level(folder: Path) -> int:
  """A tokenizer.json of GPT-2's kind; returns its number of tokens."""
  backend = Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = BpeTrainer(
    vocab_size=300, initial_alphabet=alphabet,
    special_tokens=["<|endoftext|>", "<s>", "</s>"],
    show_progress=False,
  )  # fmt: skip
  backend.train_from_iterator(TEXTS, trainer)
  backend.save(str(folder / "tokenizer.json"))
  write(folder, "config", model_type="gpt2")
  return backend.get_vocab_size()


def vocab_and_merges(folder: Path) -> int:
  """The same as vocab.json and merges.txt alone."""
  size = byte_level(folder)
  model = json.loads((folder / "tokenizer.json").read_text())["model"]
  write(folder, "vocab", **model["vocab"])
  merges = "\n".join(" ".join(pair) for pair in model["merges"])
  (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
  (folder / "tokenizer.json").unlink()
  return size


def metaspace(folder: Path) -> int:
  """A tokenizer.json of Llama's kind, as transformers writes it."""
  backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
  use_metaspace(backend)
  special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  trainer = BpeTrainer(
    vocab_size=400, special_tokens=special[:3], show_progress=False
  )
  backend.train_from_iterator([*TEXTS, *special[3:]], trainer)
  saved = json.loads(backend.to_str())
  vocab = saved["model"]["vocab"]
  for piece in special[3:]:
    vocab.setdefault(piece, len(vocab))
  (folder / "tokenizer.json").write_text(json.dumps(saved))
  write(folder, "config", model_type="llama")
  write(folder, "tokenizer_config", tokenizer_class="LlamaTokenizer")
  return len(vocab)


def sentencepiece(folder: Path) -> int:
  """A tokenizer.model, of Llama's settings."""
  train_sentencepiece(
    TEXTS, folder / "tokenizer", vocab_size=400, hard_vocab_limit=False,
    byte_fallback=True, add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2,
    pad_id=-1,
  )  # fmt: skip
  write(folder, "config", model_type="llama")
  write(folder, "tokenizer_config", tokenizer_class="LlamaTokenizer")
  return load_tokenizer(folder / "tokenizer.model").vocab_size


KINDS = {
  kind.__name__: kind
  for kind in (byte_level, vocab_and_merges, metaspace, sentencepiece)
}


def merged(folder: Path, name: str, **content) -> None:
  path = folder / f"{name}.json"
  old = json.loads(path.read_text()) if path.exists() else {}
  write(folder, name, **old | content)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("added_tokens", {"<tool>": 0, "</tool>": 1}),
    ("tokenizer_config", {"added_tokens_decoder": {
      0: token("<tool>", special=False), 1: token("<|im_end|>", rstrip=True),
    }}),
    ("tokenizer_config", {"added_tokens_decoder": {0: token("</s>")}}),
    ("tokenizer_config", {"additional_special_tokens": [
      "<tool>", {"__type": "AddedToken", **token("<|im_end|>", lstrip=True)},
    ]}),
    ("tokenizer_config", {"extra_special_tokens": {"tool_token": "<tool>"}}),
    ("tokenizer_config", {"image_token": "<tool>", "pad_token": "</tool>"}),
    ("special_tokens_map", {"additional_special_tokens": ["<|im_end|>"]}),
    ("special_tokens_map", {"pad_token": token("<tool>")}),
    ("tokenizer_config", {"eos_token": "t"}),
    pytest.param(
      "tokenizer_config", {"add_prefix_space": True},
      marks=helpers.transformers_5,
    ),
    pytest.param(
      "tokenizer_config", {"add_prefix_space": False},
      marks=helpers.transformers_5,
    ),
    ("tokenizer_config", {"legacy": True}),
    ("tokenizer_config", {"legacy": False}),
    ("tokenizer_config", {"split_special_tokens": True}),
    ("tokenizer_config", {"clean_up_tokenization_spaces": True}),
    ("tokenizer_config", {"add_bos_token": True, "add_eos_token": True}),
    ("tokenizer_config", {"chat_template": [{"name": "a", "template": "b"}]}),
    ("tokenizer_config", {"model_max_length": 4}),
  ],
  ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_what_side_files_say_counts_as_in_transformers(
  tmp_path, kind, name, content
):
  size = KINDS[kind](tmp_path)
  if name == "added_tokens":
    content = {piece: size + i for piece, i in content.items()}
  if "added_tokens_decoder" in content:
    decoder = content["added_tokens_decoder"].items()
    decoder = {2 if t["content"] == "</s>" else size + i: t for i, t in decoder}
    content = {"added_tokens_decoder": decoder}
  merged(tmp_path, name, **content)
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  ours = load_tokenizer(tmp_path)
  for text in WRITTEN:
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text) == ids, text
    assert ours.decode(ids) == theirs.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
  assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def test_the_bytes_of_added_tokens(tmp_path):
  size = metaspace(tmp_path)
  write(tmp_path, "added_tokens", **{"<tool>": size})
  tokenizer = load_tokenizer(tmp_path)
  ids = tokenizer.encode("the<tool>cat")
  assert tokenizer.spell(ids)[ids.index(size)] == b"<tool>"
  assert b"".join(tokenizer.spell(ids)) == b"the<tool>cat"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_files_that_add_nothing_are_read_without_transformers(
  tmp_path, kind, monkeypatch
):
  KINDS[kind](tmp_path)
  index = load_tokenizer(tmp_path).encode("</s>")[0]
  merged(
    tmp_path, "tokenizer_config", eos_token="</s>", split_special_tokens=False,
    added_tokens_decoder={index: token("</s>")}, add_bos_token=False,
    add_prefix_space=kind == "metaspace", clean_up_tokenization_spaces=True,
  )  # fmt: skip
  write(tmp_path, "special_tokens_map", eos_token=token("</s>", rstrip=True))
  monkeypatch.setitem(sys.modules, "transformers", None)
  assert load_tokenizer(tmp_path).eos_id == index


def test_a_byte_level_file_under_another_class_keeps_its_ids(tmp_path):
  byte_level(tmp_path)
  want = load_tokenizer(tmp_path)
  write(tmp_path, "tokenizer_config", tokenizer_class="LlamaTokenizerFast")
  write(tmp_path, "config", model_type="llama")
  got = load_tokenizer(tmp_path)
  for text in WRITTEN:
    assert got.encode(text) == want.encode(text)
    assert got.decode(got.encode(text)) == want.decode(want.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_contradict_each_other(tmp_path, kind):
  size = KINDS[kind](tmp_path)
  write(tmp_path, "added_tokens", **{"<tool>": size + 5})
  with pytest.raises(InputError, match=rf"'<tool>' id {size + 5}, and trans"):
    load_tokenizer(tmp_path)
  (tmp_path / "added_tokens.json").unlink()
  write(tmp_path, "special_tokens_map", eos_token="<absent>")
  with pytest.raises(InputError, match="eos token '<absent>'"):
    load_tokenizer(tmp_path)
  write(tmp_path, "special_tokens_map", eos_token=["<s>", "</s>"])
  with pytest.raises(
    InputError, match=r"several of eos_token|TypeError|either"
  ):
    load_tokenizer(tmp_path)
  (tmp_path / "special_tokens_map.json").unlink()
  for number in ("2", [2, None], 2.0, True, {"id": 2}):
    write(tmp_path, "generation_config", eos_token_id=number)
    with pytest.raises(InputError, match=r"eos_token_id=.* no token's id"):
      load_tokenizer(tmp_path)


def test_code_of_the_folder_is_refused(tmp_path):
  sentencepiece(tmp_path)
  merged(
    tmp_path, "tokenizer_config", tokenizer_class="Own",
    auto_map={"AutoTokenizer": ["own.Own", None]},
  )  # fmt: skip
  (tmp_path / "own.py").write_text("raise SystemExit(1)")
  with pytest.raises(InputError, match="custom code"):
    load_tokenizer(tmp_path)


def test_ids_beyond_the_number_of_pieces(tmp_path):
  vocab = {"a": 0, "b": 7, "<unk>": 3, "<end>": 12}
  backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
  backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.save(str(tmp_path / "tokenizer.json"))
  for number, eos in ((12, 12), (7, 7), (13, None), (-1, None)):
    write(tmp_path, "config", eos_token_id=number)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (eos, 13)
  assert tokenizer.encode("a b c") == [0, 7, 3]


@pytest.mark.parametrize(
  ("generation", "config", "stops"),
  [
    (None, 5, (2, 5)), (None, [5, 6], (2, 5, 6)), (None, None, (2,)),
    (None, [2, 5], (2, 5)), ([7, 2], [5], (2, 7)), (7, [5], (2, 7)),
    ({}, [5, 6], (2, 5, 6)), ({}, 0, (2, 0)), (None, "absent", (2,)),
  ],
)  # fmt: skip
def test_stops_of_the_tokenizer_and_the_model(
  tmp_path, generation, config, stops
):
  sentencepiece(tmp_path)
  (tmp_path / "tokenizer_config.json").unlink()
  absent = config == "absent"
  write(tmp_path, "config", **{} if absent else {"eos_token_id": config})
  if generation is not None:
    said = {} if generation == {} else {"eos_token_id": generation}
    write(tmp_path, "generation_config", temperature=0.5, **said)
  assert load_tokenizer(tmp_path).stop_ids == stops
