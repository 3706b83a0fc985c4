"""Requests for one text each, and how they stand with the engine."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from calm_jax.generation.sampling import GREEDY, Sampler


class QueueFull(RuntimeError):
  """As many requests wait as may; later ones are to be made again."""


class ServerFailed(RuntimeError):
  """The thread that decodes has ended with an error, or was closed."""


@dataclasses.dataclass(frozen=True)
class ServingLimits:
  """Bounds of what a server takes on, in rows, tokens and seconds."""

  rows: int = 16  # that are decoded together
  queue: int = 128  # rows that wait at most
  new_tokens: int = 4096  # of an answer at most
  seconds: float = 600.0  # from a request to the end of its answer
  chunk: int = 8  # tokens between which rows enter and leave


@dataclasses.dataclass(frozen=True)
class TextRequest:
  """One text to continue, and what it is continued by."""

  ids: list[int]
  max_new_tokens: int
  sampler: Sampler = GREEDY
  seed: int = 0
  stop_ids: Sequence[int] = ()
  tops: bool = False  # whether it is told log-probabilities


@dataclasses.dataclass(frozen=True)
class NewTokens:
  """Tokens of an answer, and log-probabilities if these were asked for."""

  ids: list[int]
  chosen: list[float]
  likeliest: list[list[tuple[int, float]]]


class Ticket:
  """A request on its way: it waits, has a row, or has ended.

  The engine's thread calls `receive(new_tokens)`, which returns True to end the
  answer, and once `end(reason, error)`: "stop", "length", "timeout",
  "cancelled" or "error". Neither is called again after that.
  """

  def __init__(
    self,
    request: TextRequest,
    receive: Callable[[NewTokens], bool],
    end: Callable[[str, Exception | None], None],
  ):
    self.request, self.receive, self.end = request, receive, end
    self.made = 0  # tokens that were received
    self.begun = time.monotonic()
    self.first: float | None = None  # seconds to the first token
    self.error: Exception | None = None  # that `receive` raised
    self.is_cancelled = False

  def cancel(self) -> None:
    """Lets the engine free the row before its next chunk; from any thread."""
    self.is_cancelled = True

  @property
  def left(self) -> int:
    return self.request.max_new_tokens - self.made
