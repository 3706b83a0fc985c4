"""Reading metrics.jsonl, the numbers of a stage by step; needs no JAX."""

from pathlib import Path
from typing import Any

from calm_jax.core import files
from calm_jax.core.errors import check_int

FILE_NAME = "metrics.jsonl"


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
  """Reads metrics.jsonl: one dict per line, non-finite values as floats.

  Raises InputError if there is none or a line, but for a last one that was cut
  short, is not what `trackers.JsonLines` writes.
  """
  return [
    {name: files.number_from_json(value) for name, value in record.items()}
    for record in read_records(Path(directory) / FILE_NAME)
  ]


def read_records(path: Path) -> list[dict[str, Any]]:
  """Reads the lines of a metrics.jsonl as they are; raises the same."""
  lines = files.read_json_lines(path, {"step": check_int}, drop_unfinished=True)
  return [record for _, record in lines]
