"""Perplexity per token, and bits per byte, of held-out text."""

import math
from collections.abc import Callable, Sequence

from calm_jax.evals.base import Row

# Examples to (summed loss in nats, target tokens, bytes that they spell) each.
Score = Callable[[Sequence], list[tuple[float, float, int]]]


def perplexity(
  examples: Sequence, score: Score
) -> tuple[dict[str, float], list[Row]]:
  """Measures the completions of `TextExample`s given their prompts.

  Returns "perplexity" per target token (EOS included) and "bits_per_byte" of
  the completions' UTF-8, which compares models of different tokenizers; and a
  row for each example. Bytes of unknown characters, which no token spells, are
  not counted, while the loss of an unknown token is: a model never gains by not
  knowing a character.
  """
  rows = []
  scores = score(examples)
  for example, (nats, tokens, size) in zip(examples, scores, strict=True):
    row = {"origin": example.origin, "nats": nats, "tokens": tokens}
    unknown = len(example.completion.encode()) - size
    rows.append(row | {"bytes": size, "unknown_bytes": unknown})
  nats, tokens, size = (
    sum(row[key] for row in rows) for key in ("nats", "tokens", "bytes")
  )
  metrics = {
    "perplexity": math.exp(nats / tokens),
    "bits_per_byte": nats / math.log(2) / size,
  }
  return metrics, rows
