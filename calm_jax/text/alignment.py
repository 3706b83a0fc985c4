"""Two tokenizers on one text: what an anchor token may see of the other's.

The first tokens of a text can depend on what follows it. So the augmenting
model reads the tokens of one chunk of the text after the other, and those of a
chunk become visible together when it is closed: at the byte at which it is
known where it ends. What an anchor token sees thus follows from the text up to
its own last byte, whether that text is finished or still being generated.

A chunk is a word with the whitespace before it, closed by the whitespace after
it; an ideograph or kana by itself, closed at once; or MAX_CHUNK characters of
anything longer. The end of a prompt closes a chunk too, unless that is nothing
but whitespace. The price: the augmenting model is up to a word behind, and
words longer than MAX_CHUNK get tokens that it would not have split them into.

    ends     e_t, the byte of the text at which anchor token t ends
    closes   the byte at which each token of the augmenting model is visible
    visible  how many of them have closes <= e_t (see `composition.visibility`)
"""

import codecs
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from calm_jax.text.tokenizer import Tokenizer

MAX_CHUNK = 16
_CACHED = 1 << 16
# Kana, ideographs, their compatibility forms and halfwidth kana.
_ALONE = re.compile(
  "[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
  "\uff66-\uff9d\U00020000-\U0003ffff]"
)


class Chunk(NamedTuple):
  """Bytes start .. end of a text, known to be a chunk at byte `close`."""

  text: str
  start: int
  end: int
  close: int


class Chunker:
  """Cuts a text that grows into chunks, in whatever pieces it arrives."""

  def __init__(self):
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self._read = 0  # bytes
    self._text, self._start, self._end = "", 0, 0  # of the open chunk

  def push(self, data: bytes) -> list[Chunk]:
    """Returns the chunks that more of the text closes.

    `data` may begin and end within a character; what is no UTF-8 is U+FFFD.
    """
    closed: list[Chunk] = []
    rest, _ = self._decoder.getstate()
    try:
      text = (rest + data).decode()
    except UnicodeDecodeError:
      # Byte by byte, to know at which of them each character is complete.
      for i in range(len(data)):
        self._read += 1
        for character in self._decoder.decode(data[i : i + 1]):
          self._add(character, closed)
      return closed
    self._decoder.reset()
    self._read -= len(rest)
    for character in text:
      self._read += 1 if character < "\x80" else len(character.encode())
      self._add(character, closed)
    return closed

  def cut(self) -> list[Chunk]:
    """Closes the open chunk where the text stands, as a prompt's end does.

    Whitespace stays open: it belongs to the word that follows.
    """
    if not self._text or self._text.isspace():
      return []
    return [self._close(self._end)]

  def _add(self, character: str, closed: list[Chunk]) -> None:
    """Reads one more character, which ends where the bytes read do."""
    alone = _ALONE.match(character) is not None
    ends_word = character.isspace() and not self._text[-1:].isspace()
    if self._text and (alone or ends_word):
      closed.append(self._close(self._read))
    self._text += character
    self._end = self._read
    if alone or len(self._text) == MAX_CHUNK:
      closed.append(self._close(self._read))

  def _close(self, close: int) -> Chunk:
    chunk = Chunk(self._text, self._start, self._end, close)
    self._text, self._start = "", self._end
    return chunk


class ChunkEncoder:
  """An augmenting model's tokens of chunks; remembers frequent ones."""

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self._remembered = functools.lru_cache(_CACHED)(self._tokens)

  def tokens(self, chunk: Chunk) -> tuple[int, ...]:
    """Returns the token ids of a chunk where it stands in its text."""
    return self._remembered(chunk.text, chunk.start == 0)

  def encode(
    self, prompt: str, completion: str
  ) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that a text makes visible, BOS first if there is one.

    The end of `prompt`, "" for plain text, closes a chunk. Returns (int64 [M]
    token ids, int64 [M] their closes), closes not decreasing.
    """
    chunker = Chunker()
    closed = [*chunker.push(prompt.encode()), *chunker.cut()]
    closed += chunker.push(completion.encode())
    ids = self.tokenizer.with_bos([])
    closes = [0] * len(ids)
    for chunk in closed:
      tokens = self.tokens(chunk)
      ids += tokens
      closes += [chunk.close] * len(tokens)
    return np.array(ids, np.int64), np.array(closes, np.int64)

  def _tokens(self, text: str, first: bool) -> tuple[int, ...]:
    encode = self.tokenizer.encode if first else self.tokenizer.encode_within
    return tuple(encode(text))


class AlignedReader:
  """An augmenting model's tokens for one text of the anchor's that grows.

  `ids` are all that the last token read may see, BOS first if there is one.
  """

  def __init__(self, anchor: Tokenizer, encoder: ChunkEncoder):
    self._anchor, self._encoder, self._chunker = anchor, encoder, Chunker()
    self._anchor_ids: list[int] = []
    self.ids = encoder.tokenizer.with_bos([])

  def read(
    self, ids: Sequence[int], prompt_length: int = 0
  ) -> tuple[list[int], list[int]]:
    """Reads more of the anchor's tokens; `self.ids`, and how many each sees.

    The end of the prompt, the first `prompt_length` of all, closes a chunk.
    Raises as `Tokenizer.spell`.
    """
    counts = []
    parts = self._anchor.spell(ids, previous=self._anchor_ids)
    for token, data in zip(ids, parts, strict=True):
      self._anchor_ids.append(token)
      closed = self._chunker.push(data)
      if len(self._anchor_ids) == prompt_length:
        closed += self._chunker.cut()
      for chunk in closed:
        self.ids += self._encoder.tokens(chunk)
      counts.append(len(self.ids))
    return self.ids, counts

  def push(self, token: int) -> list[int]:
    """Reads one more token of the anchor; returns what becomes visible."""
    before = len(self.ids)
    self.read([token])
    return self.ids[before:]


def prompt_ends(anchor: Tokenizer, prompt: str) -> tuple[list[int], np.ndarray]:
  """Returns an anchor's ids of a prompt, BOS first if any, and their ends.

  The last of them ends with the prompt, whatever its tokenizer drops there.
  Raises as `Tokenizer.byte_ends`.
  """
  ids, ends = anchor.byte_ends(prompt)
  with_bos = anchor.with_bos(ids)
  ends = np.pad(ends, (len(with_bos) - len(ids), 0))
  ends[-1:] = len(prompt.encode())
  return with_bos, ends


def align(ends_L: np.ndarray, closes_M: np.ndarray) -> np.ndarray:
  """Returns how many augmenting tokens each anchor token may see, int64 [L].

  `ends_L` are the bytes at which anchor tokens end (a BOS: 0), and `closes_M`
  those of `ChunkEncoder.encode`.
  """
  return np.searchsorted(closes_M, ends_L, side="right")
