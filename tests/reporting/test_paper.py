import pytest

from calm_jax.reporting import paper


@pytest.mark.parametrize(
  ("table", "rows"),
  [
    (paper.TABLE2, 10),
    (paper.TABLE3_LOW, 10),
    (paper.TABLE3_HIGH, 10),
    (paper.TABLE6, 25),
  ],
)
def test_the_rows_come_to_the_averages_that_are_printed(table, rows):
  *numbers, average = table.values()
  assert len(numbers) == rows and list(table)[-1] == paper.AVERAGE
  for column, printed in average.items():
    mean = sum(row[column] for row in numbers) / rows
    assert mean == pytest.approx(printed, abs=0.051), column


def test_table_6_repeats_table_3():
  for language, row in paper.TABLE3_LOW.items():
    if language != paper.AVERAGE:
      assert paper.TABLE6[language].items() <= row.items()


def test_what_the_text_says_of_table_6():
  rows = [row for name, row in paper.TABLE6.items() if name != paper.AVERAGE]
  better = [
    sum(row["composed"] > row[other] for row in rows)
    for other in ("anchor", "finetune")
  ]
  assert better == [20, 18]
  assert paper.TABLE5_BETTER["GSM8K"]["composed"] == 20
  assert paper.TABLE5["GSM8K"]["composed"] == 21.4
