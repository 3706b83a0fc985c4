"""The server's addresses: OpenAI's API, /health and /metrics.

Each request becomes tickets of the engine, whose thread hands pieces of the
answers to the event loop here. Clients that leave cancel their tickets.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
  JSONResponse,
  PlainTextResponse,
  Response,
  StreamingResponse,
)
from starlette.routing import Route

from calm_jax.composition.model import Model
from calm_jax.core.errors import LARGEST_SEED, InputError
from calm_jax.serving import protocol
from calm_jax.serving.answers import Answer, TextPiece, Token
from calm_jax.serving.engine import Engine
from calm_jax.serving.protocol import ApiRequest, Writer
from calm_jax.serving.tickets import (
  QueueFull,
  ServerFailed,
  TextRequest,
  Ticket,
)

_log = logging.getLogger(__name__)

_ENDS = {"stop", "length"}  # of an answer that is whole
_FAILURES = {
  "timeout": (504, "the answer took longer than this server allows"),
  "cancelled": (503, "the server is shutting down"),
  "error": (500, "the server failed; its log says why"),
}


class Refused(Exception):
  """A request that gets an error: HTTP's status, message and kind."""

  def __init__(self, status: int, message: str, kind: str):
    super().__init__(message)
    self.status, self.message, self.kind = status, message, kind

  def body(self) -> dict:
    return protocol.error_body(self.message, self.kind)


@dataclasses.dataclass
class Exchange:
  """The answers to one request, on their way."""

  asked: ApiRequest
  tickets: list[Ticket]
  answers: list[Answer]
  pieces: asyncio.Queue[tuple[int, TextPiece]]

  def cancel(self) -> None:
    for ticket in self.tickets:
      ticket.cancel()

  async def each(self) -> AsyncIterator[tuple[int, TextPiece]]:
    """Yields (choice, piece) until all have ended; raises if one fails, so
    that the caller cancels the others."""
    left = len(self.tickets)
    while left:
      i, piece = await self.pieces.get()
      if piece.reason is not None:
        left -= 1
        if piece.reason not in _ENDS:
          if isinstance(piece.error, InputError):
            raise piece.error
          raise Refused(*_FAILURES[piece.reason], piece.reason)
      yield i, piece

  def usage(self) -> dict[str, int]:
    read = sum(map(len, self.asked.prompts))
    return protocol.usage(read, sum(len(a.ids) for a in self.answers))


