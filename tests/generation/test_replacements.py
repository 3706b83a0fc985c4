"""Replaced states of m_A: against rows laid out by hand, and the full pass."""

from __future__ import annotations

import dataclasses
import functools

import helpers
import jax
import numpy as np
import pytest
from test_decode import Spelled

from calm_jax.composition import forward
from calm_jax.composition.connections import Composition
from calm_jax.composition.model import Model
from calm_jax.core.errors import InputError
from calm_jax.generation import batching, decode, decode_steps, scoring
from calm_jax.generation.replacements import Replacement, all_of, controls

RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(0, 61, n).tolist() for n in (5, 3, 8, 7, 2)]
COMPLETIONS = [RANDOM.integers(0, 61, n).tolist() for n in (4, 1, 2, 6, 3)]
MISMATCHED = Replacement(draw=3)


@functools.cache
def made(**options) -> Model:
  spec, params = helpers.compose(**options)
  return Model(spec, params, helpers.numbers(spec.anchor.vocab_size))


@functools.partial(jax.jit, static_argnames="spec")
def full(params, spec, batch):
  return forward.forward(params, spec, batch)[0]


def logprobs(model: Model, replacement=None, **options) -> np.ndarray:
  options = {"batch_size": 8, "replacement": replacement} | options
  scores = scoring.score(model, PROMPTS, COMPLETIONS, **options)
  return np.array([score.logprob for score in scores])


def by_hand(model: Model, row: int, donor: int) -> float:
  """A row's log-likelihood where m_A reads the donor's text, whose prompt ends
  where the row's does."""
  end, length = 10, 18

  def laid_out(i):
    ids = PROMPTS[i] + COMPLETIONS[i][:-1]
    before = end - len(PROMPTS[i])
    parts = [before, np.array(ids), length - before - len(ids)]
    return helpers.rows(parts, length=length)

  slots = np.arange(1, length + 1, dtype=np.int32)[None]
  augmenting, visible = {"kv": laid_out(donor)}, {"kv": slots}
  ends = np.full((1, length), end)
  logits = helpers.composed(
    model.params, model.spec, laid_out(row), augmenting, visible, ends
  )
  each = np.asarray(jax.nn.log_softmax(logits[0]))[end - 1 :]
  ids = COMPLETIONS[row]
  return float(each[np.arange(len(ids)), ids].sum())


