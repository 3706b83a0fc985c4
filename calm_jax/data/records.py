"""Records of files of lines, of tfds and of Hugging Face data sets.

A function here yields entries (see `files.Entry`) of records: dicts of fields.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.core.extras import import_extra

Record = dict[str, Any]
Entry = files.Entry[Record]


def table(
  path: Path, columns: tuple[str, ...], separator: str = ""
) -> Iterator[Entry]:
  """The values of a line, without header and quotes; one without separator."""

  def parse(line: bytes) -> Record | None:
    text = files.decode_line(line)
    if not text.strip():
      return None
    values = text.split(separator) if separator else [text]
    if len(values) != len(columns):
      raise ValueError(
        f"{len(values)} columns, where {len(columns)} are expected"
        f" ({', '.join(columns)}); they stand between tabs"
      )
    return dict(zip(columns, values, strict=True))

  return files.entries(path, parse)


def parallel(
  path: files.Readable, target: files.Readable, columns: tuple[str, ...]
) -> Iterator[Entry]:
  """Line i of one file with line i of the other, as two columns."""

  def parse(lines: tuple[bytes, bytes]) -> Record | None:
    values = []
    for file, line in zip((path, target), lines, strict=True):
      try:
        values.append(files.decode_line(line))
      except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    empty = [not value.strip() for value in values]
    if all(empty):
      return None
    if any(empty):
      file = path if empty[0] else target
      raise ValueError(f"it is empty in {file}, and not in the other file")
    return dict(zip(columns, values, strict=True))

  ours, theirs = (
    [line for _, line in files.read_lines(file)] for file in (path, target)
  )
  for longer, other in ((ours, theirs), (theirs, ours)):
    while len(longer) > len(other) and not longer[-1].strip():
      longer.pop()
  if len(ours) != len(theirs):
    raise InputError(
      f"{path} has {len(ours):,} lines and {target} has {len(theirs):,}: lines"
      " of the same number belong together, so there must be as many"
    )
  for number, lines in enumerate(zip(ours, theirs, strict=True), start=1):
    origin = f"{path} and {target} line {number}"
    yield origin, functools.partial(parse, lines)


def tfds(name: str, split: str, data_dir: str) -> Iterator[Entry]:
  """A split of a data set that tensorflow_datasets knows; no TensorFlow."""
  # It takes its time, and most runs read files.
  import tensorflow_datasets

  try:
    records: Any = tensorflow_datasets.data_source(
      name, split=split, data_dir=data_dir or None
    )
  except Exception as error:  # Of many kinds, of its own and of the data set.
    raise InputError(
      f"cannot read tfds:{name}, split {split!r}: {error}; where it cannot be"
      " prepared without TensorFlow, prepare it elsewhere with tfds build"
      " --file_format=array_record, and give data_dir"
    ) from error
  for i in range(len(records)):
    yield f"tfds:{name} {split} row {i}", lambda i=i: _plain(records[i])


def hf(path: str, split: str) -> Iterator[Entry]:
  """A split of a data set of the hub, or of a folder of files or save_to_disk.

  `path` is NAME or NAME:CONFIG. A slice such as "train[:10%]" is a split, but
  not of save_to_disk.
  """
  name, _, config = path.partition(":")
  datasets = import_extra(f"hf:{name}", "datasets", "hf")
  saved = ("dataset_info.json", "dataset_dict.json")
  try:
    if any((Path(name) / file).is_file() for file in saved):
      records = _saved_split(datasets.load_from_disk(name), name, split)
    else:
      records = datasets.load_dataset(name, config or None, split=split)
  except InputError:
    raise
  except Exception as error:  # Of many kinds, of its own and of its readers.
    raise InputError(
      f"cannot read hf:{path}, split {split!r}: {error}"
    ) from error
  for i, record in enumerate(records):
    yield f"hf:{name} {split} row {i}", functools.partial(_plain, record)


def _saved_split(saved, name: str, split: str):
  if not isinstance(saved, dict):  # one split, which may not say its name
    saved = {str(saved.split or "train"): saved}
  if split not in saved:
    raise InputError(
      f"hf:{name} has no split {split!r}; it has {', '.join(saved)}"
    )
  return saved[split]


def _plain(value) -> Any:
  """Bytes as text and numpy's scalars as Python's, within dicts too."""
  if isinstance(value, dict):
    return {key: _plain(v) for key, v in value.items()}
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError as error:
      raise ValueError(f"not UTF-8 text ({error})") from error
  return value
