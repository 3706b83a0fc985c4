"""Records to prompts and completions, by their fields or by templates.

A template is a Python format string over the fields of a record, such as
"Translate: {source}\\n"; "{translation[de]}" looks into a field.
"""

import re
import string
from collections.abc import Callable, Sequence

from calm_jax.core.errors import InputError, check_text
from calm_jax.data.records import Record
from calm_jax.text import chat
from calm_jax.text.chat import Messages

# Of a record its prompt, completion, and messages if it is a conversation.
Texts = Callable[[Record], tuple[str, str, Messages]]


def templates(prompt: str, completion: str, columns: Sequence[str]) -> Texts:
  """A function that fills two templates, of prompt and completion.

  `columns` are all the fields that records have, or () if it is not known; a
  template that names another field, or is none, raises InputError.
  """
  fills = _template(prompt, columns), _template(completion, columns)

  def texts(record: Record) -> tuple[str, str, Messages]:
    given, learnt = (fill(record) for fill in fills)
    if prompt and not given:
      raise ValueError(f"its prompt is empty, of the template {prompt!r}")
    return _checked(given, learnt)

  return texts


def own_fields(prompt: str, completion: str, messages: str, text: str) -> Texts:
  """A function that takes `prompt` and `completion`, or else a conversation of
  `messages`, or else `text` as plain."""

  def texts(record: Record) -> tuple[str, str, Messages]:
    if prompt in record and completion in record:
      return _checked(
        _string_field(record, prompt), _string_field(record, completion)
      )
    if messages in record:
      return _conversation(chat.check(record[messages], messages))
    if text in record:
      return _checked("", _string_field(record, text))
    raise ValueError(
      f"expected {text!r}, or {prompt!r} and {completion!r}, or {messages!r},"
      f" but it has {_names(record)}; name the fields in the data configuration"
    )

  return texts


def _template(template: str, columns: Sequence[str]) -> Callable[[Record], str]:
  formatter = string.Formatter()
  try:
    names = [name for _, name, _, _ in formatter.parse(template)]
  except ValueError as error:
    raise InputError(
      f"the template {template!r} cannot be read: {error}; a brace that is"
      " meant as text is written twice"
    ) from error
  fields = [name for name in names if name is not None]
  for name in fields:
    top = re.split(r"[.\[]", name)[0]
    if not top or top.isdigit():
      raise InputError(
        f"the template {template!r} has a brace without the name of a field;"
        " write {field}, or {{ for a brace that is meant as text"
      )
    if columns and top not in columns:
      verb = "are" if len(columns) > 1 else "is"
      raise InputError(
        f"the template {template!r} asks for {top!r}, but there {verb}"
        f" {_names(columns)}"
      )

  def fill(record: Record) -> str:
    try:
      for name in fields:
        value, _ = formatter.get_field(name, (), record)
        if not isinstance(value, str | int | float):
          raise ValueError(
            f"{name!r} is a {type(value).__name__}, where text or a number is"
            f" expected in the template {template!r}"
          )
      return template.format_map(record)
    except KeyError as error:
      raise ValueError(
        f"the template {template!r} asks for {error.args[0]!r}, but it has"
        f" {_names(record)}"
      ) from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
      raise ValueError(
        f"the template {template!r} cannot be filled: {error}"
      ) from error

  return fill


def _checked(prompt: str, completion: str) -> tuple[str, str, Messages]:
  if not completion:
    raise ValueError("there is no text to learn; remove the line")
  check_text("it", prompt + completion)
  return prompt, completion, ()


def _conversation(messages: Messages) -> tuple[str, str, Messages]:
  """The texts of a conversation that are given, and that are learnt."""
  texts: dict[bool, list[str]] = {True: [], False: []}
  for message in messages:
    texts[message["role"] == chat.ASSISTANT].append(message["content"])
  given, learnt, _ = _checked("\n".join(texts[False]), "".join(texts[True]))
  return given, learnt, messages


def _string_field(record: Record, name: str) -> str:
  """Returns a field of a record; raises ValueError if it is no text."""
  return check_text(repr(name), record[name])


def _names(fields) -> str:
  return ", ".join(map(repr, fields)) or "no fields"
