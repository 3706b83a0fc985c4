"""results -> report.md and results.json, with the tables and the figures.

What it reads in the work folder, each part left out where it is absent:

  <stage>/metrics.jsonl             "step", "loss" or "eval_loss", ... a line
  predictions/<set>.<model>.jsonl   "prompt", "completion", "prediction",
                                    "correct", "num_terms" a line
  attention.npz                     weights [C, N, L, M], tokens [L],
                                    connections [C], prompt_length, and
                                    augmenting_tokens [M] where they differ
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calm_jax import figures, kinds
from calm_jax.errors import InputError
from calm_jax.metrics import read_metrics
from calm_jax.predictions import (
  SET_NAMES,
  Predictions,
  count_by_terms,
  read_predictions,
  wilson_interval,
)
from calm_jax.tables import (
  MODEL_NAMES,
  Table,
  print_results,
  print_table1,
  table1_rows,
  tables,
)

__all__ = [
  "print_results",
  "print_table1",
  "read_predictions",
  "table1_rows",
  "tables",
  "wilson_interval",
  "write_report",
]

REPORT = "report.md"
RESULTS = "results.json"
FIGURES = "figures"


def write_report(
  workdir: str | os.PathLike, results: Mapping[str, Any]
) -> Path:
  """Writes report.md, the figures it embeds, and results.json.

  Args:
    workdir: a local folder; see the head of this file for what is read.
    results: "table1" or "perplexity" or both, and of "parameters",
      "bits_per_byte", "seconds", "examples", "answer", "config" (nested or
      flat) and "other_runs" (name -> results) those that are known.
      Accuracies are in percent.

  Returns:
    The path of report.md.

  Raises:
    InputError: results lack both sections, or hold a number out of its
      range; a file of predictions or attention is not as described above.
    ValueError: a metrics.jsonl holds a line that is not JSON.
  """
  workdir = Path(workdir)
  # First of all: no fault found below may lose the numbers.
  write_results(workdir / RESULTS, results)
  made_tables = tables(results)
  predictions = read_predictions(workdir)
  drawn = _draw(workdir, results, predictions)
  text = _markdown(results, made_tables, drawn, predictions)
  _write_atomic(workdir / REPORT, text)
  return workdir / REPORT


def write_results(path: Path, results: Mapping[str, Any]) -> None:
  """Writes results as JSON, whole or not at all.

  NumPy numbers become plain ones; a number that is not finite becomes the
  string "NaN", "Infinity" or "-Infinity", all three of which `float` reads.
  """
  text = json.dumps(
    _plain(results), indent=2, ensure_ascii=False, allow_nan=False, default=str
  )
  _write_atomic(path, text + "\n")


def _draw(
  workdir: Path, results: Mapping[str, Any], predictions: Predictions
) -> list[tuple[str, str, str]]:
  """Draws what there is data for: (title, file, what it shows) of each."""
  folder = workdir / FIGURES
  folder.mkdir(parents=True, exist_ok=True)
  drawn = []

  def add(figure, name: str, title: str, caption: str) -> None:
    figures.save_figure(figure, folder / name)
    drawn.append((title, f"{FIGURES}/{name}", caption))

  counts = count_by_terms(predictions)
  if counts:
    add(
      figures.accuracy_figure(counts),
      "accuracy.png",
      "Accuracy by number of terms",
      "Each point is the share of right answers among the expressions of "
      "that many terms; bars: 95% Wilson intervals.",
    )
  attention = workdir / "attention.npz"
  if attention.exists():
    add(
      _attention_figure(attention),
      "attention.png",
      "Where the composed model looks",
      "Cross-attention of one example, mean of the heads. A row is a token "
      "of the answer, a column a token that the augmenting model has read; "
      "the dashed line is the end of the prompt, hatched is not yet visible.",
    )
  stages = _stages(workdir, results.get("seconds", {}))
  if stages:
    add(
      figures.loss_figure(stages),
      "loss.png",
      "Training loss",
      "Cross-entropy of each stage on a log axis; the thick line is a moving "
      "average, the dashed one the loss on examples that are not trained on.",
    )
  return drawn


def _stages(workdir: Path, order: Iterable[str]) -> dict[str, list[dict]]:
  """Metrics of each stage that has a loss, in the order they were run."""
  order = list(order)
  names = {path.parent.name for path in workdir.glob("*/metrics.jsonl")}
  known = [name for name in order if name in names]
  stages = {
    name: read_metrics(workdir / name)
    for name in [*known, *sorted(names - set(known))]
  }
  return {
    name: lines
    for name, lines in stages.items()
    if any(_drawable(line.get("loss")) for line in lines)
  }


def _drawable(loss: float | None) -> bool:
  return loss is not None and math.isfinite(loss) and loss > 0


def _attention_figure(path: Path):
  with np.load(path, allow_pickle=False) as arrays:
    needed = {"weights", "tokens", "connections", "prompt_length"}
    if not needed <= set(arrays.files):
      raise InputError(f"{path} needs {sorted(needed)}, has {arrays.files}")
    own = None
    if "augmenting_tokens" in arrays.files:
      own = arrays["augmenting_tokens"].tolist()
    return figures.attention_figure(
      arrays["weights"],
      arrays["tokens"].tolist(),
      arrays["connections"].tolist(),
      int(arrays["prompt_length"]),
      own,
    )


def _markdown(
  results: Mapping[str, Any],
  made_tables: Iterable[Table],
  drawn: Iterable[tuple[str, str, str]],
  predictions: Predictions,
) -> str:
  parts = ["# Report", _headline(results, predictions)]
  parts += [markdown_table(table) for table in made_tables]
  for title, file, caption in drawn:
    parts.append(f"## {title}\n\n![{title}]({file})\n\n{caption}")
  parts.append(_examples(predictions))
  parts.append(_configuration(results.get("config", {})))
  return "\n\n".join(part for part in parts if part) + "\n"


def _headline(results: Mapping[str, Any], predictions: Predictions) -> str:
  """The result in a sentence or two."""
  kv_math = results.get("table1", {}).get("kv_math", {})
  value = kv_math.get("composed_held_out")
  if value is None:
    return ""
  kind = kinds.label(results)
  text = "" if kind == MODEL_NAMES["composed"] else f"{kind}: "
  text += (
    "Arithmetic over keys that the composition has never seen in training: "
    f"**{value:.1f}%** of the answers are right (the paper: 84.3%)"
  )
  lines = predictions.get(("kv_math_held_out", "composed"), [])
  correct = sum(bool(line["correct"]) for line in lines)
  # A file that holds only some of the examples says nothing of the number.
  if lines and abs(100 * correct / len(lines) - value) < 0.01:
    low, high = wilson_interval(correct, len(lines))
    text += (
      f"; of {len(lines):,} examples, 95% interval {100 * low:.1f} to "
      f"{100 * high:.1f}%"
    )
  return text + "."


def markdown_table(table: Table) -> str:
  """A table of `tables` in Markdown, its title as a heading."""
  lines = [f"## {table.title}", "", _row(table.header)]
  lines.append(_row([":--", *["--:"] * (len(table.header) - 1)]))
  for row, cells in enumerate(table.rows):
    cells = [_escape(cell) for cell in cells]
    for column in range(len(cells)):
      if (row, column) in table.bold:
        cells[column] = f"**{cells[column]}**"
    lines.append(_row(cells))
  if table.notes:
    lines += ["", *(f"- {_escape(note)}" for note in table.notes)]
  return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
  # "_" inside a word is literal in Markdown: m_A and kv_math stay as they are.
  return text.replace("|", "\\|").replace("*", "\\*")


def _examples(predictions: Predictions) -> str:
  """The first right and wrong predictions of each set: a few, not the best."""
  lines = []
  first_set = next(iter(predictions), ("", ""))[0]
  for (set_name, model), found in predictions.items():
    # The models alone are shown once, on the headline's data set.
    if model != "composed" and set_name != first_set:
      continue
    each = 2 if model == "composed" else 1
    right = [line for line in found if line["correct"]][:each]
    wrong = [line for line in found if not line["correct"]][:each]
    name = SET_NAMES.get(set_name, set_name)
    for line in right + wrong:
      lines.append(
        _row(
          (
            _escape(name),
            MODEL_NAMES[model],
            _code(line["prompt"]),
            _code(line["completion"]),
            _code(line["prediction"]),
            "right" if line["correct"] else "wrong",
          )
        )
      )
  if not lines:
    return ""
  header = ("data set", "model", "prompt", "expected", "predicted", "")
  return "\n".join(
    (
      "## Examples",
      "",
      "The first right and the first wrong ones of the composed model on each "
      "data set, and of the models alone on the first; so the shares here say "
      "nothing. All are in `predictions/`.",
      "",
      _row(header),
      _row(["---"] * len(header)),
      *lines,
    )
  )


def _code(text: str, width: int = 100) -> str:
  """Text as inline code for a table's cell, on one line and cut to a width."""
  text = " ".join(str(text).splitlines())
  text = text if len(text) <= width else text[: width - 1] + "…"
  # A pipe ends a cell even inside code, and a backtick ends the code.
  text = text.replace("|", "\\|").replace("`", "'")
  return f"`{text}`" if text.strip() else "(nothing)"


def _configuration(configuration: Mapping[str, Any]) -> str:
  rows = [
    _row(
      (
        _code(name),
        _code(json.dumps(_plain(value), ensure_ascii=False, default=str)),
      )
    )
    for name, value in _flat(configuration)
  ]
  if not rows:
    return ""
  # Folded: it is everything that was set, and long.
  head = ["## Configuration", "", "<details><summary>all settings</summary>"]
  head += ["", _row(("setting", "value")), _row(("---", "---"))]
  return "\n".join([*head, *rows, "", "</details>"])


def _flat(
  tree: Mapping[str, Any], prefix: str = ""
) -> Iterable[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
  """Of JSON's types only."""
  if isinstance(value, Mapping):
    return {str(name): _plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  # A type has it too, unbound: a dtype in a configuration.
  if hasattr(value, "tolist") and not isinstance(value, type):
    return _plain(value.tolist())
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if isinstance(value, float) and not math.isfinite(value):
    if math.isnan(value):
      return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
  return value


def _write_atomic(path: Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
