"""Two tokenizers on one text: what an anchor token may see of the other's.

An augmenting model with other tokens reads the text that the anchor's token
ids spell (`Tokenizer.spell`), whatever they were made of. So it reads the same
in training, scoring and generation, and nothing where the anchor's tokens are
special (BOS, EOS, chat markers) or unknown.

The first tokens of a text can depend on what follows it. So the augmenting
model reads the tokens of one chunk of the text after the other, and those of a
chunk become visible together when it is closed: with the anchor token that
makes known where it ends. What an anchor token sees thus follows from the
tokens up to itself, whether the text is finished or still being generated.

A chunk is a word with the whitespace before it, closed by the whitespace after
it; an ideograph or kana by itself, closed at once; a digit, if the augmenting
model's tokenizer never joins two of them, with the whitespace before it, closed
at once too; or MAX_CHUNK characters of anything longer. The end of a prompt
closes a chunk too, unless that is nothing but whitespace. The price: the
augmenting model is up to a word behind, and words longer than MAX_CHUNK get
tokens that it would not have split them into.
"""

import codecs
import functools
import re
from collections.abc import Sequence

from calm_jax.text.tokenizer import Tokenizer

MAX_CHUNK = 16
_CACHED = 1 << 16
_DIGITS = "0123456789"
# Kana, ideographs, their compatibility forms and halfwidth kana.
_ALONE = re.compile(
  "[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
  "\uff66-\uff9d\U00020000-\U0003ffff]"
)


class Chunker:
  """Cuts a text that grows into chunks, in whatever pieces it arrives."""

  def __init__(self, digits_alone: bool = False):
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self._text = ""  # of the open chunk
    self._digits_alone = digits_alone

  def push(self, data: bytes) -> list[str]:
    """Returns the chunks that more of the text closes.

    `data` may begin and end within a character; what is no UTF-8 is U+FFFD.
    """
    closed: list[str] = []
    for character in self._decoder.decode(data):
      alone = _ALONE.match(character) is not None
      is_digit = self._digits_alone and character in _DIGITS
      begins_word = self._text[-1:].isspace()
      ends_word = not begins_word and (character.isspace() or is_digit)
      if self._text and (alone or ends_word):
        closed.append(self._close())
      self._text += character
      if alone or is_digit or len(self._text) == MAX_CHUNK:
        closed.append(self._close())
    return closed

  def cut(self) -> list[str]:
    """Closes the open chunk where the text stands, as a prompt's end does.

    Whitespace stays open: it belongs to the word that follows.
    """
    if not self._text or self._text.isspace():
      return []
    return [self._close()]

  def _close(self) -> str:
    text, self._text = self._text, ""
    return text


class ChunkEncoder:
  """An augmenting model's tokens of chunks; remembers frequent ones."""

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self.tokens = functools.lru_cache(_CACHED)(self._tokens)
    self.digits_alone = _splits_digits(tokenizer)

  def _tokens(self, chunk: str, first: bool) -> tuple[int, ...]:
    """The token ids of a chunk, which is the first of its text or a later one.

    A BOS that the text begins with is left out: the model has read one.
    """
    if not first:
      return tuple(self.tokenizer.encode_within(chunk))
    ids = self.tokenizer.encode_prompt(chunk)
    return tuple(ids[len(self.tokenizer.with_bos([])) :])


def _splits_digits(tokenizer: Tokenizer) -> bool:
  """Checks that no two digits ever share a token, with or without a space."""
  pairs = [a + b for a in _DIGITS for b in _DIGITS]
  return all(
    tokenizer.encode_within(before + pair)
    == tokenizer.encode_within(before + pair[0])
    + tokenizer.encode_within(pair[1])
    for before in ("", " ")
    for pair in pairs
  )


@functools.lru_cache(maxsize=16)
def chunk_encoder(tokenizer: Tokenizer) -> ChunkEncoder:
  """The encoder of a tokenizer, which all calls share with what it knows."""
  return ChunkEncoder(tokenizer)


class AlignedReader:
  """An augmenting model's tokens for one text of the anchor's that grows.

  `ids` are all that the last token read may see, BOS first if there is one.
  """

  def __init__(self, anchor: Tokenizer, encoder: ChunkEncoder):
    self._anchor, self._encoder = anchor, encoder
    self._chunker = Chunker(encoder.digits_alone)
    self._anchor_ids: list[int] = []
    self._is_first = True  # whether no chunk is closed yet
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
        self.ids += self._encoder.tokens(chunk, self._is_first)
        self._is_first = False
      counts.append(len(self.ids))
    return self.ids, counts

  def push(self, token: int) -> list[int]:
    """Reads one more token of the anchor; returns what becomes visible."""
    before = len(self.ids)
    self.read([token])
    return self.ids[before:]
