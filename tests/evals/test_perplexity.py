"""Perplexity, from numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest

from calm_jax.data.examples import TextExample
from calm_jax.evals.perplexity import perplexity


def test_all_examples_are_one_text():
  examples = [TextExample("p", "ab", "x"), TextExample("", "é", "y")]
  metrics, rows = perplexity(examples, lambda _: [(3.0, 3.0, 2), (9.0, 1.0, 2)])
  # Per token of both together, not the mean of each; é has two bytes.
  assert metrics == pytest.approx(
    {"perplexity": math.exp(3), "bits_per_byte": 3 / math.log(2)}
  )
  assert rows == [
    {"origin": "x", "nats": 3.0, "tokens": 3.0, "bytes": 2, "unknown_bytes": 0},
    {"origin": "y", "nats": 9.0, "tokens": 1.0, "bytes": 2, "unknown_bytes": 0},
  ]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
  examples = [TextExample("", "abc", "x"), TextExample("", "d", "y")]
  metrics, _ = perplexity(
    examples,
    lambda es: [
      (
        len(e.completion) * math.log(7),
        1.0 * len(e.completion),
        len(e.completion),
      )
      for e in es
    ],
  )
  assert metrics["perplexity"] == pytest.approx(7)
  assert metrics["bits_per_byte"] == pytest.approx(math.log2(7))


def test_unknown_bytes_are_no_gain():
  metrics, rows = perplexity(
    [TextExample("", "abcé", "x")], lambda _: [(6.0, 4, 3)]
  )
  assert metrics["bits_per_byte"] == pytest.approx(2 / math.log(2))
  assert rows[0]["unknown_bytes"] == 2


def test_a_score_for_each_example():
  with pytest.raises(ValueError, match="shorter"):
    perplexity([TextExample("", "a", "x")], lambda _: [])
