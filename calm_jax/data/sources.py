"""Files of examples: jsonl and plain text."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from calm_jax.errors import InputError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TextExample:
  """One example; an empty `prompt` means plain text.

  Attributes:
    prompt: text that is given.
    completion: text that is learnt.
    origin: where it came from, for messages, such as "data.jsonl line 3".
  """

  prompt: str
  completion: str
  origin: str


def read_examples(
  path: str | Path,
  *,
  text_field: str = "text",
  prompt_field: str = "prompt",
  completion_field: str = "completion",
) -> list[TextExample]:
  """Reads a .jsonl or a .txt file; blank lines are skipped.

  A jsonl line is an object with `prompt_field` and `completion_field`, or else
  with `text_field` (plain text). A line of a .txt file is one document.

  Raises:
    InputError: no such file, another kind of file, no examples in it, or a bad
      line; the message names the file and the line.
  """
  path = Path(path)
  if not path.is_file():
    raise InputError(f"no examples at {path}: there is no such file")
  if path.suffix not in (".jsonl", ".txt"):
    raise InputError(
      f"cannot read examples from {path}: its name must end in .jsonl (one"
      " JSON object a line) or .txt (one document a line)"
    )
  examples = []
  for origin, line in _lines(path):
    if path.suffix == ".txt":
      examples.append(TextExample("", line, origin))
      continue
    record = _parse(line, origin)
    if prompt_field in record and completion_field in record:
      prompt = _field(record, prompt_field, origin)
      completion = _field(record, completion_field, origin)
    elif text_field in record:
      prompt, completion = "", _field(record, text_field, origin)
    else:
      raise InputError(
        f"{origin}: expected {text_field!r}, or {prompt_field!r} and"
        f" {completion_field!r}, but it has {', '.join(map(repr, record))};"
        " name the fields in the data configuration"
      )
    if not completion:
      raise InputError(f"{origin}: there is no text to learn; remove the line")
    examples.append(TextExample(prompt, completion, origin))
  if not examples:
    raise InputError(f"{path} holds no examples: every line is blank")
  return examples


def read_prompts(path: str | Path) -> list[str]:
  """The "prompt" of each line of a .jsonl file.

  Raises:
    InputError: no such file, or a line without a prompt; it is named.
  """
  path = Path(path)
  if not path.is_file():
    raise InputError(f"no prompts at {path}: there is no such file")
  prompts = []
  for origin, line in _lines(path):
    record = _parse(line, origin)
    if "prompt" not in record:
      raise InputError(f"{origin}: it has no 'prompt'")
    prompts.append(_field(record, "prompt", origin))
  return prompts


def take_fraction(examples: Sequence[T], fraction: float, seed: int) -> list[T]:
  """A random part of `examples`, in their order.

  For one seed the parts are nested: 5% lies inside 7% (the paper's D_C for
  languages, §4.2, and for code, §4.3).

  Raises:
    InputError: `fraction` is not in (0, 1], or leaves no example.
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


def _lines(path: Path) -> Iterator[tuple[str, str]]:
  # Bytes are split, not text: str.splitlines also splits at U+2028.
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      origin = f"{path} line {number}"
      try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
      except UnicodeDecodeError as error:
        raise InputError(
          f"{origin}: not UTF-8 text ({error}); convert the file"
        ) from error
      text = text.rstrip("\r\n")
      if text.strip():
        yield origin, text


def _parse(line: str, origin: str) -> dict:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise InputError(
      f"{origin}: not JSON ({error}); a line must be one JSON object"
    ) from error
  if not isinstance(record, dict):
    raise InputError(
      f"{origin}: a JSON {type(record).__name__}, where an object is expected"
    )
  return record


def _field(record: dict, name: str, origin: str) -> str:
  value = record[name]
  if not isinstance(value, str):
    raise InputError(
      f"{origin}: {name!r} is a {type(value).__name__}, where a string is"
      " expected"
    )
  return value
