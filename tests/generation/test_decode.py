"""Generation, against a loop over full forward passes."""

from __future__ import annotations

import dataclasses
import itertools

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.composition import inference
from calm_jax.composition.connections import Composition
from calm_jax.composition.model import Model
from calm_jax.core.batch import plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.generation import batching, decode, decode_steps
from calm_jax.generation.sampling import Sampler
from calm_jax.models.rope import Rope

NEW = 6
RANDOM = np.random.default_rng(0)
# Of lengths on both sides of a bucket, and of one token.
PROMPTS = [
  RANDOM.integers(0, 61, length).tolist() for length in (5, 1, 16, 17, 9)
]


def compose(names=("kv",), connections=((1, 1), (2, 2)), **options):
  """A small composition: each program is compiled for these tests alone."""
  return helpers.compose(names, connections, layers=(2, 2), **options)


def made(kind: str):
  """(spec, params) of "single", "causal" or "encoder"."""
  if kind == "single":
    config, params = helpers.model(1, num_layers=2)
    return Composition(config), {"anchor": params}
  return compose(visibility=kind)


def naive(params, spec, prompt, new=NEW):
  """Greedy decoding without a cache: every token from a whole pass."""
  ids, length = list(prompt), 17 + NEW
  for _ in range(new):
    sequence = helpers.rows([np.array(ids), length - len(ids)], length=length)
    ends = jnp.full((1, length), len(prompt))
    logits = helpers.composed(params, spec, sequence, prompt_ends=ends)
    ids.append(int(logits[0, len(ids) - 1].argmax()))
  return ids[len(prompt) :]


def generate(params, spec, prompts=PROMPTS, stop_ids=(), **options):
  options = {"max_new_tokens": NEW} | options
  tokenizer = helpers.numbers(spec.anchor.vocab_size, stop_ids)
  return decode.generate(Model(spec, params, tokenizer), prompts, **options)


@pytest.mark.parametrize("kind", ["single", "causal", "encoder"])
def test_a_ragged_batch_equals_the_naive_loop(kind):
  spec, params = made(kind)
  want = [naive(params, spec, prompt) for prompt in PROMPTS]
  assert generate(params, spec) == want
  # What is compared says something: the continuations are not all alike.
  assert len({tuple(ids) for ids in want}) == len(PROMPTS)
  assert max(len(set(ids)) for ids in want) > 1


class Spelled:
  """A made-up tokenizer: anchor tokens up to a multiple of 3 are a word.

  A word of n tokens is n % 3 tokens of the augmenting model; what is not yet
  a word is held back.
  """

  def __init__(self):
    self.word: list[int] = []

  def push(self, token):
    self.word.append(token)
    if token % 3:
      return []
    word, self.word = self.word, []
    return [(sum(word) + i) % 61 for i in range(len(word) % 3)]

  def read(self, ids, prompt_length):
    out, counts = [], []
    for token in ids:
      out += self.push(token)
      counts.append(len(out))
    return out, counts


@pytest.fixture
def spelled(monkeypatch):
  """Makes a model, some of whose augmenting models read other tokens."""
  monkeypatch.setattr(batching, "AlignedReader", lambda *_: Spelled())
  monkeypatch.setattr(batching, "chunk_encoder", lambda _: None)

  def model(spec, params, own=()) -> Model:
    tokenizer = helpers.numbers(spec.anchor.vocab_size)
    others = dict.fromkeys(own, tokenizer)
    return Model(spec, params, tokenizer, tokenizers=others)

  return model


