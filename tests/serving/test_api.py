"""OpenAI's API over a socket, asked by OpenAI's own client."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import sys
import threading
import time
from pathlib import Path

import chats
import pytest

import calm_jax
from calm_jax import cli, serve
from calm_jax.core.errors import InputError
from calm_jax.generation import decode, scoring
from calm_jax.generation.sampling import Sampler
from calm_jax.serving.answers import Answer
from calm_jax.serving.engine import Engine
from calm_jax.serving.metrics import Metrics
from calm_jax.serving.tickets import NewTokens, ServingLimits
from calm_jax.text.chat import encode_prompt, frame

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

LIMITS = ServingLimits(rows=4, queue=70, new_tokens=200, chunk=4)
TALK = [{"role": "user", "content": "the cat"}]
PROMPTS = ["the cat", "once", "12", "x"]
HOT = 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return chats.save_model(tmp_path_factory.mktemp("models") / "m", "llama_3")


@pytest.fixture(scope="module")
def model(folder):
  return calm_jax.load_model(folder)


def drawn(model, prompts: list[str], new: int, seeds: list[int]) -> list[str]:
  """What `generate` makes; always of as many prompts, to compile less."""
  spare = len(PROMPTS) - len(prompts)
  prompts, seeds = prompts + ["x"] * spare, seeds + [0] * spare
  made = model.generate(prompts, new, temperature=HOT, seed=seeds)
  return made[: len(made) - spare]


class Served:
  """A server in a thread of the test, and clients of it."""

  def __init__(self, model, limits, key=None):
    from calm_jax.serving.api import Api

    self.engine = Engine(model, limits, Metrics())
    app = Api(model, self.engine, "tiny", key, most_bytes=50_000).app()
    config = uvicorn.Config(app, port=0, log_level="error")
    self.server = uvicorn.Server(config)
    self.thread = threading.Thread(target=self.server.run)
    self.thread.start()
    while not self.server.started:
      time.sleep(0.01)
    [listening] = self.server.servers
    port = listening.sockets[0].getsockname()[1]
    self.url = f"http://127.0.0.1:{port}"

  def client(self, key="none"):
    return openai.OpenAI(
      base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=240
    )

  def close(self):
    self.server.should_exit = True
    self.thread.join()


@pytest.fixture(scope="module")
def served(model):
  served = Served(model, LIMITS)
  yield served
  served.close()


def test_completions_are_what_generate_makes(model, served):
  complete = served.client().completions.create
  want = model.generate(PROMPTS[:2], 12)
  got = complete(model="tiny", prompt=PROMPTS[:2], max_tokens=12, temperature=0)
  assert [choice.text for choice in got.choices] == want
  assert {choice.finish_reason for choice in got.choices} <= {"length", "stop"}
  read = sum(len(model.tokenizer.encode_prompt(p)) for p in PROMPTS[:2])
  assert got.usage.prompt_tokens == read
  assert got.usage.total_tokens == read + got.usage.completion_tokens
  got = complete(
    model="tiny", prompt="once", max_tokens=12, temperature=HOT, seed=3, n=2
  )
  want = drawn(model, ["once"] * 2, 12, [3, 4])
  assert [choice.text for choice in got.choices] == want
  assert want[0] != want[1]


def test_a_stream_is_the_whole_in_pieces(model, served):
  client = served.client()
  [want] = drawn(model, ["once"], 30, [5])
  stop = want[8:10]
  options = {"model": "tiny", "max_tokens": 30, "temperature": HOT, "seed": 5}
  whole = client.completions.create(prompt="once", stop=stop, **options)
  events = client.completions.create(
    prompt="once", stop=stop, stream=True,
    stream_options={"include_usage": True}, **options,
  )  # fmt: skip
  *events, last = events
  text = "".join(event.choices[0].text for event in events)
  assert text == whole.choices[0].text == want[: want.index(stop)]
  assert events[-1].choices[0].finish_reason == "stop"
  assert last.usage == whole.usage


def test_a_chat_answers_by_the_template(model, served):
  create = served.client().chat.completions.create
  want = model.generate(
    messages=TALK, max_new_tokens=20, temperature=HOT, seed=2
  )
  options = {
    "model": "tiny", "messages": TALK, "max_completion_tokens": 20,
    "temperature": HOT, "seed": 2,
  }  # fmt: skip
  prompt = encode_prompt(model.tokenizer, TALK)
  got = create(**options, logprobs=True, top_logprobs=3).choices[0]
  assert got.message.content == want
  assert got.message.role == "assistant"
  for token in got.logprobs.content:
    tops = [top.logprob for top in token.top_logprobs]
    assert len(tops) == 3 and tops == sorted(tops, reverse=True)
    assert token.logprob <= tops[0] <= 0
  [new] = decode.generate(
    model, [prompt], max_new_tokens=20, sampler=Sampler(HOT), seeds=[2],
    stop_ids=frame(model.tokenizer).stop_ids,
  )  # fmt: skip
  [score] = scoring.score(model, [prompt], [new])
  told = sum(token.logprob for token in got.logprobs.content)
  assert told == pytest.approx(score.logprob, abs=1e-3)
  events = list(create(**options, stream=True))
  assert events[0].choices[0].delta.role == "assistant"
  pieces = [event.choices[0].delta.content or "" for event in events]
  assert "".join(pieces) == want


def test_the_page_says_how_to_ask(model, served, capsys):
  page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
  [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  block = block.replace("http://127.0.0.1:8000", served.url)
  block = block.replace('"mine", ', '"tiny", max_tokens=9, temperature=0, ')
  block = block.replace("Hello", "the cat")
  exec(block, {})
  want = model.generate(messages=TALK, max_new_tokens=9)
  assert capsys.readouterr().out == want


def test_sixty_four_clients_get_what_each_gets_alone(model, served):
  want = {n: drawn(model, PROMPTS, n, [1] * 4) for n in range(1, 11)}
  client = served.client()

  def ask(i: int) -> tuple[str, str]:
    p, new = i % len(PROMPTS), 1 + i // len(PROMPTS) % 10
    got = client.completions.create(
      model="tiny", prompt=PROMPTS[p], max_tokens=new, temperature=HOT, seed=1
    )
    return got.choices[0].text, want[new][p]

  with concurrent.futures.ThreadPoolExecutor(64) as pool:
    for got, wanted in pool.map(ask, range(64)):
      assert got == wanted
  assert served.engine.running == served.engine.waiting == 0


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_frees_its_row(served, is_streamed):
  before = served.engine.metrics.requests.get("cancelled", 0)
  body = {
    "model": "tiny", "prompt": "once", "max_tokens": 200, "n": 6,
    "stream": is_streamed,
  }  # fmt: skip
  url = f"{served.url}/v1/completions"
  if is_streamed:
    with httpx.stream("POST", url, json=body, timeout=60) as response:
      next(response.iter_lines())
  else:
    with pytest.raises(httpx.ReadTimeout):
      httpx.post(url, json=body, timeout=httpx.Timeout(60, read=0.05))
  until = time.monotonic() + 60
  while served.engine.running or served.engine.waiting:
    assert time.monotonic() < until
    time.sleep(0.01)
  assert served.engine.metrics.requests["cancelled"] > before


WRONG = {
  "not JSON": ("{", 400, "is not JSON"),
  "a list": ("[]", 400, "no.* object"),
  "another model": ('{"model": "gpt", "prompt": "a"}', 404, "no model 'gpt'"),
  "unknown": ('{"model": "tiny", "prompt": "a", "x": 1}', 400, "'x'"),
  "penalty": (
    '{"model": "tiny", "prompt": "a", "presence_penalty": 1}', 400,
    "presence_penalty=1 is not supported",
  ),
  "too many": (
    '{"model": "tiny", "prompt": "a", "max_tokens": 201}', 400, "1 to 200"
  ),
  "too hot": (
    '{"model": "tiny", "prompt": "a", "temperature": 3}', 400, "0 to 2"
  ),
  "no prompt": ('{"model": "tiny"}', 400, "prompt must be"),
  "long": (f'{{"model": "tiny", "prompt": "{"a" * 60_000}"}}', 413, "bytes"),
  "many": (
    '{"model": "tiny", "n": 8, "prompt": [[1]' + ", [1]" * 9_000 + "]}", 400,
    "9001 texts; with n this server takes 8 at once",
  ),
  "k": (
    '{"model": "tiny", "prompt": "a", "top_k": 2147483648}', 400, "top_k"
  ),
  "long stop": (
    f'{{"model": "tiny", "prompt": "a", "stop": "{"a" * 1025}"}}', 400,
    "1025 characters",
  ),
  "bad id": ('{"model": "tiny", "prompt": [99999]}', 400, "token ids"),
}  # fmt: skip


def test_what_is_wrong_is_refused_by_name(served):
  for body, status, message in WRONG.values():
    got = httpx.post(f"{served.url}/v1/completions", content=body)
    assert got.status_code == status, body[:80]
    assert re.search(message, got.json()["error"]["message"])
  client = served.client()
  with pytest.raises(openai.BadRequestError, match="content"):
    client.chat.completions.create(model="tiny", messages=[{"role": "user"}])
  assert client.models.list().data[0].id == "tiny"
  assert client.models.retrieve("tiny").id == "tiny"


def test_the_text_behind_a_long_prompt_is_what_the_whole_adds(model):
  tokenizer = model.tokenizer
  ids = tokenizer.encode_prompt("the cat \u00e9\u20ac " * 20)
  for end in range(len(ids) - 9, len(ids)):  # some within a character
    pieces = []
    answer = Answer(tokenizer, ids[:end], [], False, pieces.append)
    answer.receive(NewTokens(ids[end:], [], []))
    answer.end("length", None)
    want = tokenizer.decode_continuation(ids[:end], ids[end:])
    assert "".join(piece.text for piece in pieces) == want


def test_what_nobody_foresaw_is_an_error_in_json(served, monkeypatch):
  monkeypatch.setattr(served.engine, "check", None)
  with pytest.raises(openai.InternalServerError) as caught:
    served.client().completions.create(model="tiny", prompt="a")
  assert caught.value.body["message"].startswith("the server failed")


def test_a_key_may_have_any_letters(model, served):
  from starlette.requests import Request

  from calm_jax.serving.api import Api, Refused

  api = Api(model, served.engine, "tiny", "Schlüssel")
  for key, is_right in (("Schlüssel", True), ("Schlussel", False)):
    headers = [(b"authorization", f"Bearer {key}".encode())]
    request = Request({"type": "http", "headers": headers})
    with contextlib.nullcontext() if is_right else pytest.raises(Refused):
      api._check_key(request)


def test_a_key_is_asked_for_and_a_full_queue_says_so(model):
  served = Served(model, ServingLimits(rows=1, queue=2, chunk=2), "secret")
  try:
    with pytest.raises(openai.AuthenticationError):
      served.client("wrong").models.list()
    client = served.client("secret")
    assert client.models.list().data
    create = client.completions.create
    options = {"model": "tiny", "prompt": "once", "max_tokens": 400}
    streams = [create(**options, n=2, stream=True)]
    with pytest.raises(openai.RateLimitError):
      for _ in range(3):
        streams.append(create(**options, n=2, stream=True))
    for stream in streams:
      stream.close()
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{served.url}/metrics").text
    assert "calm_jax_refused_total 1\n" in metrics
    assert 'calm_jax_first_token_seconds_bucket{le="+Inf"}' in metrics
  finally:
    served.close()


def test_the_command_listens_on_this_machine_only(
  folder, tmp_path, monkeypatch
):
  told = {}
  monkeypatch.setattr(cli, "keep_compiled_programs", lambda: None)
  monkeypatch.setattr(
    uvicorn, "run", lambda app, **options: told.update(options)
  )
  key = tmp_path / "key"
  key.write_text("\n")
  command = ["serve", f"--model={folder}", "--port=1234"]
  monkeypatch.setattr(sys, "argv", command)
  serve.main()
  assert (told["host"], told["port"]) == ("127.0.0.1", 1234)
  monkeypatch.setattr(sys, "argv", [*command, f"--api_key_file={key}"])
  with pytest.raises(InputError, match="holds no key"):
    serve.main()
  monkeypatch.setattr(sys, "argv", [*command, "--rows=0"])
  with pytest.raises(InputError, match="rows=0 must be"):
    serve.main()
