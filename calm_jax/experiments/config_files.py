"""ConfigDicts of config files, made from `Settings` and read back into them.

This is the only module below the commands that knows ml_collections.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from ml_collections import ConfigDict, FieldReference

from calm_jax.core.errors import InputError, check_choice
from calm_jax.experiments.recipe import EXPERIMENTS
from calm_jax.experiments.settings import Settings


def to_config(value: Any) -> Any:
  """Dataclasses and dicts as ConfigDicts; references stay references."""
  if dataclasses.is_dataclass(value):
    value = vars(value)
  if isinstance(value, dict):
    return ConfigDict({name: to_config(item) for name, item in value.items()})
  return value


def to_dict(config: Any) -> Any:
  """A ConfigDict as plain dicts, for results.json; references are resolved."""
  if isinstance(config, ConfigDict):
    return {name: to_dict(item) for name, item in config.items()}
  return config


def read_settings(config: ConfigDict) -> Settings:
  """The typed settings of a config.

  A field that `Settings` lacks must be one that other fields refer to by
  `config.get_ref`, such as the folder of all data. Raises InputError for an
  unknown experiment, an unknown or missing field, or a value of another type.
  """
  check_choice("experiment", config.experiment, list(EXPERIMENTS))
  experiment = EXPERIMENTS[config.experiment]
  known = {field.name for field in dataclasses.fields(Settings)}
  values = {
    name: to_dict(config[name])
    for name, item in config.items(preserve_field_references=True)
    if name in known or not isinstance(item, FieldReference)
  }
  settings = _typed(Settings, values, "config")
  stages = {}
  for name, stage in settings.stages.items():
    where = f"config.stages.{name}.data"
    data = _typed(experiment.data_type, stage.data, where)
    stages[name] = dataclasses.replace(stage, data=data)
  task = _typed(experiment.task_type, settings.task, "config.task")
  return dataclasses.replace(settings, task=task, stages=stages)


def _typed(kind: Any, value: Any, name: str) -> Any:
  """A value as a type that a field is annotated with; dicts as dataclasses."""
  base, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
  if base is Any or (value is None and type(None) in inner):
    return value
  if base is types.UnionType:
    return _typed(inner[0], value, name)
  if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
    return _typed_fields(kind, value, name)
  if base is dict and isinstance(value, Mapping):
    items = value.items()
    return {key: _typed(inner[1], x, f"{name}.{key}") for key, x in items}
  if base is tuple and isinstance(value, list | tuple):
    if inner[1:] == (Ellipsis,):
      value = [_typed(inner[0], item, name) for item in value]
    return tuple(value)
  accepted = (int, float) if base is float else base
  is_bool = isinstance(value, bool)  # which Python takes for an int
  if is_bool != (base is bool) or not isinstance(value, accepted):
    kind_name = getattr(kind, "__name__", kind)
    raise InputError(f"{name}={value!r} is no {kind_name}")
  return value


def _typed_fields(kind: type, values: Mapping[str, Any], name: str) -> Any:
  hints = typing.get_type_hints(kind)
  fields = {field.name: field for field in dataclasses.fields(kind)}
  if unknown := [key for key in values if key not in fields]:
    raise InputError(f"{name} has no field {unknown}; there are {list(fields)}")
  for field in fields.values():
    has_default = (field.default, field.default_factory) != (MISSING, MISSING)
    if field.name not in values and not has_default:
      raise InputError(f"{name}.{field.name} is not given")
  items = values.items()
  return kind(**{k: _typed(hints[k], x, f"{name}.{k}") for k, x in items})
