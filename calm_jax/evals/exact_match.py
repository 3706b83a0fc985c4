"""Exact match of the whole answer (the key-value task, §4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from calm_jax.evals.base import Generate, Outcome


def exact_match(
  prompts: Sequence[str],
  completions: Sequence[str],
  generate: Generate,
  **columns: Sequence,
) -> Outcome:
  """Share of prompts that are continued exactly as asked, in percent.

  Args:
    prompts: N texts.
    completions: what is asked for.
    generate: the model.
    **columns: N further values each, copied into the rows.
  """
  predictions = generate(list(prompts))
  rows = []
  for i, (prompt, right, prediction) in enumerate(
    zip(prompts, completions, predictions, strict=True)
  ):
    row = {
      "prompt": prompt,
      "completion": right,
      "prediction": prediction,
      "correct": prediction == right,
    }
    rows.append(row | {name: values[i] for name, values in columns.items()})
  accuracy = 100 * sum(row["correct"] for row in rows) / len(rows)
  return Outcome({"accuracy": accuracy}, rows)
