"""A thread that decodes the texts of many clients in one batch.

Requests wait in a queue of bounded length, get one of a fixed number of rows,
and leave it when they end: rows enter and leave between two chunks of tokens.
"""

import collections
import logging
import threading
import time
from collections.abc import Sequence

import jax

from calm_jax.composition.model import Model
from calm_jax.core.errors import InputError
from calm_jax.generation import batching
from calm_jax.generation.sampling import RowSampler
from calm_jax.serving.metrics import Metrics
from calm_jax.serving.row_batch import MOST_STOPS, Chunk, RowBatch
from calm_jax.serving.tickets import (
  QueueFull,
  ServerFailed,
  ServingLimits,
  TextRequest,
  Ticket,
)

_log = logging.getLogger(__name__)


class Engine:
  """Decodes for `submit`, from any thread, until it is closed.

  `is_warm` compiles the programs that short texts need before it begins.
  """

  def __init__(
    self,
    model: Model,
    limits: ServingLimits,
    metrics: Metrics,
    is_warm: bool = False,
  ):
    self.model, self.limits, self.metrics = model, limits, metrics
    self.failure: Exception | None = None
    self._batch = RowBatch(model, limits.rows, limits.chunk)
    if is_warm:
      self._batch.warm_up()
    self._rows: list[Ticket | None] = [None] * self._batch.rows
    self._waiting: collections.deque[Ticket] = collections.deque()
    self._changed = threading.Condition()
    self._is_closed = False
    self._thread = threading.Thread(target=self._run, name="engine")
    self._thread.daemon = True
    self._thread.start()

  def check(self, request: TextRequest) -> None:
    """Raises InputError for a request that no row can take."""
    most = self.limits.new_tokens
    if not 0 < request.max_new_tokens <= most:
      raise InputError(
        f"max_tokens={request.max_new_tokens} must be from 1 to {most}, the "
        "limit of this server"
      )
    if len(request.stop_ids) > MOST_STOPS:
      raise InputError(f"more than {MOST_STOPS} tokens end an answer")
    RowSampler.of([request.sampler])
    batching.check_rows(
      self.model, [request.ids], "prompt", request.max_new_tokens
    )
    if self.model.tokenizers:  # Raises if one would read too many tokens.
      next(batching.batches(self.model, [request.ids], [len(request.ids)], 1))

  def submit(self, tickets: Sequence[Ticket]) -> None:
    """Queues all of these, or none.

    Raises QueueFull if too many wait, InputError for what no row can take, and
    ServerFailed.
    """
    for ticket in tickets:
      self.check(ticket.request)
    with self._changed:
      if self.failure is not None or self._is_closed:
        raise ServerFailed(f"the server has stopped: {self.failure}")
      if len(self._waiting) + len(tickets) > self.limits.queue:
        self.metrics.refused.add()
        raise QueueFull(f"{len(self._waiting)} requests wait already")
      self._waiting.extend(tickets)
      self._changed.notify()

  @property
  def waiting(self) -> int:
    return len(self._waiting)

  @property
  def running(self) -> int:
    return sum(ticket is not None for ticket in self._rows)

  def close(self) -> None:
    """Ends all answers, as cancelled, and the thread."""
    with self._changed:
      self._is_closed = True
      self._changed.notify()
    self._thread.join()

  def _run(self) -> None:
    try:
      while self._wait():
        self._drop()
        self._admit()
        if self.running:
          self._decode()
    except Exception as error:  # Clients would wait for a dead thread.
      _log.exception("the engine has failed")
      self.failure = error
    with self._changed:
      self._is_closed = True
      left = [*self._waiting, *filter(None, self._rows)]
      self._waiting.clear()
    for ticket in left:
      self._finish(ticket, "error" if self.failure else "cancelled")
    self._rows = [None] * len(self._rows)
    self._batch.clear()

  def _wait(self) -> bool:
    """Sleeps while there is nothing to do; False once closed."""
    with self._changed:
      while not (self._is_closed or self._waiting or self.running):
        self._batch.clear()
        self._changed.wait()
      return not self._is_closed

  def _drop(self) -> None:
    """Ends what was cancelled or took too long, in rows and in the queue."""
    now = time.monotonic()

    def reason(ticket: Ticket) -> str | None:
      if ticket.is_cancelled:
        return "cancelled"
      late = now - ticket.begun > self.limits.seconds
      return "timeout" if late else None

    with self._changed:
      ended = [ticket for ticket in self._waiting if reason(ticket)]
      for ticket in ended:
        self._waiting.remove(ticket)
    for ticket in ended:
      self._finish(ticket, reason(ticket) or "timeout")
    leaving = {
      row: why
      for row, ticket in enumerate(self._rows)
      if ticket is not None and (why := reason(ticket))
    }
    self._leave(leaving)

  def _leave(self, reasons: dict[int, str]) -> None:
    """Frees rows; their clients learn why."""
    if not reasons:
      return
    self._batch.leave(list(reasons))
    for row, why in reasons.items():
      ticket, self._rows[row] = self._rows[row], None
      if ticket is not None:
        self._finish(ticket, why)

  def _finish(self, ticket: Ticket, reason: str) -> None:
    whole = time.monotonic() - ticket.begun
    self.metrics.ended(reason, ticket.first, whole)
    try:
      ticket.end(reason, ticket.error or self.failure)
    except Exception:  # Neither are others to suffer from it, nor the thread.
      _log.exception("the end of an answer was not delivered")

  def _admit(self) -> None:
    """Reads the prompts of waiting requests, as many as there are free rows."""
    free = [row for row, ticket in enumerate(self._rows) if ticket is None]
    with self._changed:
      count = min(len(free), len(self._waiting))
      entering = [self._waiting.popleft() for _ in range(count)]
      for row, ticket in zip(free, entering, strict=False):
        self._rows[row] = ticket
    if not entering:
      return
    for ticket in entering:
      self.metrics.prompt_tokens.add(len(ticket.request.ids))
    self._enter(dict(zip(free, entering, strict=False)))

  def _enter(self, tickets: dict[int, Ticket]) -> None:
    """Reads prompts into rows; ends the answers to those that take more memory
    than there is, as `RowBatch.enter` finds before it changes a row."""
    requests = [ticket.request for ticket in tickets.values()]
    try:
      for places, chunk in self._batch.enter(requests, list(tickets)):
        self._deliver(places, chunk)
      return
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      _log.warning("a prompt does not fit into memory: %s", error)
    # The error, which is gone here, kept what was read.
    rows = ((row, ticket) for row, ticket in tickets.items() if not ticket.made)
    left = [row for row, ticket in rows if self._rows[row] is ticket]
    if len(left) > 1:  # Each of them alone may fit.
      for row in left:
        self._enter({row: tickets[row]})
      return
    for row in left:
      count = len(tickets[row].request.ids)
      tickets[row].error = InputError(
        f"this server's memory is not enough for a prompt of {count} tokens"
      )
    self._leave(dict.fromkeys(left, "error"))

  def _decode(self) -> None:
    """Makes a chunk of tokens in all rows."""
    live = {row: row for row, ticket in enumerate(self._rows) if ticket}
    is_told = any(ticket and ticket.request.tops for ticket in self._rows)
    self._deliver(live, self._batch.advance(is_told))

  def _deliver(self, places: dict[int, int], chunk: Chunk) -> None:
    """Gives rows their tokens, and frees those whose answers end by them."""
    reasons: dict[int, str] = {}
    for row, place in places.items():
      ticket = self._rows[row]
      assert ticket is not None
      new, reason = chunk.read(place, ticket.left)
      ticket.made += len(new.ids)
      if new.ids and ticket.first is None:
        ticket.first = time.monotonic() - ticket.begun
      self.metrics.new_tokens.add(len(new.ids))
      is_enough = False
      try:
        is_enough = ticket.receive(new)
      except Exception as error:
        _log.exception("an answer was not delivered")
        ticket.error = error
      if ticket.error is not None:
        reasons[row] = "error"
      elif is_enough:
        reasons[row] = "stop"
      elif reason is not None:
        reasons[row] = reason
    self._leave(reasons)
