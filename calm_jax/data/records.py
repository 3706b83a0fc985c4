"""Records of files of lines, of tfds and of Hugging Face data sets.

A function here yields entries: an origin ("a.tsv line 3") and a function that
reads the record there, its fields by name, or None where a line is blank. It
raises ValueError for a bad record, so that the next can be read.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError

Record = dict[str, Any]
Entry = tuple[str, Callable[[], Record | None]]


def jsonl(path: Path) -> Iterator[Entry]:
  """One JSON object a line."""
  return _entries(path, files.parse_json_line)


def text(path: Path, field: str) -> Iterator[Entry]:
  """One document a line, as the record {field: line}."""

  def parse(line: bytes, number: int) -> Record | None:
    document = files.decode_line(line, number)
    return {field: document} if document.strip() else None

  return _entries(path, parse)


def tsv(path: Path, columns: tuple[str, ...]) -> Iterator[Entry]:
  """Values between tabs, without a header and without quotes."""

  def parse(line: bytes, number: int) -> Record | None:
    joined = files.decode_line(line, number)
    if not joined.strip():
      return None
    values = joined.split("\t")
    if len(values) != len(columns):
      raise ValueError(
        f"{len(values)} columns, where {len(columns)} are expected"
        f" ({', '.join(columns)}); they stand between tabs"
      )
    return dict(zip(columns, values, strict=True))

  return _entries(path, parse)


def _entries(
  path: Path, parse: Callable[[bytes, int], Record | None]
) -> Iterator[Entry]:
  for number, line in files.read_lines(path):
    yield f"{path} line {number}", functools.partial(parse, line, number)


def parallel(
  path: Path, target: Path, columns: tuple[str, ...]
) -> Iterator[Entry]:
  """Line i of one file with line i of the other, as two columns.

  Raises:
    InputError: at the end, the files have different numbers of lines.
  """

  def parse(lines, number):
    values = [files.decode_line(line, number) for line in lines]
    empty = [not value.strip() for value in values]
    if all(empty):
      return None
    for is_empty, file in zip(empty, (path, target), strict=True):
      if is_empty:
        raise ValueError(f"it is empty in {file}, and not in the other file")
    return dict(zip(columns, values, strict=True))

  counts = [0, 0]
  both = itertools.zip_longest(files.read_lines(path), files.read_lines(target))
  for number, pair in enumerate(both, start=1):
    for i, line in enumerate(pair):
      counts[i] += line is not None
    if None not in pair:
      lines = [line for _, line in pair]
      yield (
        f"{path} and {target} line {number}",
        functools.partial(parse, lines, number),
      )
  if counts[0] != counts[1]:
    raise InputError(
      f"{path} has {counts[0]:,} lines and {target} has {counts[1]:,}: lines of"
      " the same number belong together, so there must be as many"
    )


def tfds(name: str, split: str, data_dir: str) -> Iterator[Entry]:
  """A split of a data set that tensorflow_datasets knows; no TensorFlow.

  Raises:
    InputError: it cannot be had.
  """
  # It takes its time, and most runs read files.
  import tensorflow_datasets

  try:
    # It raises many kinds of errors, of its own and of the data set.
    records = tensorflow_datasets.data_source(
      name, split=split, data_dir=data_dir or None
    )
  except Exception as error:
    raise InputError(
      f"cannot read tfds:{name}, split {split!r}: {error}; where it cannot be"
      " prepared without TensorFlow, prepare it elsewhere with tfds build"
      " --file_format=array_record, and give data_dir"
    ) from error
  for i in range(len(records)):
    # As records[i] shows it, so the first row is 0.
    yield f"tfds:{name} {split} row {i}", lambda i=i: _plain(records[i])


def hf(name: str, config: str, split: str) -> Iterator[Entry]:
  """A split of a data set of the Hugging Face hub, or of a local folder.

  Args:
    name: on the hub, or a folder: of save_to_disk, or of data files.
    config: of several of one name; "" for its default.
    split: its name, with a slice such as "train[:10%]" if it is not of
      save_to_disk.

  Raises:
    InputError: `datasets` is not installed, or it cannot be had.
  """
  try:
    import datasets
  except ImportError as error:
    raise InputError(
      f"hf:{name}: the package datasets is not installed; install it with"
      " pip install 'calm_jax[hf]'"
    ) from error
  saved = ("dataset_info.json", "dataset_dict.json")
  try:
    if any((Path(name) / file).is_file() for file in saved):
      records = _saved_split(datasets.load_from_disk(name), name, split)
    else:
      records = datasets.load_dataset(name, config or None, split=split)
  except InputError:
    raise
  except Exception as error:  # Of many kinds, of its own and of its readers.
    full = f"{name}:{config}" if config else name
    raise InputError(
      f"cannot read hf:{full}, split {split!r}: {error}"
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


def _plain(value):
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
