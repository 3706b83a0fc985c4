"""Perplexity per token, and bits per byte, of held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calm_jax.evals.base import Outcome, Score


def perplexity(examples: Sequence, score: Score) -> Outcome:
  """Perplexity of the completions given their prompts.

  Args:
    examples: with `prompt`, `completion` and `origin`.
    score: (nats, tokens, bytes that the tokens spell) of each completion.

  Returns:
    "perplexity" per target token (EOS included) and "bits_per_byte" of the
    completions' UTF-8, which compares models of different tokenizers. Bytes
    that no token spells, those of unknown characters, are not counted, and what
    an unknown token costs is: not to know a character is never a gain.
  """
  rows = []
  for example, (nats, tokens, size) in zip(
    examples, score(examples), strict=True
  ):
    rows.append({
      "origin": example.origin,
      "nats": nats,
      "tokens": tokens,
      "bytes": size,
      "unknown_bytes": len(example.completion.encode()) - size,
    })  # fmt: skip
  nats, tokens, size = (
    sum(row[key] for row in rows) for key in ("nats", "tokens", "bytes")
  )
  return Outcome(
    {
      "perplexity": math.exp(nats / tokens),
      "bits_per_byte": nats / math.log(2) / size,
    },
    rows,
  )
