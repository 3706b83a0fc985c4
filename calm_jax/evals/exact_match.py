"""Exact match of the whole answer (the key-value task, §4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from calm_jax.evals.base import Generate, Outcome


def exact_match(
  prompts: Sequence[str],
  answers: Sequence[Sequence[str]],
  generate: Generate,
  **columns: Sequence,
) -> Outcome:
  """Share of prompts whose continuation is one of their answers, in percent.

  Args:
    prompts: N texts.
    answers: for each the continuations that count as right, the first of them
      being the one that is asked for.
    generate: the model.
    **columns: N further values each, copied into the rows.
  """
  predictions = generate(list(prompts))
  rows = []
  for i, (prompt, right, prediction) in enumerate(
    zip(prompts, answers, predictions, strict=True)
  ):
    row = {
      "prompt": prompt,
      "completion": right[0],
      "prediction": prediction,
      "correct": prediction in right,
    }
    rows.append(row | {name: values[i] for name, values in columns.items()})
  accuracy = 100 * sum(row["correct"] for row in rows) / len(rows)
  return Outcome({"accuracy": accuracy}, rows)
