"""Text examples from files, tfds and Hugging Face data sets."""

import dataclasses
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError, check_text
from calm_jax.core.typed_fields import Fraction
from calm_jax.data import records
from calm_jax.data.templates import Texts, own_fields, templates
from calm_jax.text.chat import Messages

T = TypeVar("T")

KINDS = ("jsonl", "text", "tsv", "parallel", "tfds", "hf")
_SUFFIXES = {".jsonl": "jsonl", ".txt": "text", ".tsv": "tsv"}
_NAMED = 10


@dataclasses.dataclass(frozen=True)
class TextExample:
  """A text that is given, "" for plain text, and the text that is learnt.

  Of a conversation these are what its assistant is told, and says; `messages`
  have the order. `origin` says where it came from: "data.jsonl line 3".
  """

  prompt: str
  completion: str
  origin: str
  messages: Messages = ()

  @property
  def is_plain(self) -> bool:
    """True for plain text, which may go on in a further row."""
    return not self.prompt and not self.messages


@dataclasses.dataclass(frozen=True)
class ExampleSource:
  """The place of examples, and how records become prompt and completion.

  Attributes:
    path: a file; a pattern of files, such as "data/*.jsonl", read in the order
      of their names; "tfds:NAME" or "tfds:NAME/CONFIG"; "hf:NAME" or
      "hf:NAME:CONFIG", where NAME is of the hub or a local folder.
    kind: one of `KINDS`; "" for what the path says: its suffix (.jsonl, .txt,
      .tsv) or what stands before its colon, or "parallel" if `target` is given.
    target: of kind parallel, the second file: its line i belongs to line i of
      the first.
    split: of kinds tfds and hf.
    columns: names for a tsv file, which has no header, or two parallel files.
    prompt, completion: templates over a record's fields (see `templates`), the
      prompt "" for plain text. Both "": the fields named below.
    text_field, prompt_field, completion_field, messages_field: a record with a
      prompt and a completion is an example of these, one with messages a
      conversation (docs/data.md); another, such as a line of a text file, is
      plain text.
    rows: a slice of the good examples, such as ":5000" or "5000:".
    join: how many texts, one after the other, make one example; of plain text
      only, such as the sentences of a page.
    separator: what stands between them.
    bad_lines: the share of lines that may be bad; they are named and skipped.
    data_dir: of kind tfds, where prepared data sets are; "" for its own place.
  """

  path: str
  kind: str = ""
  target: str = ""
  split: str = "train"
  columns: tuple[str, ...] = ("source", "target")
  prompt: str = ""
  completion: str = ""
  text_field: str = "text"
  prompt_field: str = "prompt"
  completion_field: str = "completion"
  messages_field: str = "messages"
  rows: str = ""
  join: int = 1
  separator: str = " "
  bad_lines: Fraction = 0.0
  data_dir: str = ""


def read_examples(
  source: ExampleSource, report: Callable[[str], None] | None = None
) -> list[TextExample]:
  """Reads all examples of a source, in order; blank lines are skipped.

  If lines were bad and skipped, `report` gets one message: their number and, a
  line each, which and why. More than `bad_lines` raise InputError, which names
  the first of them; so does a bad choice, and a source without examples.
  """
  kind = _kind(source)
  _check(source, kind)
  part, texts = row_slice(source.rows), _texts(source, kind)
  examples, bad = [], []
  for origin, read in _entries(source, kind):
    try:
      if (record := read()) is not None:
        given, learnt, messages = texts(record)
        examples.append(TextExample(given, learnt, origin, messages))
    except ValueError as error:
      bad.append(f"{origin}: {error}")
  if bad:
    _judge(source, bad, len(examples) + len(bad), report)
  if not examples:
    why = "bad" if bad else "blank"
    raise InputError(f"{source.path} holds no examples: every line is {why}")
  if not examples[part]:
    raise InputError(
      f"{source.path}: rows {source.rows!r} of {len(examples):,} good examples"
      " leave none"
    )
  return _joined(source, examples[part])


def _joined(
  source: ExampleSource, examples: list[TextExample]
) -> list[TextExample]:
  """Makes one example of each `join` texts; the last one may have fewer."""
  if source.join == 1:
    return examples
  if given := [each.origin for each in examples if not each.is_plain]:
    raise InputError(
      f"{source.path}: join={source.join} is for plain text, and {given[0]} has"
      " a prompt"
    )
  joined = []
  for at in range(0, len(examples), source.join):
    group = examples[at : at + source.join]
    text = source.separator.join(each.completion for each in group)
    joined.append(TextExample("", text, group[0].origin))
  return joined


def _judge(
  source: ExampleSource, bad: list[str], total: int, report: Callable | None
) -> None:
  """Reports bad lines, or raises if there are more than the source allows."""
  count, share = len(bad), len(bad) / total
  summary = f"{source.path}: {count:,} of {total:,} lines are bad ({share:.2%})"
  if share > source.bad_lines:
    named = bad[:_NAMED]
    if count > _NAMED:
      named.append(f"and {count - _NAMED:,} more")
    raise InputError(
      f"{summary}, more than bad_lines={source.bad_lines} allows; repair or"
      " remove them, or raise bad_lines to skip them:\n" + "\n".join(named)
    )
  if report is not None:
    report("\n".join([f"{summary} and skipped:", *bad]))


