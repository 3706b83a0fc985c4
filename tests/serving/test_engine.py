"""Rows that enter and leave a batch, against each text decoded alone."""

from __future__ import annotations

import dataclasses
import threading
import time

import helpers
import jax
import numpy as np
import pytest
import spelled

from calm_jax.composition.connections import Composition
from calm_jax.composition.model import Model
from calm_jax.core.errors import InputError
from calm_jax.generation import decode
from calm_jax.generation.sampling import RowSampler, Sampler
from calm_jax.serving.engine import Engine
from calm_jax.serving.metrics import Metrics
from calm_jax.serving.tickets import (
  QueueFull,
  ServerFailed,
  ServingLimits,
  TextRequest,
  Ticket,
)
from calm_jax.text import tokenizer as tokenizers
from calm_jax.text.alignment import AlignedReader, chunk_encoder

LIMITS = ServingLimits(rows=2, queue=16, new_tokens=80, seconds=300, chunk=2)
RANDOM = np.random.default_rng(0)
# Prompts of two buckets, texts that end at different times, and one longer than
# the first caches.
SIZES = [(5, 6), (1, 40), (16, 1), (40, 9), (9, 3)]
# Ids of characters; the tokenizer has BOS, EOS and others before them.
PROMPTS = [
  RANDOM.integers(4, spelled.VOCAB, length).tolist() for length, _ in SIZES
]
SAMPLERS = [
  *(Sampler(), Sampler(1.3), Sampler(0.7, top_k=5), Sampler(2.0, top_p=0.8)),
  *(Sampler(1.0, min_p=0.05), Sampler(), Sampler(1.0, 7, 0.9, 0.02)),
]
DRAWN = Sampler(1.3, top_k=9)


class Client:
  """A ticket whose answer is kept; it may cancel after some tokens."""

  def __init__(self, request: TextRequest, cancel_after: int = 1000):
    self.ids: list[int] = []
    self.chosen: list[float] = []
    self.likeliest: list = []
    self.reason, self.cancel_after = "", cancel_after
    self.ended = threading.Event()
    self.ticket = Ticket(request, self.receive, self.end)

  def receive(self, new) -> bool:
    self.ids += new.ids
    self.chosen += new.chosen
    self.likeliest += new.likeliest
    if len(self.ids) >= self.cancel_after:
      self.ticket.cancel()
    return False

  def end(self, reason, error) -> None:
    assert not self.ended.is_set()
    self.reason = reason
    self.ended.set()

  def wait(self) -> Client:
    assert self.ended.wait(240)
    return self


def run(engine: Engine, requests: list[TextRequest]) -> list[Client]:
  clients = [Client(request) for request in requests]
  engine.submit([client.ticket for client in clients])
  return [client.wait() for client in clients]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizers.train_sentencepiece(
    [spelled.ALPHABET], folder / "tokenizer", vocab_size=spelled.VOCAB
  )
  return tokenizers.load_tokenizer(folder)


def made(tokenizer, own: bool) -> Model:
  """One augmenting model reads on, one only prompts, both `own` tokens.

  Of its own ones the first can read 24.
  """
  spec, params = helpers.compose(
    ("reads", "encoder"), connections=((1, 1), (2, 2)), layers=(2, 2)
  )
  joined = dict(spec.augmenting)
  reads, encoder = joined.values()
  if own:
    config = dataclasses.replace(reads.config, max_length=24)
    reads = dataclasses.replace(reads, config=config)
  encoder = dataclasses.replace(encoder, visibility="encoder")
  spec = Composition(spec.anchor, (("reads", reads), ("encoder", encoder)))
  others = dict.fromkeys(joined, tokenizer) if own else {}
  return Model(spec, params, tokenizer, tokenizers=others)


@pytest.fixture(scope="module")
def model(tokenizer) -> Model:
  return made(tokenizer, False)


@pytest.fixture(scope="module")
def engine(model):
  engine = Engine(model, LIMITS, Metrics())
  yield engine
  engine.close()


@pytest.fixture(scope="module")
def greedy(model) -> list[list[int]]:
  """What `generate` makes of each prompt."""
  return decode.generate(model, PROMPTS, max_new_tokens=40, stop_ids=[-1])


def check_answers(
  model: Model, engine: Engine, chosen: list[int]
) -> list[list[int]]:
  """Asks for several texts at once; each must be what `generate` makes.

  Returns what `generate` makes of them with 40 tokens.
  """
  prompts, seeds = [PROMPTS[i] for i in chosen], chosen
  whole = decode.generate(
    model, prompts, max_new_tokens=40, sampler=DRAWN, seeds=seeds, stop_ids=[-1]
  )
  asked = [TextRequest(PROMPTS[i], SIZES[i][1], DRAWN, seed=i) for i in chosen]
  got = run(engine, asked)
  for client, ids, request in zip(got, whole, asked, strict=True):
    assert client.ids == ids[: request.max_new_tokens]
    assert client.reason == "length"
  assert len({tuple(client.ids) for client in got}) == len(got)
  assert engine.running == engine.waiting == 0
  return whole


def test_each_text_is_the_one_that_is_decoded_alone(model, engine):
  check_answers(model, engine, [0, 1, 2, 3, 4])


