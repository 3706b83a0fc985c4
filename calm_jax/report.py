"""Reports runs' folders: one HTML page, and its tables as Markdown and CSV.

  python -m calm_jax.report RUN_DIR… --out=DIR

DIR/report.html holds everything and needs no other file; DIR/report.md the
tables, DIR/tables/*.csv their numbers. What it reads in a run's folder, each
part left out where it is absent:

  results.json                      what the run measured
  <stage>/metrics.jsonl             "step", "loss" or "eval_loss", ... a line
  predictions/<set>.<model>.jsonl   "prompt", "completion", "prediction", and
                                    "correct" or "score" a line
  attention.npz                     weights [C, N, L, M], tokens [L],
                                    connections [C], prompt_length, and
                                    augmenting_tokens [M] where they differ
  ablations/                        of `python -m calm_jax.ablations`
"""

import argparse
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from calm_jax import cli
from calm_jax.core.errors import InputError, check_folder
from calm_jax.core.files import write_atomically, write_json
from calm_jax.reporting import runs, tables
from calm_jax.reporting.figures import load_matplotlib, save_figure
from calm_jax.reporting.grid import HOW_TO_READ
from calm_jax.reporting.page import page
from calm_jax.reporting.pictures import pictures
from calm_jax.reporting.table import (
  as_csv,
  as_markdown,
  as_numbers,
  print_tables,
)
from calm_jax.training.trackers import Tracker


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m calm_jax.report", description=__doc__.split("\n")[0]
  )
  parser.add_argument("runs", nargs="+", help="folders of runs or ablations")
  parser.add_argument("--out", required=True, help="folder to write into")
  arguments = parser.parse_args()
  print(write(arguments.runs, arguments.out))


def write(folders: Iterable[str | os.PathLike], out: str | os.PathLike) -> Path:
  """Writes the report of some runs; returns the path of report.html.

  Raises:
    InputError: no run is in a folder, a file there is not what a run writes, or
      there are figures to draw, and no matplotlib.
    ValueError: a metrics.jsonl holds a line that is not JSON.
  """
  out, groups = check_folder("out", out), runs.find_groups(folders)
  made = tables.tables(groups)
  html = page(groups, made)
  for table in made:
    write_atomically(out / "tables" / f"{table.name}.csv", as_csv(table))
  # What no run has numbers for comes last, as on the page.
  made = sorted(made, key=lambda table: table.empty)
  text = "\n\n".join(["# Report", HOW_TO_READ, *map(as_markdown, made)])
  write_atomically(out / "report.md", text + "\n")
  write_atomically(out / "report.html", html)
  return out / "report.html"


def can_draw() -> bool:
  """Returns whether matplotlib is installed; prints what a run lacks without.

  A run asks it before it trains, and then does not fail at its end.
  """
  try:
    load_matplotlib()
  except InputError as error:
    print(
      f"{error}. This run will write its numbers, but no report and no figures;"
      " `python -m calm_jax.report` makes them later",
      flush=True,
    )
    return False
  return True


def write_results(
  workdir: str | os.PathLike, results: Mapping[str, Any], draw: bool
) -> None:
  """Writes results.json of a run into its folder, and the report if it can.

  The results are at least one of "table1", "perplexity", "bits_per_byte" and
  "evals"; optionally "table1_parts", "parameters", "seconds", "stage_flops",
  "examples", "answer", "config", "flops" and "other_runs" (name -> results).
  Accuracies are in percent. `draw` is what `can_draw` said.
  """
  # Before all else: no fault below may lose the numbers.
  write_json(Path(workdir) / runs.RESULTS, results)
  if draw:
    write([workdir], workdir)


def print_results(
  workdir: str | os.PathLike, console: Console | None = None
) -> None:
  """Prints the tables of a run that hold a number of ours."""
  made = tables.tables(runs.find_groups([workdir]))
  print_tables([table for table in made if not table.empty], console)


def log_results(
  workdir: str | os.PathLike, trackers: Sequence[Tracker], draw: bool
) -> None:
  """Logs a run's tables; if `draw`, its report and its figures, PNG files."""
  groups, folder = runs.find_groups([workdir]), Path(workdir)
  made = [table for table in tables.tables(groups) if not table.empty]
  figures, shown = {}, draw and any(each.shows_figures for each in trackers)
  for group in groups:
    named = f"{group.name} " if len(groups) > 1 else ""
    for picture in pictures(group) if shown else ():
      name = re.sub(r"\W+", "-", f"{named}{picture.title}").lower()
      figures[name] = folder / "figures" / f"{name}.png"
      figures[name].parent.mkdir(exist_ok=True)
      save_figure(picture.figure, figures[name])
  for tracker in trackers:
    for table in made:
      tracker.table(table.name, *as_numbers(table))
    for name, path in figures.items():
      tracker.figure(name, path)
    if draw:
      tracker.artefact("report", folder / "report.html")


if __name__ == "__main__":
  cli.guarded(main)
