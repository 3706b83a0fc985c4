"""Hugging Face tokenizers and SentencePiece models behind one interface.

Both leave special tokens out of what they encode and decode.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers

from calm_jax.core.errors import InputError
from calm_jax.text.side_files import SideFiles

_SPACE = "\u2581"
_BYTE = re.compile(rb"<0x([0-9A-Fa-f]{2})>")


class Spelling(NamedTuple):
  """The bytes of a tokenizer's tokens."""

  # Bytes by id, b"" where the decoder leaves the token out; None if it is a
  # decoder whose bytes are not known.
  pieces: tuple[bytes, ...] | None
  strips: bool  # whether the decoder takes away one space before the text


class HuggingFaceBackend:
  """A tokenizer.json.

  It has `pieces` by id ("" at ids that the vocabulary skips), the `vocab` by
  piece, `special_ids` ("bos" and "eos" of the model file), `added_ids` of
  tokens that are found before a text is split, and a `spelling`.
  """

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
    model, added = tokenizer.model, tokenizer.get_added_tokens_decoder()
    self.added_ids = frozenset(added)
    self._skipped = {i for i, token in added.items() if token.special}
    unknown = getattr(model, "unk_token", None)
    if unknown in self.vocab:
      self._skipped.add(self.vocab[unknown])
    if isinstance(model, tokenizers.models.Unigram):
      self._skipped.add(json.loads(tokenizer.to_str())["model"]["unk_id"])
    texts = {token.content for token in added.values()}
    texts = {text for text in texts if model.token_to_id(text) is None}
    self.spelling = _huggingface_spelling(
      _steps(tokenizer.decoder), pieces, texts, self._skipped
    )

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids that are all of the vocabulary."""
    kept = [i for i in ids if i not in self._skipped]
    return self._tokenizer.decode(kept, skip_special_tokens=True)


class SentencePieceBackend:
  """A SentencePiece model, with the attributes of `HuggingFaceBackend`."""

  def __init__(self, processor: sentencepiece.SentencePieceProcessor):
    self._processor = processor
    ids = range(processor.vocab_size())
    self.pieces = tuple(map(processor.id_to_piece, ids))
    self.vocab = {piece: i for i, piece in enumerate(self.pieces)}
    special = {"bos": processor.bos_id(), "eos": processor.eos_id()}
    self.special_ids = {kind: i for kind, i in special.items() if i >= 0}
    self._skipped = {
      i for i in ids if processor.is_control(i) or processor.is_unknown(i)
    }
    self.added_ids = frozenset()  # It does not tell which are user-defined.
    spelled = _with_spaces(self.pieces)
    for i in ids:
      if processor.is_byte(i):
        spelled[i] = _byte(spelled[i])
      elif i in self._skipped:
        spelled[i] = b""
    # The decoder takes away what the encoder puts in front.
    first = self.encode("a")
    strips = bool(first) and spelled[first[0]].startswith(b" ")
    self.spelling = Spelling(tuple(spelled), strips)

  def encode(self, text: str) -> list[int]:
    return self._processor.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    return self._processor.decode([i for i in ids if i not in self._skipped])


def load_tokenizer(folder: Path) -> Any:
  """Reads the tokenizer of a folder by transformers."""
  import transformers

  return transformers.AutoTokenizer.from_pretrained(
    str(folder), trust_remote_code=False
  )


Backend = HuggingFaceBackend | SentencePieceBackend


def read(path: Path, side: SideFiles) -> Backend:
  """Reads tokenizer.json, a SentencePiece model, or merges.txt's folder.

  Where `side` says more than the file, transformers reads its folder: importing
  it takes seconds. Raises InputError if a library cannot read it, or adds a
  token under another id than a file says.
  """
  known = None
  try:
    if path.suffix == ".json":
      tokenizer = tokenizers.Tokenizer.from_file(str(path))
      if not _says_more(side, tokenizer):
        return HuggingFaceBackend(tokenizer)
      known = tokenizer.get_vocab(with_added_tokens=True)
    elif path.suffix == ".model" and (
      not side.of_tokenizer or path.with_name("tokenizer.json").is_file()
    ):
      model = sentencepiece.SentencePieceProcessor(model_file=str(path))
      return SentencePieceBackend(model)
    tokenizer = load_tokenizer(path.parent).backend_tokenizer
    backend = HuggingFaceBackend(tokenizer)
  except Exception as error:  # `tokenizers` raises bare Exception.
    raise InputError(f"cannot read the tokenizer {path}: {error}") from error
  if known is None:
    known = tokenizer.get_vocab(with_added_tokens=False)
  tokens = side.tokens()
  # transformers gives what no file numbers the next id: no model knows that.
  numbered = known.keys() | {t for t, said in tokens.items() if "id" in said}
  for kind in ("bos", "eos"):
    side.check_named(kind, numbered)
  for piece in tokens.keys() - known:
    index = backend.vocab.get(piece)
    if (given := tokens[piece].get("id", index)) != index:
      raise InputError(
        f"the files beside {path} give the token {piece!r} id {given}, and "
        f"transformers {index}: the tokenizer files do not belong together"
      )
  return backend


def _says_more(side: SideFiles, tokenizer: tokenizers.Tokenizer) -> bool:
  """True if files beside a tokenizer.json change how it splits a text."""
  added = tokenizer.get_added_tokens_decoder().values()
  known = {token.content: token for token in added}
  for piece, said in side.tokens().items():
    flags = said.keys() - {"id"}
    token = known.get(piece)
    if token is None or any(getattr(token, f) != said[f] for f in flags):
      return True
  options = side.tokenizer_config
  prefix, legacy = options.get("add_prefix_space"), options.get("legacy")
  steps = [*_steps(tokenizer.normalizer), *_steps(tokenizer.pre_tokenizer)]
  schemes = {_prefix_scheme(step) for step in steps} - {"never"}
  return (
    bool(options.get("split_special_tokens"))
    or "fast_tokenizer_files" in options
    or prefix not in (None, bool(schemes))
    or (legacy is True and schemes == {"first"})
    or (legacy is False and schemes == {"always"})
  )


def _prefix_scheme(step: dict) -> str:
  """Returns before which text a step of a tokenizer.json puts a space."""
  match step["type"]:
    case "Metaspace":
      return step["prepend_scheme"]
    case "ByteLevel":
      return "bytes" if step.get("add_prefix_space") else "never"
    case "Prepend":
      return "text"
  return "never"


def _steps(part: Any) -> list[dict]:
  """The steps of a part of a tokenizer.json, without nesting."""
  if part is None:
    return []
  if not isinstance(part, dict):  # the library's, which can say it in JSON
    part = json.loads(part.__getstate__())
  for name in ("normalizers", "pretokenizers", "decoders"):
    if name in part:
      return [step for inner in part[name] for step in _steps(inner)]
  return [part]


def _huggingface_spelling(
  steps: list[dict], pieces: Sequence[str], added: set[str], left_out: set[int]
) -> Spelling:
  """Spells byte-level and SentencePiece-like tokens of a tokenizer.json.

  `added` are the pieces that the vocabulary without added tokens lacks.
  """
  kinds = [step["type"] for step in steps]
  if kinds == ["ByteLevel"]:
    known, strips = _byte_level(pieces, added), False
  elif steps and all(map(_only_makes_spaces, steps)):
    known = _with_spaces(pieces)
    if "ByteFallback" in kinds:
      known = [_byte(text) for text in known]
    strips = any(
      step["type"] == "Strip" or step.get("prepend_scheme", "never") != "never"
      for step in steps
    )
  else:
    return Spelling(None, False)
  kept = tuple(b"" if i in left_out else b for i, b in enumerate(known))
  return Spelling(kept, strips)


def _only_makes_spaces(step: dict) -> bool:
  """True if `_with_spaces` and `_byte` do what a step of a decoder does."""
  match step["type"]:
    case "Replace":
      return (step["pattern"], step["content"]) == ({"String": _SPACE}, " ")
    case "Strip":
      return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)
    case "Metaspace":
      return step["replacement"] == _SPACE
  return step["type"] in ("ByteFallback", "Fuse")


def _byte_level(pieces: Sequence[str], added: set[str]) -> list[bytes]:
  """Bytes of pieces in GPT-2's alphabet, one character for each byte."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  alphabet = {chr(byte): byte for byte in printable}
  alphabet |= {chr(256 + i): byte for i, byte in enumerate(others)}
  return [
    piece.encode()
    if piece in added or not all(c in alphabet for c in piece)
    else bytes(alphabet[c] for c in piece)
    for piece in pieces
  ]


def _with_spaces(pieces: Iterable[str]) -> list[bytes]:
  return [piece.replace(_SPACE, " ").encode() for piece in pieces]


def _byte(text: bytes) -> bytes:
  """The byte that <0x..> stands for; any other text as it is."""
  match = _BYTE.fullmatch(text)
  return bytes.fromhex(match[1].decode()) if match else text