def read_prompts(path: Path) -> list[str]:
  """The "prompt" of each line of a .jsonl file; InputError names a bad line."""
  lines = files.read_json_lines(path, {"prompt": check_text})
  return [record["prompt"] for _, record in lines]


def take_fraction(examples: Sequence[T], fraction: float, seed: int) -> list[T]:
  """A random part of `examples`, in their order.

  For one seed the parts are nested: 5% lies inside 7% (the paper's D_C for
  languages, §4.2, and for code, §4.3).
  """
  if not 0 < fraction <= 1:
    raise InputError(f"fraction {fraction} is not above 0 and at most 1")
  count = round(fraction * len(examples))
  if count == 0:
    raise InputError(
      f"fraction {fraction} of {len(examples)} examples leaves none; raise it"
    )
  order = np.random.default_rng(seed).permutation(len(examples))
  return [examples[i] for i in np.sort(order[:count])]


def row_slice(rows: str) -> slice:
  """ ":100" or "6000:" as a slice; "" is all."""
  if rows and not re.fullmatch(r"-?\d*:-?\d*", rows):
    raise InputError(f"rows {rows!r}: expected a slice such as :5000 or 5000:")
  try:
    ends = (rows or ":").split(":")
    return slice(*(int(end) if end else None for end in ends))
  except ValueError as error:
    raise InputError(f"rows {rows!r}: {error}") from error


def _check(source: ExampleSource, kind: str) -> None:
  if kind and kind not in KINDS:
    problem = f"unknown kind {kind!r}; one of {', '.join(KINDS)}"
  elif source.target and source.kind not in ("", "parallel"):
    problem = f"target is of kind parallel, not {kind}"
  elif kind == "parallel" and not (source.target and len(source.columns) == 2):
    problem = "kind parallel takes a second file, target, and two columns"
  elif source.prompt and not source.completion:
    problem = "a template of the prompt and none of the completion; give both"
  elif source.join < 1:
    problem = f"join={source.join} must be 1 or more"
  elif not 0 <= source.bad_lines <= 1:
    problem = f"bad_lines {source.bad_lines} is a share, from 0 to 1"
  else:
    return
  raise InputError(f"{source.path}: {problem}")


def _kind(source: ExampleSource) -> str:
  """The kind that the source says; "" where each file's suffix does."""
  if source.kind:
    return source.kind
  prefix = source.path.partition(":")[0]
  if prefix in ("tfds", "hf"):
    return prefix
  return "parallel" if source.target else ""


def _texts(source: ExampleSource, kind: str) -> Texts:
  """The function that makes prompt and completion of the source's records."""
  kind = kind or _SUFFIXES.get(files.suffix(Path(source.path)), "")
  columns = (source.text_field,) if kind == "text" else ()
  if kind in ("tsv", "parallel"):
    columns = tuple(source.columns)
  if len(set(columns)) != len(columns):
    raise InputError(f"{source.path}: columns {columns} repeat a name")
  if source.completion:
    try:
      return templates(source.prompt, source.completion, columns)
    except InputError as error:
      raise InputError(f"{source.path}: {error}") from error
  names = source.prompt_field, source.completion_field, source.text_field
  if columns and not (set(names[:2]) <= set(columns) or names[2] in columns):
    raise InputError(
      f"{source.path}: no column is called {names[2]}, or {names[0]} and"
      f" {names[1]}; name them so in columns, or give templates, such as the"
      f" completion {'{' + columns[-1] + '}'!r}"
    )
  return own_fields(*names[:2], source.messages_field, names[2])


def _entries(source: ExampleSource, kind: str) -> Iterator[records.Entry]:
  """The records of all files, with their origins."""
  columns, name = tuple(source.columns), source.path.removeprefix(f"{kind}:")
  if kind == "tfds":
    yield from records.tfds(name, source.split, source.data_dir)
  elif kind == "hf":
    yield from records.hf(name, source.split)
  elif kind == "parallel":
    paths = _file(source.path), _file(source.target)
    yield from records.parallel(*paths, columns)
  else:
    for path in _files(source.path):
      match kind or _SUFFIXES.get(files.suffix(path)):
        case "jsonl":
          yield from files.entries(path, files.parse_json_line)
        case "text":
          yield from records.table(path, (source.text_field,))
        case "tsv":
          yield from records.table(path, columns, "\t")
        case _:
          raise InputError(
            f"cannot read examples from {path}: its name must end in .jsonl"
            " (one JSON object a line), .txt (one document a line) or .tsv"
            " (columns between tabs), each with .gz or without, or its kind"
            " must be given"
          )


def _files(path: str) -> list[Path]:
  """The file of this name, or all whose names fit it as a pattern."""
  if Path(path).is_file() or not glob.has_magic(path):
    return [_file(path)]
  names = sorted(glob.glob(path, recursive=True))
  if not (found := [Path(name) for name in names if Path(name).is_file()]):
    raise InputError(f"no examples at {path}: no file's name is like it")
  return found


def _file(path: str) -> Path:
  if not Path(path).is_file():
    raise InputError(f"no examples at {path}: there is no such file")
  return Path(path)
