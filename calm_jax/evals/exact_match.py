"""Exact match of the whole answer (the key-value task, §4.1)."""

from collections.abc import Iterable, Sequence

from calm_jax.evals.base import Generate, Row


def exact_match(
  prompts: Sequence[str],
  completions: Sequence[str],
  generate: Generate,
  **columns: Sequence,
) -> tuple[float, list[Row]]:
  """Counts the prompts that are continued exactly as asked.

  Returns the accuracy in percent, and a row for each prompt, with its value of
  each of the `columns`.
  """
  predictions = generate(list(prompts))
  answers = zip(prompts, completions, predictions, strict=True)
  rows = []
  for i, (prompt, right, prediction) in enumerate(answers):
    row: Row = {"prompt": prompt, "completion": right, "prediction": prediction}
    row["correct"] = prediction == right
    rows.append(row | {name: values[i] for name, values in columns.items()})
  accuracy = 100 * sum(row["correct"] for row in rows) / len(rows)
  return accuracy, rows


def count_right(rows: Iterable[Row], column: str) -> dict[int, tuple[int, int]]:
  """Counts (right answers, all answers) by the numbers of a column, in order.

  Rows without such a number are left out.
  """
  counts: dict[int, tuple[int, int]] = {}
  for row in rows:
    if row.get(column) is not None:
      right, total = counts.get(int(row[column]), (0, 0))
      counts[int(row[column])] = right + bool(row["correct"]), total + 1
  return dict(sorted(counts.items()))
