"""Metrics on disk: JSON lines and TensorBoard. Reading them needs no JAX."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from calm_jax.core import files
from calm_jax.core.errors import check_int

FILE_NAME = "metrics.jsonl"


class MetricWriter(contextlib.AbstractContextManager):
  """Appends scalars to metrics.jsonl and to TensorBoard event files.

  All processes but the first are not `active`: their calls do nothing.
  """

  def __init__(
    self, directory: Path, *, resume_step: int = -1, active: bool = True
  ):
    """Opens the files and drops the lines after `resume_step`.

    A resumed run, whose checkpoint that is, writes them again. Raises as
    `read_metrics`.
    """
    self._active = active
    if not active:
      return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE_NAME
    if path.exists():
      kept = [line for line in _records(path) if line["step"] <= resume_step]
      files.write_json_lines(path, kept)
    self._file = path.open("a", encoding="utf-8")
    # TensorBoard ignores an earlier process's events from the purge step on.
    self._board = SummaryWriter(str(directory), purge_step=resume_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line and one TensorBoard scalar per value; flushes both."""
    if not self._active:
      return
    line = files.to_json({"step": step, **values})
    # A single write, so that a kill can cut the line but not interleave it.
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    self._board.flush()

  def __exit__(self, *exc_info) -> None:
    if self._active:
      self._file.close()
      self._board.close()


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
  """Reads metrics.jsonl: one dict per line, non-finite values as floats.

  Raises InputError if there is none or a line, but for a last one that was cut
  short, is not what `MetricWriter` writes.
  """
  return [
    {name: files.number_from_json(value) for name, value in record.items()}
    for record in _records(Path(directory) / FILE_NAME)
  ]


def _records(path: Path) -> list[dict[str, Any]]:
  lines = files.read_json_lines(path, {"step": check_int}, drop_unfinished=True)
  return [record for _, record in lines]
