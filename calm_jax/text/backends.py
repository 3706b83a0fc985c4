"""Hugging Face tokenizers and SentencePiece models behind one interface."""

import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from calm_jax.text import token_bytes
from calm_jax.text.token_bytes import Spans, Spelling


class Backend(Protocol):
  """A library's tokenizer, without special tokens."""

  pieces: tuple[str, ...]  # by id; "" at ids that the vocabulary skips
  vocab: dict[str, int]  # id by piece
  special_ids: dict[str, int]  # "bos", "eos", "pad" of the model file itself
  spelling: Spelling

  def encode(self, text: str) -> list[int]:
    """Returns token ids; no special token is added."""

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids of the vocabulary, without special tokens."""

  def spans(self, text: str) -> Spans:
    """Returns token ids and the bytes that they cover, as the library says."""


class HuggingFaceBackend:
  """A tokenizer.json."""

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    # Some tokenizer.json carry the limits of the run that saved them.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self._tokenizer = tokenizer
    self.vocab = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [""] * (max(self.vocab.values(), default=-1) + 1)
    for piece, index in self.vocab.items():
      pieces[index] = piece
    self.pieces, self.special_ids = tuple(pieces), {}
    description = json.loads(tokenizer.to_str())
    added = tokenizer.get_added_tokens_decoder().items()
    self._skipped = {index for index, token in added if token.special}
    self._skipped |= token_bytes.unknown_ids(description["model"], self.vocab)
    self.spelling = token_bytes.huggingface_spelling(
      description, pieces, self._skipped
    )

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    kept = [i for i in ids if i not in self._skipped]
    return self._tokenizer.decode(kept, skip_special_tokens=True)

  def spans(self, text: str) -> Spans:
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    # The library counts characters.
    sizes = [len(character.encode()) for character in text]
    bytes_before = np.cumsum([0, *sizes])
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return Spans(encoding.ids, *bytes_before[offsets].T)


class SentencePieceBackend:
  """A SentencePiece model."""

  def __init__(self, processor: sentencepiece.SentencePieceProcessor):
    self._processor = processor
    ids = range(processor.vocab_size())
    self.pieces = tuple(map(processor.id_to_piece, ids))
    self.vocab = {piece: i for i, piece in enumerate(self.pieces)}
    special = [processor.bos_id(), processor.eos_id(), processor.pad_id()]
    named = zip(("bos", "eos", "pad"), special, strict=True)
    self.special_ids = {kind: i for kind, i in named if i >= 0}
    self._skipped = {
      i for i in ids if processor.is_control(i) or processor.is_unknown(i)
    }
    self.spelling = token_bytes.sentencepiece_spelling(processor, self._skipped)

  def encode(self, text: str) -> list[int]:
    return self._processor.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    return self._processor.decode([i for i in ids if i not in self._skipped])

  def spans(self, text: str) -> Spans:
    pieces = self._processor.encode(text, return_type="proto").pieces
    ids, begins = [p.id for p in pieces], [p.begin for p in pieces]
    ends, data = [p.end for p in pieces], text.encode()
    for i, piece in enumerate(pieces):
      # It counts characters that it drops to the piece before them, and spaces
      # that end a text to the last one.
      covered = data[piece.begin : piece.end].decode()
      if covered[-1:] != piece.piece[-1:].replace(token_bytes.SPACE, " "):
        after = "a" if i < len(pieces) - 1 else ""
        kept = self._without_dropped(covered, after)
        ends[i] = piece.begin + len(kept.encode())
    return Spans(ids, begins, ends)

  def _without_dropped(self, text: str, after: str) -> str:
    """A text without what normalisation takes from its end, before `after`."""
    normalize = self._processor.normalize
    whole = normalize(f"a{text}{after}")
    while text and normalize(f"a{text[:-1]}{after}") == whole:
      text = text[:-1]
    return text
