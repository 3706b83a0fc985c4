import pytest

from calm_jax.reporting import paper


@pytest.mark.parametrize(
  ("table", "rows"),
  [
    (paper.TABLES["table-2"], 10),
    (paper.TABLES["table-3-gsm8k"], 10),
    (paper.TABLES["table-3-mgsm"], 10),
    (paper.TABLES["table-6"], 25),
  ],
)
def test_the_rows_come_to_the_averages_that_are_printed(table, rows):
  *numbers, average = table.values()
  assert len(numbers) == rows and list(table)[-1] == paper.AVERAGE
  for column, printed in average.items():
    mean = sum(row[column] for row in numbers) / rows
    assert mean == pytest.approx(printed, abs=0.051), column


def test_table_6_repeats_table_3():
  for language, row in paper.TABLES["table-3-gsm8k"].items():
    if language != paper.AVERAGE:
      assert paper.TABLES["table-6"][language].items() <= row.items()


def test_what_the_text_says_of_table_6():
  rows = [
    row
    for name, row in paper.TABLES["table-6"].items()
    if name != paper.AVERAGE
  ]
  better = [
    sum(row["composed"] > row[other] for row in rows)
    for other in ("anchor", "finetune")
  ]
  assert better == [20, 18]
  assert paper.TABLES["table-5-better"]["GSM8K"]["composed"] == 20
  assert paper.TABLES["table-5"]["GSM8K"]["composed"] == 21.4


def test_the_parameters_of_appendix_c_follow_from_its_shapes():
  a, b, layers, vocabulary, connections = 512, 1024, 24, 30_000, 4
  embedding, mlp = vocabulary * b, 2 * 4 * b * b
  assert {
    "anchor": embedding + layers * (4 * b * b + mlp),
    "paper_anchor": layers * (embedding + 3 * b * b + mlp),
    "composition": connections * (a * b + 4 * b * b),
    "paper_composition": connections * (a * b + 3 * b * b),
  } == paper.C1
