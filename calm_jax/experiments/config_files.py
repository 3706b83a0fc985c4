"""ConfigDicts of config files, made from `Settings` and read back into them.

This is the only module below the commands that knows ml_collections.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, FieldReference

from calm_jax.core import typed_fields
from calm_jax.core.errors import check_choice
from calm_jax.experiments.recipe import EXPERIMENTS
from calm_jax.experiments.settings import Settings


def to_config(value: Any) -> Any:
  """Dataclasses and dicts as ConfigDicts; references stay references.

  A field that takes a text or a dict becomes a reference, which takes both.
  """
  if isinstance(value, Settings):
    paths = FieldReference(to_config(value.augmenting), field_type=object)
    value = vars(value) | {"augmenting": paths}
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
  unknown experiment, and where `typed_fields` does.
  """
  check_choice("experiment", config.experiment, list(EXPERIMENTS))
  experiment = EXPERIMENTS[config.experiment]
  known = {field.name for field in dataclasses.fields(Settings)}
  values = {
    name: to_dict(config[name])
    for name, item in config.items(preserve_field_references=True)
    if name in known or not isinstance(item, FieldReference)
  }
  settings = typed_fields.typed(Settings, values, "config")
  stages = {}
  for name, stage in settings.stages.items():
    where = f"config.stages.{name}.data"
    data = typed_fields.typed(experiment.data_type, stage.data, where)
    stages[name] = dataclasses.replace(stage, data=data)
  task = typed_fields.typed(experiment.task_type, settings.task, "config.task")
  return dataclasses.replace(settings, task=task, stages=stages)
