"""The table of ablations.json: several trials of several kinds."""

from collections.abc import Mapping
from typing import Any

from calm_jax.reporting.table import Cell, Table

LOSS = "held-out loss"


def trials_table(summary: Mapping[str, Any]) -> Table:
  """Makes a row for each kind of `calm_jax.ablations.summarise`."""
  # From the last row, a kind that has all scores; m_B, the first, lacks some.
  scores = [row["scores"] for row in reversed(summary.values())]
  labels = list(dict.fromkeys(label for row in scores for label in row))
  rows = []
  for name, row in summary.items():
    run, count = row["runs"][0], len(row["runs"])
    difference = f" ({run['difference']:+,})" if run["difference"] else ""
    trained = f"{run['parameters']:,}{difference}"
    cells = [_cell(row["scores"].get(label), label, count) for label in labels]
    rows.append((name, trained, *cells))
  return Table(
    "ablations",
    "All numbers of the ablations",
    ("", "trained (against Θ_C)", *labels),
    rows,
    (
      "Trials start from other fresh parameters and see the data in another "
      "order; m_A and m_B are the same in all, and so are steps and the kind "
      "of data.",
      "In % and the higher the better, unless a column says otherwise: exact "
      "match of the whole answer, pass@1, or chrF1 of translations and "
      "descriptions, averaged over the languages. "
      f"The {LOSS} is measured with the right answer as input, "
      "which an unmasked composition reads off.",
    ),
    caption="mean [lowest to highest]",
  )


def _cell(spread: Mapping[str, float] | None, label: str, trials: int) -> Cell:
  digits = 3 if label == LOSS or label.startswith("bits") else 1
  if spread is None:
    return Cell(digits=digits)
  if trials == 1:
    return Cell(spread["mean"], digits=digits)
  ends = spread["lowest"], spread["highest"]
  return Cell(spread["mean"], *ends, digits=digits, trials=trials)
