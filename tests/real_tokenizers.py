"""Tokenizers of every kind: small ones made here, and the shared real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import (
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)
from tokenizers import Tokenizer as Backend

from calm_jax.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
  "once upon a time the cat sat on the mat; the end",
  "there was a time, and a mat, and 123 cats é 日本 ไทย ﬁn",
  "straightforwardnesses of cats\nand   mats . x y",
] * 5


def toys(folder: Path) -> dict[str, Tokenizer]:
  """Byte-level BPE, with NFC, with chat markers; five SentencePiece models."""
  made = {
    "byte_level": byte_level(folder / "byte_level"),
    "byte_level_nfc": byte_level(folder / "nfc", normalizers.NFC()),
    "chat": _chat(folder / "chat"),
    "one_dropped": _metaspace(folder / "dropped"),
  }
  made["unigram_folding"] = _folding(folder / "folding")
  made["cls_sep"] = cls_sep(folder / "cls_sep")
  for name, options in {
    "bpe_bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 340,
                  "normalization_rule_name": "identity",
                  "remove_extra_whitespaces": False},
    "unigram_nfkc": {"model_type": "unigram", "vocab_size": 70},
    "characters": {"model_type": "char", "vocab_size": 40,
                   "character_coverage": 0.99, "add_dummy_prefix": False},
  }.items():  # fmt: skip
    prefix = folder / name
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS), model_prefix=str(prefix),
      hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    made[name] = load_tokenizer(f"{prefix}.model")
  return made


def byte_level(folder: Path, normalizer=None) -> Tokenizer:
  backend = Backend(models.BPE())
  if normalizer is not None:
    backend.normalizer = normalizer
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(
    TEXTS,
    trainers.BpeTrainer(
      vocab_size=300,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      special_tokens=["</s>"],
      show_progress=False,
    ),
  )
  return _saved(backend, folder)


def _chat(folder: Path) -> Tokenizer:
  """NFC, two special markers, one that is not, and a BOS that is not either."""
  byte_level(folder, normalizers.NFC())
  backend = Backend.from_file(str(folder / "tokenizer.json"))
  backend.add_special_tokens(["<|user|>", "<|end|>"])
  backend.add_tokens(["<b>", "<|begin|>"])
  backend.save(str(folder / "tokenizer.json"))
  # transformers 4 reads no tokenizer without it.
  (folder / "config.json").write_text('{"model_type": "gpt2"}')
  config = {"bos_token": "<|begin|>", "eos_token": "</s>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return load_tokenizer(folder)


def use_metaspace(backend: Backend) -> None:
  """Gives a tokenizer the first and the last steps of Llama's."""
  backend.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme="first", split=False
  )
  backend.decoder = decoders.Sequence([
    decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
  ])  # fmt: skip


def _metaspace(folder: Path) -> Tokenizer:
  """One token a character; what is not in the vocabulary is passed over."""
  letters = sorted({*"▁abcdehimnopstuw.,日é"})
  vocab = {letter: i for i, letter in enumerate(["<unk>", "</s>", *letters])}
  backend = Backend(models.BPE(vocab=vocab, merges=[]))
  use_metaspace(backend)
  backend.add_special_tokens(["<unk>", "</s>"])
  return _saved(backend, folder)


def _folding(folder: Path) -> Tokenizer:
  """A fast tokenizer that normalises, and drops spaces and accents."""
  backend = Backend(models.Unigram())
  backend.normalizer = normalizers.Sequence([
    normalizers.NFKD(), normalizers.StripAccents(), normalizers.Strip(),
    normalizers.Replace(Regex(" {2,}"), " "),
  ])  # fmt: skip
  backend.pre_tokenizer = pre_tokenizers.Metaspace()
  backend.decoder = decoders.Metaspace()
  trainer = trainers.UnigramTrainer(
    vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>",
    show_progress=False,
  )  # fmt: skip
  backend.train_from_iterator(TEXTS, trainer)
  return _saved(backend, folder)


def cls_sep(folder: Path) -> Tokenizer:
  """A SentencePiece model as ALBERT's tokenizer, such as the Goldfish have.

  [CLS] and [SEP] are its BOS and EOS, and the vocabulary is filled up with
  names that stand in no text. Converted as transformers 4 does it, but for the
  table of normalisation, for which NFKC stands.
  """
  folder.mkdir()
  prefix = folder / "spiece"
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=70,
    hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  model = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
  ids = range(model.vocab_size())
  pieces = [(model.id_to_piece(i), model.get_score(i)) for i in ids]
  backend = Backend(models.Unigram(pieces, unk_id=model.unk_id()))
  backend.normalizer = normalizers.Sequence([
    normalizers.Replace("``", '"'), normalizers.Replace("''", '"'),
    normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "),
  ])  # fmt: skip
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
  backend.decoder = decoders.Metaspace(prepend_scheme="always")
  named = {"bos": "[CLS]", "eos": "[SEP]", "cls": "[CLS]", "sep": "[SEP]",
           "pad": "<pad>", "mask": "[MASK]", "unk": "<unk>"}  # fmt: skip
  fill = [f"[XXXXX{i}]" for i in range(5)]
  backend.add_special_tokens(
    ["[CLS]", "[SEP]", "<pad>", "[MASK]", "<unk>", *fill]
  )
  first, last = (backend.token_to_id(t) for t in ("[CLS]", "[SEP]"))
  backend.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", first), ("[SEP]", last)]
  )
  backend.save(str(folder / "tokenizer.json"))
  config = {f"{kind}_token": piece for kind, piece in named.items()}
  config |= {"tokenizer_class": "AlbertTokenizer", "keep_accents": True}
  config["additional_special_tokens"] = fill
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return load_tokenizer(folder)


def _saved(backend: Backend, folder: Path) -> Tokenizer:
  folder.mkdir()
  backend.save(str(folder / "tokenizer.json"))
  return load_tokenizer(folder)


def real(shared: Path, folder: Path) -> dict[str, Tokenizer]:
  """GPT-2, GPT-NeoX, T5, and the two tiny models', each in both its forms."""
  gpt2 = folder / "gpt2"
  gpt2.mkdir()
  source = shared / "tokenizers" / "gpt2_bpe"
  shutil.copy(source / "encoder.json", gpt2 / "vocab.json")
  shutil.copy(source / "vocab.bpe", gpt2 / "merges.txt")
  config = {"tokenizer_class": "GPT2Tokenizer"}
  (gpt2 / "tokenizer_config.json").write_text(json.dumps(config))
  neox = shared / "tokenizers" / "gptneox_20b" / "20B_tokenizer.json"
  [t5] = (shared / "tokenizers" / "t5_cc_all_32000").glob("*.model")
  made = {"gpt2": gpt2, "neox": neox, "t5": t5}
  for name in ("babyllama", "stories260k"):
    made[name] = shared / "models" / name
    made[f"{name}_model"] = shared / "models" / name / "tokenizer.model"
  return {name: load_tokenizer(path) for name, path in made.items()}
