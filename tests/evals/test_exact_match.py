"""Exact match: what counts."""

from __future__ import annotations

from calm_jax.evals.exact_match import count_right, exact_match


def test_the_whole_answer_counts_and_nothing_else_does():
  given = {"a=": "1", "b=": "1=2", "c=": "3 ", "d=": "2"}
  asked = []

  def generate(prompts):
    asked.append(prompts)
    return [given[p] for p in prompts]

  accuracy, rows = exact_match(
    tuple(given), ["1", "1=2", "3", "1=2"], generate, num_terms=[1, 2, 3, 4]
  )
  assert asked == [list(given)]
  assert accuracy == 50.0
  assert [row["correct"] for row in rows] == [True, True, False, False]
  assert rows[1] == {
    "prompt": "b=", "completion": "1=2", "prediction": "1=2", "correct": True,
    "num_terms": 2,
  }  # fmt: skip


def test_right_answers_are_counted_by_a_column():
  rows = [
    {"correct": correct, "terms": terms}
    for correct, terms in [(True, 6), (False, 3), (True, 3), (True, None)]
  ]
  counts = count_right([*rows, {"correct": True}], "terms")
  assert list(counts.items()) == [(3, (1, 2)), (6, (1, 1))]
