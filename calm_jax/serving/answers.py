"""An answer's tokens as the text that its client gets, a piece at a time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from calm_jax.serving.tickets import NewTokens
from calm_jax.text import chat, stop_strings
from calm_jax.text.tokenizer import Tokenizer

_BEFORE = 64  # tokens of the prompt, on which the text of later ones depends


class Token(NamedTuple):
  """A token with its log-probability in nats, and those of likelier ones."""

  spelled: bytes
  logprob: float
  likeliest: list[tuple[bytes, float]]


class TextPiece(NamedTuple):
  """The next part of an answer; the last one says why it ended."""

  text: str
  tokens: list[Token]  # empty unless log-probabilities were asked for
  reason: str | None = None
  error: Exception | None = None


class Answer:
  """Turns tokens into pieces, and ends at a stop string.

  `receive` and `end` are those of a `Ticket`. An answer ends with the token
  that completes a stop string, wherever chunks of tokens begin and end.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    stop: Sequence[str],
    is_chat: bool,
    emit: Callable[[TextPiece], None],
  ):
    self.ids: list[int] = []
    # All of a long one would be decoded at each chunk.
    self._tokenizer, self._prompt_ids = tokenizer, prompt_ids[-_BEFORE:]
    self._stop, self._is_chat, self._emit = stop, is_chat, emit
    self._sent = 0  # characters

  def receive(self, new: NewTokens) -> bool:
    before = len(self.ids)
    self.ids += new.ids
    text = self._text()
    is_stopped = stop_strings.find(text, self._stop) >= 0
    if is_stopped:
      counts = range(before + 1, len(self.ids) + 1)
      at = (
        n for n in counts if stop_strings.find(self._text(n), self._stop) >= 0
      )
      del self.ids[next(at) :]
      text = stop_strings.cut(self._text(), self._stop)
    settled = stop_strings.settled_length(text, self._stop)
    tokens = self._tokens(new, before)
    if settled > self._sent or tokens:
      self._emit(TextPiece(text[self._sent : settled], tokens))
      self._sent = max(settled, self._sent)
    return is_stopped

  def end(self, reason: str, error: Exception | None) -> None:
    text = stop_strings.cut(self._text(), self._stop)
    self._emit(TextPiece(text[self._sent :], [], reason, error))

  def _text(self, count: int | None = None) -> str:
    new = self.ids[:count]
    text = self._tokenizer.decode_continuation(self._prompt_ids, new)
    return chat.without_lead(self._tokenizer, text) if self._is_chat else text

  def _tokens(self, new: NewTokens, before: int) -> list[Token]:
    if not new.chosen:
      return []
    count = len(self.ids) - before
    previous = [*self._prompt_ids, *self.ids[:before]]
    out = []
    for i in range(count):
      chosen = self._spell(new.ids[i], previous)
      likeliest = [
        (self._spell(token, previous), value)
        for token, value in new.likeliest[i]
      ]
      out.append(Token(chosen, new.chosen[i], likeliest))
      previous.append(new.ids[i])
    return out

  def _spell(self, token: int, previous: list[int]) -> bytes:
    """A token's bytes; the name of one that spells nothing."""
    [spelled] = self._tokenizer.spell([token], previous)
    pieces = self._tokenizer.pieces
    named = pieces[token] if token < len(pieces) else f"<{token}>"
    return spelled or named.encode()