def test_models_with_tokens_of_their_own_follow_each_row(tokenizer):
  model = made(tokenizer, True)
  engine = Engine(model, LIMITS, Metrics())
  chosen = [0, 1, 2, 4]
  whole = check_answers(model, engine, chosen)
  # A text ends where one has read its limit.
  early = next(i for i, ids in zip(chosen, whole, strict=True) if len(ids) < 40)
  prompt = PROMPTS[early]
  [client] = run(engine, [TextRequest(prompt, 40, DRAWN, seed=early)])
  assert client.ids == whole[chosen.index(early)]
  assert client.reason == "length"
  read = AlignedReader(tokenizer, chunk_encoder(tokenizer))
  _, counts = read.read(prompt + client.ids, len(prompt))
  assert counts[-2] <= 24 < counts[-1]
  with pytest.raises(InputError, match="'reads' would read"):
    engine.check(TextRequest(PROMPTS[3], 1))
  engine.close()


def test_stop_tokens_are_those_of_the_row(greedy, engine):
  free = greedy[0][:6]
  stop = free[3]
  count = free.index(stop)
  stopped, other = run(
    engine,
    [
      TextRequest(PROMPTS[0], 6, stop_ids=[60, stop]),
      TextRequest(PROMPTS[0], 6),
    ],
  )
  assert (stopped.ids, stopped.reason) == (free[:count], "stop")
  assert (other.ids, other.reason) == (free, "length")


def test_a_client_that_cancels_frees_its_row_and_harms_nobody(greedy, engine):
  leaving = [Client(TextRequest(PROMPTS[4], 40), 3) for _ in range(5)]
  stays = Client(TextRequest(PROMPTS[1], 40))
  engine.submit([client.ticket for client in [*leaving, stays]])
  assert stays.wait().ids == greedy[1]
  for client in leaving:
    assert client.wait().reason == "cancelled"
    assert 3 <= len(client.ids) < 3 + 2 * LIMITS.chunk
  assert engine.metrics.requests["cancelled"] >= 5
  assert engine.running == 0


def test_what_is_refused(engine):
  with pytest.raises(InputError, match="max_tokens=81 must be from 1 to 80"):
    run(engine, [TextRequest([1], 81)])
  with pytest.raises(InputError, match="no tokens"):
    run(engine, [TextRequest([], 1)])
  with pytest.raises(InputError, match="repetition_penalty"):
    run(engine, [TextRequest([1], 1, Sampler(repetition_penalty=2.0))])


def test_the_queue_is_bounded(engine):
  busy = [Client(TextRequest([3], 80)) for _ in range(16)]
  engine.submit([client.ticket for client in busy])
  with pytest.raises(QueueFull):
    engine.submit([Client(TextRequest([3], 80)).ticket for _ in range(16)])
  for client in busy:
    client.ticket.cancel()
  assert {client.wait().reason for client in busy} == {"cancelled"}
  assert engine.metrics.refused.value == 1


def test_an_answer_that_takes_too_long_ends(engine):
  late = Client(TextRequest([3], 80))
  late.ticket.begun = time.monotonic() - 301
  engine.submit([late.ticket])
  assert late.wait().reason == "timeout"


def broken(*_, **__):
  raise OSError("broken")


def test_an_answer_that_cannot_be_delivered_harms_no_other(greedy, engine):
  first, second = (Client(TextRequest(PROMPTS[0], 4)) for _ in range(2))
  first.ticket.receive = broken
  engine.submit([first.ticket, second.ticket])
  assert first.wait().reason == "error"
  assert second.wait().reason == "length"
  assert second.ids == greedy[0][:4]


def test_a_prompt_that_no_memory_holds_is_refused_alone(
  greedy, engine, monkeypatch
):
  read = engine._batch._read

  def short_only(batch, requests):
    if any(len(request.ids) == len(PROMPTS[4]) for request in requests):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: none left")
    return read(batch, requests)

  monkeypatch.setattr(engine._batch, "_read", short_only)
  # The first two are read together; the third gets the row that this leaves.
  sizes = {1: 40, 4: 4, 0: 4}
  clients = [Client(TextRequest(PROMPTS[i], n)) for i, n in sizes.items()]
  engine.submit([client.ticket for client in clients])
  stays, long, beside = (client.wait() for client in clients)
  assert isinstance(long.ticket.error, InputError)
  assert (long.reason, long.ids) == ("error", [])
  assert (stays.ids, beside.ids) == (greedy[1], greedy[0][:4])
  assert engine.running == 0 and engine.failure is None


def test_an_error_of_the_engine_ends_all_answers(model):
  engine = Engine(model, LIMITS, Metrics())
  engine._batch.advance = broken
  clients = [Client(TextRequest([3], 4)) for _ in range(5)]
  engine.submit([client.ticket for client in clients])
  assert {client.wait().reason for client in clients} == {"error"}
  engine.close()
  with pytest.raises(ServerFailed, match="broken"):
    engine.submit([Client(TextRequest([3], 4)).ticket])


def test_rows_are_drawn_as_their_samplers_draw_alone():
  logits = np.round(RANDOM.standard_normal((7, 23)) * 4).astype(np.float32)
  keys = jax.random.split(jax.random.key(1), 7)
  rows = RowSampler.of(SAMPLERS)
  got = jax.jit(lambda rows: rows(keys, logits, None))(rows)
  want = [
    int(sampler(keys[i : i + 1], logits[i : i + 1], None)[0])
    for i, sampler in enumerate(SAMPLERS)
  ]
  assert got.tolist() == want
