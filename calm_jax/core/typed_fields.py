"""Values of configs as dataclasses, of the types and ranges of their fields."""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Annotated, Any, NamedTuple

from calm_jax.core import errors
from calm_jax.core.errors import InputError

_MOST_OF_ALL = 1e20


class Range(NamedTuple):
  """The limits of a number in a field; without any it is 0 or more."""

  least: int = 0
  most: int | None = None


_ANY = Range()
Count = Annotated[int, Range(1)]
CountOrRest = Annotated[int, Range(-1)]  # -1 for as many as there are
Fraction = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, errors.LARGEST_SEED)]


def typed(kind: Any, value: Any, name: str, limits: Range = _ANY) -> Any:
  """A value as a type that a field is annotated with; dicts as dataclasses.

  A number is within `limits`, or those of a type such as `Count`.
  Raises InputError, which calls it by its `name`, for an unknown or missing
  field, a value of another type, or a number out of its range.
  """
  base, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
  if base is Annotated:
    return typed(inner[0], value, name, inner[1])
  if base is Any or (value is None and type(None) in inner):
    return value
  if base in (types.UnionType, typing.Union):
    is_dict = isinstance(value, Mapping)
    fitting = [k for k in inner if (typing.get_origin(k) is dict) == is_dict]
    return typed([*fitting, *inner][0], value, name)
  if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
    return _typed_fields(kind, value, name)
  if base is dict and isinstance(value, Mapping):
    items = value.items()
    return {key: typed(inner[1], x, f"{name}.{key}") for key, x in items}
  if base is tuple and isinstance(value, list | tuple):
    if inner[1:] == (Ellipsis,):
      value = [typed(inner[0], item, name) for item in value]
    return tuple(value)
  if base is str and isinstance(value, os.PathLike):
    value = os.fspath(value)
  accepted = (int, float) if base is float else base
  is_bool = isinstance(value, bool)  # which Python takes for an int
  if is_bool != (base is bool) or not isinstance(value, accepted):
    kind_name = getattr(kind, "__name__", kind)
    raise InputError(f"{name}={value!r} is no {kind_name}")
  if base is str:
    errors.check_text(name, value)
  elif base is int:
    errors.check_int(name, value, *limits)
  elif base is float:
    least, most = limits
    errors.check_float(name, value, least, most or _MOST_OF_ALL)
  return value


def _typed_fields(kind: type, values: Mapping[str, Any], name: str) -> Any:
  hints = typing.get_type_hints(kind, include_extras=True)
  fields = {field.name: field for field in dataclasses.fields(kind)}
  if unknown := [key for key in values if key not in fields]:
    raise InputError(f"{name} has no field {unknown}; there are {list(fields)}")
  for field in fields.values():
    has_default = (field.default, field.default_factory) != (MISSING, MISSING)
    if field.name not in values and not has_default:
      raise InputError(f"{name}.{field.name} is not given")
  prefix = f"{name}." if name else ""
  items = values.items()
  return kind(**{k: typed(hints[k], x, f"{prefix}{k}") for k, x in items})