CASES = {
  "single": {"names": ()},
  "causal": {"names": ("kv",)},
  "encoder": {"names": ("kv",), "visibility": "encoder"},
  "noise": {"names": ("kv",), "control": "noise"},
  "positions": {"names": ("kv",), "positions": "rope"},
  "own and positions": {"names": ("kv",), "own": ("kv",), "positions": "rope"},
  "two models": {"names": ("kv", "code")},
  "own tokenizer": {"names": ("kv",), "own": ("kv",)},
  "own and encoder": {
    "names": ("kv",), "own": ("kv",), "visibility": "encoder"
  },
  "one of each": {"names": ("kv", "code"), "own": ("code",)},
  # Shorter than most prompts, and longer than all.
  "short windows": {"names": ("kv",), "own": ("kv",), "window": 3},
  "long windows": {"names": ("kv",), "window": 25},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_while_generating_are_those_of_the_finished_text(
  case, monkeypatch, spelled
):
  options = dict(CASES[case])
  own = options.pop("own", ())
  window = options.pop("window", None)
  spec, params = compose(options.pop("names"), **options)
  spec = helpers.retype(spec, window=window)
  new = 40  # long enough for an own tokenizer to outgrow its first cache
  seen: list[np.ndarray] = []
  # Steps of one token, so that the logits of each are seen.
  monkeypatch.setattr(decode, "CHUNK", 1)

  def watched(step):
    def run(*args, **kwargs):
      out = step(*args, **kwargs)
      state = out if isinstance(out, decode_steps.DecodeState) else out[0]
      seen.append(np.asarray(state.logits_BV))
      return out

    return run

  advance = watched(decode_steps.advance_on("cpu", params))
  monkeypatch.setattr(decode_steps, "start", watched(decode_steps.start))
  monkeypatch.setattr(decode_steps, "advance_on", lambda *_: advance)
  model = spelled(spec, params, own)
  got = decode.generate(model, PROMPTS, max_new_tokens=new)
  assert len(seen) == new
  order = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
  worst = 0.0
  for row, i in enumerate(order):
    ids = PROMPTS[i] + got[i]
    given = len(PROMPTS[i])
    [(_, batch, _)] = batching.batches(model, [ids], [given], 1)
    # The plain forward pass: nothing folded, cached or unstacked.
    full = helpers.composed(params, spec, *batch[:4])
    full = np.asarray(full)[0, -new - 1 : -1]
    cached = np.stack([s[row] for s in seen])
    worst = max(worst, np.abs(cached - full).max())
    assert got[i] == full.argmax(-1).tolist()
  assert worst < 1e-4


@pytest.mark.parametrize("case", ["one of each", "own and encoder", "rope"])
def test_joined_matrices_of_a_gpu_make_the_same_texts(case, spelled):
  options = dict(CASES.get(case) or CASES["positions"])
  own = options.pop("own", ())
  spec, params = compose(options.pop("names"), **options)
  spec = helpers.retype(spec, window=5, full_layers=(1,))
  model = spelled(spec, params, own)
  want = decode.generate(model, PROMPTS, max_new_tokens=8)
  spec, params = inference.prepare(spec, params, "joined")
  assert "transposed" in params["composition"]["kv"]["layer_1_to_1"]["query"]
  forced = spelled(spec, params, own)
  forced.__dict__["prepared"] = spec, params
  assert decode.generate(forced, PROMPTS, max_new_tokens=8) == want


def test_positions_that_depend_on_the_length_of_the_text():
  # Told from the longest text that there can be, which is what comes out.
  config, params = helpers.model(1)
  scaled = Rope(8, theta=100.0, kind="dynamic", factor=2.0, original_length=10)
  new = 30  # more slots than the original length, some texts shorter
  spec = Composition(dataclasses.replace(config, rope=scaled))
  got = generate({"anchor": params}, spec, max_new_tokens=new)
  for prompt, ids in zip(PROMPTS, got, strict=True):
    whole = plain_sequence(jnp.array([prompt + ids]))
    full = helpers.composed({"anchor": params}, spec, whole)
    assert ids == full[0, len(prompt) - 1 : -1].argmax(-1).tolist()
  plain = generate({"anchor": params}, Composition(config), max_new_tokens=new)
  assert plain != got


def test_a_text_ends_where_an_own_tokenizer_has_read_its_limit(spelled, caplog):
  spec, params = compose()
  joined = dict(spec.augmenting)["kv"]
  limited = dataclasses.replace(joined.config, max_length=10)
  limited = dataclasses.replace(joined, config=limited)
  model = spelled(spec, params, ["kv"])
  short = dataclasses.replace(
    model, spec=Composition(spec.anchor, (("kv", limited),))
  )
  whole = decode.generate(model, PROMPTS, max_new_tokens=40)
  readable = [p for p in PROMPTS if len(Spelled().read(p, 0)[0]) <= 10]
  got = dict(
    zip(
      map(tuple, readable),
      decode.generate(short, readable, max_new_tokens=40),
      strict=True,
    )
  )
  ends_early = 0
  for prompt, longer in zip(PROMPTS, whole, strict=True):
    if prompt not in readable:
      continue
    _, counts = Spelled().read(prompt + longer, 0)
    # The token that completes too much is the last one.
    most = sum(count <= 10 for count in counts) + 1 - len(prompt)
    assert got[tuple(prompt)] == longer[:most]
    ends_early += most < 40
  assert 0 < ends_early < len(readable)
  assert "has read its 10 tokens" in caplog.text
  with pytest.raises(InputError, match=r"'kv' would read .* limit is 10"):
    decode.generate(short, [PROMPTS[3] * 3], max_new_tokens=1)


def test_many_lengths_are_few_programs():
  spec, params = compose(names=("a",))  # shapes of no other test
  programs = decode_steps.start, decode_steps.advance_on("cpu", params)
  before = sum(program._cache_size() for program in programs)
  prompts = [[1 + i % 60] * (3 * i + 1) for i in range(32)]
  generate(params, spec, prompts, max_new_tokens=3, batch_size=8)
  after = sum(program._cache_size() for program in programs)
  assert 2 <= after - before <= 6


def test_weights_on_a_cpu_are_read_without_a_copy():
  config, params = helpers.model(1, width=64)
  layers = inference.prepare(Composition(config), {"anchor": params})[1][
    "anchor"
  ]["layers"]
  stack = params["layers"]["mlp"]["up"]["kernel"]
  for i, layer in enumerate(layers):
    kernel = layer["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, stack[i])
    offset = kernel.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer()
    assert offset == i * kernel.nbytes
  assert len(layers) == config.num_layers


def test_visibility_matters():
  # Else the test above would not notice which one is decoded with.
  spec, params = made("causal")
  encoder, _ = made("encoder")
  assert generate(params, spec) != generate(params, encoder)


def test_neighbours_and_padding_change_nothing(monkeypatch):
  spec, params = compose(connections=((2, 2),))
  want = generate(params, spec)
  assert generate(params, spec, PROMPTS[::-1]) == want[::-1]
  alone = [generate(params, spec, [prompt])[0] for prompt in PROMPTS]
  assert alone == want
  monkeypatch.setattr(batching, "SHORTEST", 64)
  assert generate(params, spec, batch_size=2) == want


def test_the_stop_token_ends_a_row_and_is_not_returned():
  spec, params = made("single")
  free = generate(params, spec)
  stop = free[0][2]
  want = [list(itertools.takewhile(lambda i: i != stop, r)) for r in free]
  assert len(want[0]) < NEW == max(map(len, want))
  assert generate(params, spec, stop_ids=[stop]) == want
  first = generate(params, spec, stop_ids=[61, free[1][0]])
  assert first[1] == []


def test_sampling_follows_the_seed():
  spec, params = made("single")
  greedy = generate(params, spec)
  samples = [
    generate(params, spec, sampler=Sampler(1.0), seeds=range(seed, seed + 5))
    for seed in (0, 0, 10)
  ]
  assert samples[0] == samples[1]
  assert samples[0] != samples[2]
  assert samples[0] != greedy
  # Rows draw independently of one another.
  same = generate(
    params, spec, [PROMPTS[0]] * 5, sampler=Sampler(1.0), seeds=range(5)
  )
  assert len({tuple(ids) for ids in same}) > 1


def test_prompts_that_cannot_be_continued():
  spec, params = made("single")
  limit = Model(spec, params).max_length
  with pytest.raises(InputError, match="prompt 1 has no tokens"):
    generate(params, spec, [[3], []])
  too_long = [3] * (limit - NEW + 1)
  with pytest.raises(InputError, match=rf"prompt 0 has {limit - NEW + 1} .*"):
    generate(params, spec, [too_long])


def test_a_prompt_of_the_longest_length_is_continued():
  # Shorter than the bucket would pad it to.
  config, params = helpers.model(1, max_length=21)
  spec, params = Composition(config), {"anchor": params}
  prompt = RANDOM.integers(0, 61, 21 - NEW).tolist()
  assert generate(params, spec, [prompt]) == [naive(params, spec, prompt)]


def test_the_limit_is_that_of_the_shortest_model():
  spec, _ = compose()
  shorter = helpers.retype(Composition(spec.anchor), max_length=10)
  limited = Composition(shorter.anchor, spec.augmenting)
  assert Model(limited, {}).max_length == 10
  augmenting = helpers.retype(spec, max_length=10).augmenting
  limited = Composition(spec.anchor, augmenting)
  assert Model(limited, {}).max_length == 10
  # Tokens of its own are counted for themselves.
  own = Model(limited, {}, tokenizers={"kv": helpers.numbers(61)})
  assert own.max_length == spec.anchor.max_length


def test_no_prompts():
  spec, params = made("single")
  assert generate(params, spec, []) == []
