"""Generation, against a loop over full forward passes."""

from __future__ import annotations

import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import composition, decode
from calm_jax.connections import Composition
from calm_jax.decode import Sampler
from calm_jax.errors import InputError

NEW = 6
RANDOM = np.random.default_rng(0)
# Of lengths on both sides of a bucket, and of one token.
PROMPTS = [
  RANDOM.integers(0, 61, length).tolist() for length in (5, 1, 16, 17, 9)
]


def made(kind: str):
  """(spec, params) of "single", "causal" or "encoder"."""
  if kind == "single":
    config, params = helpers.model(1)
    return Composition(config), {"anchor": params}
  return helpers.compose(visibility=kind)


def naive(params, spec, prompt, new=NEW):
  """Greedy decoding without a cache: every token from a whole pass."""
  ids, length = list(prompt), 17 + NEW
  for _ in range(new):
    sequence = helpers.rows([np.array(ids), length - len(ids)], length=length)
    visible = {
      name: composition.visible_tokens(
        joined.visibility, (1, length), jnp.full((1, length), len(prompt))
      )
      for name, joined in spec.augmenting
    }
    logits = helpers.composed(params, spec, sequence, visible=visible)
    ids.append(int(logits[0, len(ids) - 1].argmax()))
  return ids[len(prompt) :]


def generate(params, spec, prompts=PROMPTS, **options):
  options = {"max_new_tokens": NEW, "stop": None} | options
  return decode.generate(params, spec, prompts, **options)


@pytest.mark.parametrize("kind", ["single", "causal", "encoder"])
def test_a_ragged_batch_equals_the_naive_loop(kind):
  spec, params = made(kind)
  want = [naive(params, spec, prompt) for prompt in PROMPTS]
  assert generate(params, spec) == want
  # What is compared says something: the continuations are not all alike.
  assert len({tuple(ids) for ids in want}) == len(PROMPTS)
  assert max(len(set(ids)) for ids in want) > 1


def test_visibility_matters():
  # Else the test above would not notice which one is decoded with.
  spec, params = made("causal")
  encoder, _ = made("encoder")
  assert generate(params, spec) != generate(params, encoder)


def test_neighbours_and_padding_change_nothing(monkeypatch):
  spec, params = helpers.compose(connections=((3, 4),))
  want = generate(params, spec)
  assert generate(params, spec, PROMPTS[::-1]) == want[::-1]
  alone = [generate(params, spec, [prompt])[0] for prompt in PROMPTS]
  assert alone == want
  monkeypatch.setattr(decode, "BUCKET", 20)
  assert generate(params, spec, batch_size=2) == want


def test_the_stop_token_ends_a_row_and_is_not_returned():
  spec, params = made("single")
  free = generate(params, spec)
  stop = free[0][2]
  want = [list(itertools.takewhile(lambda i: i != stop, r)) for r in free]
  assert len(want[0]) < NEW == max(map(len, want))
  assert generate(params, spec, stop=stop) == want
  first = generate(params, spec, stop=free[1][0])
  assert first[1] == []


def test_sampling_follows_the_seed():
  spec, params = made("single")
  greedy = generate(params, spec)
  samples = [
    generate(params, spec, sampler=Sampler(1.0), seed=seed)
    for seed in (0, 0, 1)
  ]
  assert samples[0] == samples[1]
  assert samples[0] != samples[2]
  assert samples[0] != greedy
  # Rows draw independently of one another.
  same = generate(params, spec, [PROMPTS[0]] * 5, sampler=Sampler(1.0), seed=0)
  assert len({tuple(ids) for ids in same}) > 1


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(temperature):
  logits = jnp.array([1.0, 0.0, -1.0, 2.0])
  drawn = Sampler(temperature)(
    jax.random.key(0), jnp.broadcast_to(logits, (20_000, 4))
  )
  shares = np.bincount(drawn, minlength=4) / len(drawn)
  np.testing.assert_allclose(
    shares, jax.nn.softmax(logits / temperature), atol=0.015
  )


def test_greedy_takes_the_likeliest():
  logits = jnp.array([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
  np.testing.assert_array_equal(Sampler()(None, logits), [1, 0])


def test_prompts_that_cannot_be_continued():
  spec, params = made("single")
  limit = decode.max_length(spec)
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
  spec, _ = helpers.compose()
  shorter = helpers.retype(Composition(spec.anchor), max_length=10)
  assert decode.max_length(Composition(shorter.anchor, spec.augmenting)) == 10
  augmenting = helpers.retype(spec, max_length=10).augmenting
  assert decode.max_length(Composition(spec.anchor, augmenting)) == 10


def test_no_prompts():
  spec, params = made("single")
  assert generate(params, spec, []) == []
