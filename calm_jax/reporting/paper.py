"""The numbers of the paper (arXiv 2401.02412), as printed: paper.tsv.

A table is {row: {column: number}}. The columns are "base" (m_A before it was
trained on its domain), "augmenting" (m_A), "anchor" (m_B), "composed" (CALM)
and the kinds of `experiments.variants`; "finetune" is m_B trained on all of the
domain, the paper's m_B^NTL and m_B^Code. Rows are called as in results.json.
"""

import importlib.resources

PaperTable = dict[str, dict[str, float]]

MODELS = {
  "table-1": "The paper's m_A is a PaLM2-XXS, its m_B a PaLM2-XS.",
  "others": "The paper's m_A is a PaLM2-XXS, its m_B a PaLM2-S.",
}
AVERAGE = "average"  # a row of Tables 2, 3 and 6


def _read() -> dict[str, PaperTable]:
  """Reads blocks of lines; the first names the table and its columns."""
  path = importlib.resources.files("calm_jax.reporting") / "paper.tsv"
  tables: dict[str, PaperTable] = {}
  for block in path.read_text(encoding="utf-8").split("\n\n"):
    rows = [line.split("\t") for line in block.strip().split("\n")]
    _, (table, *columns), *rows = rows  # after a comment
    tables[table] = {
      name: {
        column: float(number)
        for column, number in zip(columns, numbers, strict=True)
      }
      for name, *numbers in rows
    }
  return tables


TABLES = _read()
# The languages of a benchmark that Table 5 counts.
TABLE5_LANGUAGES = {"FLORES-200": 192, "GSM8K": 25, "MGSM": 11}
# Parameters in Appendix C.1's example, BERT-small in BERT-large: as C.1 counts
# them ("paper_"), and as they are. `planning.overhead` has the formulas.
C1 = {
  "anchor": 332_709_888,
  "paper_anchor": 1_014_104_064,
  "composition": 18_874_368,
  "paper_composition": 14_680_064,
}
