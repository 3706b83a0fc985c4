"""Entries of a config that stand for one entry of each language."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.evals import translation

LANGUAGE = "{language}"
NAME = "{language_name}"


def expand(
  entries: Mapping[str, Any], languages: Sequence[str]
) -> dict[str, Any]:
  """Replaces each entry with {language} in its name by one of each language.

  In its values, dicts and dataclasses among them, {language} becomes the code,
  such as lij_Latn, and {language_name} FLORES-200's English name. Other
  {fields} stay.

  Raises:
    InputError: a name needs a language and there is none, or two are the same.
  """
  expanded: dict[str, Any] = {}
  for name, entry in entries.items():
    several = {name: entry}
    if LANGUAGE in name:
      several = {name.replace(LANGUAGE, c): _fill(entry, c) for c in languages}
      if not several:
        raise InputError(f"{name!r} is of each language, and there are none")
    if twice := expanded.keys() & several.keys():
      raise InputError(f"{sorted(twice)} are named twice")
    expanded |= several
  return expanded


def _fill(value: Any, code: str) -> Any:
  if dataclasses.is_dataclass(value):
    return dataclasses.replace(value, **_fill(vars(value), code))
  if isinstance(value, Mapping):
    return {name: _fill(item, code) for name, item in value.items()}
  if isinstance(value, tuple | list):
    return type(value)(_fill(item, code) for item in value)
  if not isinstance(value, str):
    return value
  value = value.replace(LANGUAGE, code)
  if NAME in value:
    value = value.replace(NAME, translation.language_name(code))
  return value