def donors(replacement: Replacement) -> dict[int, int]:
  """The rows whose states rows are given, all in one batch."""
  rows = [p + c[:-1] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
  given = [len(prompt) for prompt in PROMPTS]
  [(chosen, batch, _)] = batching.batches(
    made(), rows, given, 8, replacement=replacement
  )
  drawn = batch.control.rows_B
  assert drawn[len(chosen) :].tolist() == list(range(len(chosen), len(drawn)))
  return {i: chosen[drawn[row]] for row, i in enumerate(chosen)}


def test_the_states_as_they_are_change_nothing():
  want = logprobs(made())
  np.testing.assert_allclose(logprobs(made(), Replacement()), want, atol=1e-4)


@pytest.mark.parametrize("visibility", ["causal", "encoder"])
@pytest.mark.parametrize("positions", ["none", "rope"])
def test_another_rows_states_are_aligned_by_the_ends_of_prompts(
  visibility, positions
):
  model = made(visibility=visibility, positions=positions)
  drawn = donors(MISMATCHED)
  assert all(i != other for i, other in drawn.items())
  want = [by_hand(model, i, drawn[i]) for i in range(len(PROMPTS))]
  got = logprobs(model, MISMATCHED)
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(got - logprobs(model)).max() > 0.1


def test_draws_differ():
  drawn = [donors(Replacement(draw=draw)) for draw in range(4)]
  assert len({tuple(sorted(one.items())) for one in drawn}) > 1
  assert donors(MISMATCHED) == donors(MISMATCHED)


def test_connections_are_taken_out():
  model = made()
  anchor = Model(Composition(model.spec.anchor), model.params)
  out = Replacement(without=all_of(model.spec))
  alone = logprobs(anchor)
  np.testing.assert_allclose(logprobs(model, out), alone, atol=1e-4)
  for pair in all_of(model.spec):
    rest = [c for n, c in model.spec.connections() if (n, c.name) != pair]
    one = made(connections=tuple(map(tuple, rest)))
    theta = model.params["composition"]["kv"]
    theta = {"kv": {c.name: theta[c.name] for c in rest}}
    want = Model(one.spec, model.params | {"composition": theta})
    got = logprobs(model, Replacement(without=frozenset({pair})))
    np.testing.assert_allclose(got, logprobs(want), atol=1e-4)
    assert np.abs(got - alone).max() > 0.1


def test_noise_is_that_of_the_static_control():
  static = made(control="noise", control_seed=7)
  want = logprobs(static)
  np.testing.assert_allclose(
    logprobs(made(), Replacement(noise=7)), want, atol=1e-4
  )
  assert np.abs(logprobs(made(), Replacement(noise=8)) - want).max() > 0.1


def test_unmasked_is_scored_as_it_generates():
  leaking, causal = made(visibility="unmasked"), made()
  # One prompt token: there is nothing that only an unmasked position sees.
  prompts, completions = [p[:1] for p in PROMPTS], COMPLETIONS
  got, want, leak = (
    [s.logprob for s in scoring.score(model, prompts, completions, **options)]
    for model, options in (
      (leaking, {"replacement": Replacement()}),
      (causal, {}),
      (leaking, {}),
    )
  )
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(np.subtract(leak, want)).max() > 0.1


CASES = {
  "same tokens": {},
  "encoder": {"visibility": "encoder"},
  "unmasked": {"visibility": "unmasked"},
  "positions": {"positions": "rope"},
  "two models": {"names": ("kv", "code")},
}
REPLACEMENTS = {
  "other": MISMATCHED,
  "noise": Replacement(noise=1),
  "without": Replacement(without=frozenset({("kv", "layer_2_to_2")})),
}


@pytest.mark.parametrize(
  ("case", "kind"),
  [(case, "other") for case in CASES]
  + [("positions", "noise"), ("two models", "without")],
)
def test_logits_while_generating_are_those_of_the_finished_texts(
  case, kind, monkeypatch
):
  check_generation(made(**CASES[case]), REPLACEMENTS[kind], monkeypatch)


@pytest.mark.parametrize("visibility", ["causal", "encoder", "unmasked"])
def test_the_same_for_other_tokens(visibility, monkeypatch):
  monkeypatch.setattr(batching, "AlignedReader", lambda *_: Spelled())
  monkeypatch.setattr(batching, "chunk_encoder", lambda _: None)
  model = made(visibility=visibility)
  model = dataclasses.replace(model, tokenizers={"kv": model.tokenizer})
  check_generation(model, MISMATCHED, monkeypatch, new=9)


def check_generation(model: Model, replacement, monkeypatch, new=6):
  seen: list[np.ndarray] = []
  monkeypatch.setattr(decode, "CHUNK", 1)

  def watched(step):
    def run(*args, **kwargs):
      out = step(*args, **kwargs)
      state = out if isinstance(out, decode_steps.DecodeState) else out[0]
      seen.append(np.asarray(state.logits_BV))
      return out

    return run

  advance = watched(decode_steps.advance_on("cpu", model.params))
  monkeypatch.setattr(decode_steps, "start", watched(decode_steps.start))
  monkeypatch.setattr(decode_steps, "advance_on", lambda *_: advance)
  options = {"max_new_tokens": new, "replacement": replacement}
  got = decode.generate(model, PROMPTS, **options)
  rows = [p + g for p, g in zip(PROMPTS, got, strict=True)]
  given = [len(prompt) for prompt in PROMPTS]
  [(chosen, batch, _)] = batching.batches(
    model, rows, given, 8, replacement=replacement
  )
  logits = np.asarray(full(model.params, model.spec, batch))
  for row in range(len(chosen)):
    first = batch.prompt_ends[row, 0] - 1
    want = logits[row, first : first + new]
    cached = np.stack([step[row] for step in seen])
    np.testing.assert_allclose(cached, want, atol=1e-4)


def test_a_short_last_batch_takes_states_of_the_batch_before():
  model = made()
  got = decode.generate(
    model, PROMPTS, max_new_tokens=3, batch_size=2, replacement=MISMATCHED
  )
  assert [len(ids) for ids in got] == [3] * 5
  scores = logprobs(model, MISMATCHED, batch_size=2)
  # The longest row is alone in the last batch.
  longest = max(range(5), key=lambda i: len(PROMPTS[i]) + len(COMPLETIONS[i]))
  want = [by_hand(model, longest, i) for i in range(5) if i != longest]
  assert np.abs(scores[longest] - np.array(want)).min() < 1e-4
  assert abs(scores[longest] - logprobs(model)[longest]) > 0.01


def test_the_same_example_again_is_no_other():
  rows = [[1, 2, 3], [1, 2, 3], [4, 5]]
  for draw in range(5):
    [(chosen, batch, _)] = batching.batches(
      made(), rows, [3, 3, 2], 4, replacement=Replacement(draw=draw)
    )
    drawn = batch.control.rows_B[:3]
    pairs = [
      (rows[i], rows[chosen[drawn[row]]]) for row, i in enumerate(chosen)
    ]
    assert all(own != other for own, other in pairs)
  with pytest.raises(InputError, match="are the same: give more"):
    decode.generate(made(), rows[:2], max_new_tokens=2, replacement=MISMATCHED)


def test_one_program_serves_all_controls():
  model = made(connections=((1, 1), (2, 3)))

  def counts():
    advance = decode_steps.advance_on("cpu", model.params)
    programs = decode_steps.start, advance, scoring._token_scores
    return [program._cache_size() for program in programs]

  before = counts()
  for replacements in controls(model.spec, draws=2, seed=0).values():
    for replacement in replacements:
      logprobs(model, replacement)
      decode.generate(model, PROMPTS, max_new_tokens=2, replacement=replacement)
  assert [b - a for a, b in zip(before, counts(), strict=True)] == [1, 1, 1]


def test_names_of_controls():
  two = made(names=("kv", "code"))
  names = list(controls(two.spec, draws=3, seed=0))
  assert names[:4] == ["correct", "mismatched", "zeroed", "noise"]
  named = {"without kv", "without code", "only kv/2->2", "without code/3->4"}
  assert named <= {*names}
  # Of two models, one alone is what is left without the other.
  assert "only kv" not in names
  alone = made(connections=((2, 3),))
  assert list(controls(alone.spec, draws=1, seed=0)) == names[:4]
