"""Examples of Table 8's kinds, picked by a rule rather than by hand."""

from typing import Any, NamedTuple

from calm_jax.core.errors import InputError
from calm_jax.reporting.predictions import RIGHT, SETS, is_right, read_rows
from calm_jax.reporting.runs import MODELS, Run

_LOST = "Lost: m_A or m_B is right, the composed is not"
# By which of m_A, m_B and the composed model are right: Appendix B's three
# kinds, the second of them in two, and two that it does not name.
KINDS: dict[tuple[bool, ...], str] = {
  (False, False, True): "1. Neither m_A nor m_B is right, the composed is",
  (True, False, True): "2a. Only m_A is right, and the composed too",
  (False, True, True): "2b. Only m_B is right, and the composed too",
  (True, True, True): "3. Both are right, and the composed too",
  (True, False, False): _LOST,
  (False, True, False): _LOST,
  (True, True, False): _LOST,
  (False, False, False): "None of the three is right",
}
RULE = (
  "Shown is the first example of each kind in the order of the files, not the "
  "best; the paper's Table 8 is cherry-picked. Right means an exact answer, a "
  f"program that passes its tests, or a chrF1 of the sentence of {RIGHT:.0f} "
  "or more."
)
SEPARATOR = "\n\n"  # before the question, behind the examples of a prompt


class Comparison(NamedTuple):
  """A question, its right answer, and the three models' rows of predictions."""

  source: str
  prompt: str
  wanted: str | None
  rows: dict[str, dict[str, Any]]

  @property
  def question(self) -> str:
    """The last part of the prompt, after the exemplars."""
    return self.prompt.rstrip().rpartition(SEPARATOR)[2]


class Chosen(NamedTuple):
  """The number of examples of each kind in a benchmark, and the first of it."""

  title: str
  counts: dict[str, int]
  first: dict[str, Comparison]


def choose(run: Run) -> list[Chosen]:
  """Chooses examples of each benchmark that all three models answered.

  Raises InputError if the models' files are not of the same examples.
  """
  order = ("kv_math_held_out", "num_math", "kv_subs")
  sets = {SETS[name]: [name] for name in order}
  for name, entry in run.evaluations.items():
    sets.setdefault(entry["group"], []).append(name)
  chosen = []
  for title, names in sets.items():
    counts = dict.fromkeys(KINDS.values(), 0)
    first: dict[str, Comparison] = {}
    for name in names:
      for example in _comparisons(run, name):
        kind = KINDS[tuple(is_right(example.rows[m]) for m in MODELS)]
        counts[kind] += 1
        first.setdefault(kind, example)
    if any(counts.values()):
      shown = {kind: first[kind] for kind in counts if kind in first}
      chosen.append(Chosen(title, counts, shown))
  return chosen


def _comparisons(run: Run, name: str) -> list[Comparison]:
  paths = [run.path(name, model) for model in MODELS]
  if not all(path.exists() for path in paths):
    return []
  files = [read_rows(path) for path in paths]
  wanted = [[row.get("completion") for row in rows] for rows in files]
  if wanted != [wanted[-1]] * len(MODELS):
    raise InputError(
      f"{', '.join(map(str, paths))} are not of the same examples: evaluate "
      "the models together"
    )
  made = []
  for number, rows in enumerate(zip(*files, strict=True), start=1):
    by_model = dict(zip(MODELS, rows, strict=True))
    composed, source = by_model["composed"], f"{name}, {number}"
    right = composed.get("completion")
    made.append(Comparison(source, composed["prompt"], right, by_model))
  return made
