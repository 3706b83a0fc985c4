"""The bytes that tokens stand for, and the byte at which each token ends."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spans(NamedTuple):
  """Token ids of a text, and the bytes of it that each covers.

  A token that ends within a character begins and ends where that begins; one
  that goes on in a character ends after it.
  """

  ids: list[int]
  begins: Sequence[int]
  ends: Sequence[int]


class Spelling(NamedTuple):
  """The bytes of a tokenizer's tokens.

  Attributes:
    pieces: bytes by id, b"" where the decoder leaves the token out; None if
      it is a decoder whose bytes are not known.
    strips: whether the decoder takes away one space in front of the text.
    skips: whether characters without a piece are in no token.
  """

  pieces: tuple[bytes, ...] | None
  strips: bool
  skips: bool


def unknown_ids(model: dict, vocab: dict[str, int]) -> set[int]:
  """Returns the ids, none or one, of the unknown token of a tokenizer.json."""
  by_name = vocab.get(model.get("unk_token") or "")
  return {model.get("unk_id"), by_name} - {None}


def huggingface_spelling(
  description: dict, pieces: Sequence[str], left_out: set[int]
) -> Spelling:
  """Spells byte-level and SentencePiece-like tokens of a tokenizer.json."""
  model, decoder = description["model"], description["decoder"]
  steps = _flat(decoder, "decoders")
  kinds = [step["type"] for step in steps]
  covers = kinds == ["ByteLevel"] or all(
    f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)
  )
  skips = model["type"] == "BPE" and model["unk_token"] is None and not covers
  if kinds == ["ByteLevel"]:
    known, strips = _byte_level(pieces), False
  elif steps and all(map(_is_spaces, steps)):
    known = _spaces(pieces, "ByteFallback" in kinds)
    strips = any(
      step["type"] == "Strip" or step.get("prepend_scheme", "never") != "never"
      for step in steps
    )
  else:
    return Spelling(None, False, skips)
  kept = tuple(b"" if i in left_out else b for i, b in enumerate(known))
  return Spelling(kept, strips, skips)


def sentencepiece_spelling(
  processor: sentencepiece.SentencePieceProcessor, left_out: set[int]
) -> Spelling:
  """Spells the tokens of a SentencePiece model."""
  ids = range(processor.vocab_size())
  pieces = _spaces(map(processor.id_to_piece, ids), False)
  for i in filter(processor.is_byte, ids):
    pieces[i] = _byte(pieces[i])
  for i in left_out:
    pieces[i] = b""
  # The decoder takes away what the encoder puts in front.
  first = processor.encode("a")
  strips = bool(first) and pieces[first[0]].startswith(b" ")
  return Spelling(tuple(pieces), strips, False)


def known_ends(spelled: list[bytes], text: str) -> np.ndarray | None:
  """Returns the ends of tokens in a text; None if they spell another."""
  if b"".join(spelled) != text.encode():
    return None
  return np.cumsum([len(part) for part in spelled], dtype=np.int64)


def searched_ends(spelled: list[bytes], text: str) -> np.ndarray | None:
  """Returns the ends of tokens that leave out characters of a text.

  None if the tokens are not found in the text in their order.
  """
  data, at, ends = text.encode(), 0, []
  for part in spelled:
    if part:
      # Both stand for a space.
      pattern = re.escape(part).replace(rb"\ ", b"(?: |\xe2\x96\x81)")
      match = re.compile(pattern).search(data, at)
      if match is None:
        return None
      at = match.end()
    ends.append(at)
  return np.array(ends, np.int64)


def covered_ends(spans: Spans) -> np.ndarray:
  """Returns ends by the bytes that tokens cover, never within a character.

  Of several tokens that share a character, all but the last end before it.
  """
  ends = np.array(spans.ends, np.int64)
  later = np.minimum.accumulate(np.array(spans.begins, np.int64)[::-1])[::-1]
  ends[:-1] = np.minimum(ends[:-1], later[1:])
  return np.maximum.accumulate(ends)


def _flat(step: dict | None, key: str) -> list[dict]:
  if step is None:
    return []
  if step["type"] != "Sequence":
    return [step]
  return [leaf for inner in step[key] for leaf in _flat(inner, key)]


def _is_spaces(step: dict) -> bool:
  """Returns whether `_spaces` follows a step of a decoder."""
  match step["type"]:
    case "Replace":
      return (step["pattern"], step["content"]) == ({"String": SPACE}, " ")
    case "Strip":
      return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)
    case "Metaspace":
      return step["replacement"] == SPACE
  return step["type"] in ("ByteFallback", "Fuse")


def _byte_level(pieces: Iterable[str]) -> list[bytes]:
  """Bytes of pieces in GPT-2's alphabet, one character for each byte."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  alphabet = {chr(byte): byte for byte in printable}
  alphabet |= {chr(256 + i): byte for i, byte in enumerate(others)}
  # An added token that is not spelled in the alphabet is itself.
  return [
    bytes(alphabet[c] for c in piece)
    if all(c in alphabet for c in piece)
    else piece.encode()
    for piece in pieces
  ]


def _spaces(pieces: Iterable[str], has_bytes: bool) -> list[bytes]:
  texts = (piece.replace(SPACE, " ").encode() for piece in pieces)
  return [_byte(text) if has_bytes else text for text in texts]


def _byte(text: bytes) -> bytes:
  """The byte that <0x..> stands for; any other text as it is."""
  match = _BYTE.fullmatch(text.decode())
  return bytes.fromhex(match[1]) if match else text
