"""Values of configs as dataclasses, of the types and ranges of their fields."""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from calm_jax.core import errors
from calm_jax.core.errors import InputError

# The least numbers of fields by their names, and the largest; others are at
# least 0. For an axis of a mesh, -1 stands for all devices that are left.
_LEAST = dict.fromkeys(
  ("lora_rank", "effort", "data", "fsdp", "tensor", "sequence"), -1
)
# fmt: off
_LEAST |= dict.fromkeys((
  "batch_size", "length", "accumulate", "steps", "log_every", "eval_every",
  "checkpoint_every", "keep_last", "unroll", "heartbeat", "width",
  "num_layers", "num_heads", "num_kv_heads", "mlp_width", "max_length",
  "eval_batch_size", "eval_length", "sample_tokens", "prompt_tokens", "trials",
  "num_keys", "num_examples", "min_terms", "max_terms", "max_new_tokens",
  "compiles",
), 1)
# fmt: on
_MOST = {"seed": errors.LARGEST_SEED}
_MOST |= dict.fromkeys(
  ("b1", "b2", "final", "fraction", "bad_lines", "effort"), 1
)
_MOST_OF_ALL = 1e20


def typed(kind: Any, value: Any, name: str) -> Any:
  """A value as a type that a field is annotated with; dicts as dataclasses.

  Raises InputError, which calls it by its `name`, for an unknown or missing
  field, a value of another type, or a number out of its range.
  """
  base, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
  if base is Any or (value is None and type(None) in inner):
    return value
  if base is types.UnionType:
    return typed(inner[0], value, name)
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
  elif base in (int, float):
    _check_range(name, value)
  return value


def _check_range(name: str, value: float) -> None:
  field = name.rpartition(".")[2]
  least = _LEAST.get(field, 0)
  if isinstance(value, int):
    errors.check_int(name, value, least, _MOST.get(field))
  else:
    errors.check_float(name, value, least, _MOST.get(field, _MOST_OF_ALL))


def _typed_fields(kind: type, values: Mapping[str, Any], name: str) -> Any:
  hints = typing.get_type_hints(kind)
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