class Api:
  """Answers requests by an engine, under the model's `name`."""

  def __init__(
    self,
    model: Model,
    engine: Engine,
    name: str,
    api_key: str | None = None,
    most_bytes: int = 4 << 20,
  ):
    self._model, self._engine, self._name = model, engine, name
    self._key, self._most_bytes = api_key, most_bytes

  def app(self) -> Starlette:
    """The application that a server of ASGI runs."""

    def route(path: str, handler: Handler, method: str, is_open=False) -> Route:
      return Route(path, self._guarded(handler, is_open), methods=[method])

    return Starlette(
      routes=[
        route("/v1/completions", self._completions, "POST"),
        route("/v1/chat/completions", self._chat, "POST"),
        route("/v1/models", self._models, "GET"),
        route("/v1/models/{name:path}", self._one_model, "GET"),
        route("/health", self._health, "GET", True),
        route("/metrics", self._metrics, "GET", True),
      ],
      lifespan=self._lifespan,
    )

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    yield
    await run_in_threadpool(self._engine.close)

  def _guarded(self, handler: "Handler", is_open: bool) -> "Handler":
    """Asks for the key, and turns errors into responses."""

    async def guarded(request: Request) -> Response:
      headers = {}
      try:
        if not is_open:
          self._check_key(request)
        return await handler(request)
      except InputError as error:
        refused = _wrong(error)
      except QueueFull as error:
        refused = Refused(429, str(error), "rate_limit_exceeded")
        headers = {"Retry-After": "1"}
      except ServerFailed as error:
        refused = Refused(503, str(error), "server_error")
      except ClientDisconnect:
        refused = Refused(499, "the client has left", "cancelled")
      except Refused as error:
        refused = error
      except Exception:  # Clients read JSON, whatever happens.
        _log.exception("a request has failed")
        refused = Refused(*_FAILURES["error"], "server_error")
      return JSONResponse(refused.body(), refused.status, headers)

    return guarded

  def _check_key(self, request: Request) -> None:
    if self._key is None:
      return
    given = request.headers.get("authorization", "")
    want = f"Bearer {self._key}"
    if not hmac.compare_digest(given.encode("latin-1"), want.encode()):
      raise Refused(401, "the API key is missing or wrong", "invalid_api_key")

  async def _body(self, request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
      body += part
      if len(body) > self._most_bytes:
        raise Refused(
          413, f"more than {self._most_bytes} bytes", "request_too_large"
        )
    return bytes(body)

  async def _completions(self, request: Request) -> Response:
    return await self._answer(request, False)

  async def _chat(self, request: Request) -> Response:
    return await self._answer(request, True)

  async def _answer(self, request: Request, is_chat: bool) -> Response:
    body = await self._body(request)
    limits = self._engine.limits
    # Tokenizing may take long, and others are not to wait for it.
    asked = await run_in_threadpool(
      protocol.read, body, self._model, is_chat, limits
    )
    if asked.model != self._name:
      self._no_model(asked.model)
    exchange = await self._begin(asked)
    writer = Writer(asked, self._name)
    if asked.is_streamed:
      events = self._events(exchange, writer)
      return StreamingResponse(events, media_type="text/event-stream")
    return await self._whole(request, exchange, writer)

  async def _begin(self, asked: ApiRequest) -> Exchange:
    """Queues tickets for all answers to a request."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
    tickets, answers = [], []
    for p, prompt in enumerate(asked.prompts):
      for k in range(asked.n):
        i = p * asked.n + k

        def emit(piece: TextPiece, i: int = i) -> None:
          if not loop.is_closed():
            loop.call_soon_threadsafe(pieces.put_nowait, (i, piece))

        made = TextRequest(
          ids=prompt,
          max_new_tokens=asked.max_new_tokens,
          sampler=asked.sampler,
          seed=(asked.seed + i) % (LARGEST_SEED + 1),
          stop_ids=asked.stop_ids,
          tops=asked.tops is not None,
        )
        answer = Answer(
          self._model.text(), prompt, asked.stop, asked.is_chat, emit
        )
        answers.append(answer)
        tickets.append(Ticket(made, answer.receive, answer.end))
    await run_in_threadpool(self._engine.submit, tickets)  # It reads prompts.
    return Exchange(asked, tickets, answers, pieces)

  async def _whole(
    self, request: Request, exchange: Exchange, writer: Writer
  ) -> Response:
    """Waits for all answers; cancels them if the client leaves."""
    collecting = asyncio.create_task(_collected(exchange))
    leaving = asyncio.create_task(_has_left(request))
    try:
      await asyncio.wait(
        [collecting, leaving], return_when=asyncio.FIRST_COMPLETED
      )
      if not collecting.done():
        raise ClientDisconnect
      choices = collecting.result()
      return JSONResponse(writer.whole(choices, exchange.usage()))
    finally:
      exchange.cancel()
      collecting.cancel()
      leaving.cancel()

  async def _events(
    self, exchange: Exchange, writer: Writer
  ) -> AsyncIterator[str]:
    """The events of a stream; closing it cancels what has not ended."""
    try:
      if exchange.asked.is_chat:
        for i in range(len(exchange.tickets)):
          yield _event(writer.opening(i))
      async for i, piece in exchange.each():
        if piece.text or piece.tokens or piece.reason:
          yield _event(writer.chunk(i, *piece[:3]))
      if exchange.asked.tells_usage:
        yield _event(writer.closing(exchange.usage()))
    except Refused as error:
      yield _event(error.body())
    except InputError as error:
      yield _event(_wrong(error).body())
    finally:
      exchange.cancel()
    yield "data: [DONE]\n\n"

  async def _models(self, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [self._described()]})

  async def _one_model(self, request: Request) -> Response:
    name = request.path_params["name"]
    if name != self._name:
      self._no_model(name)
    return JSONResponse(self._described())

  def _described(self) -> dict:
    fields = {"id": self._name, "object": "model", "created": 0}
    return fields | {"owned_by": "calm_jax"}

  def _no_model(self, name: str) -> None:
    raise Refused(
      404, f"no model {name!r}; this is {self._name!r}", "model_not_found"
    )

  async def _health(self, request: Request) -> Response:
    if self._engine.failure is not None:
      raise Refused(503, "the engine has failed", "server_error")
    return JSONResponse({"status": "ok"})

  async def _metrics(self, request: Request) -> Response:
    engine = self._engine
    text = engine.metrics.text(engine.running, engine.waiting)
    return PlainTextResponse(text)


Handler = Callable[[Request], Awaitable[Response]]


async def _collected(exchange: Exchange) -> list[tuple[str, list[Token], str]]:
  """Waits for all answers: (text, tokens, reason) of each."""
  texts = [""] * len(exchange.tickets)
  tokens: list[list[Token]] = [[] for _ in texts]
  reasons = [""] * len(texts)
  async for i, piece in exchange.each():
    texts[i] += piece.text
    tokens[i] += piece.tokens
    reasons[i] = piece.reason or ""
  return list(zip(texts, tokens, reasons, strict=True))


async def _has_left(request: Request) -> None:
  while not await request.is_disconnected():
    await asyncio.sleep(0.25)


def _wrong(error: InputError) -> Refused:
  return Refused(400, str(error), "invalid_request_error")


def _event(data: dict) -> str:
  return f"data: {json.dumps(data)}\n\n"
