"""Packages that only some commands need, which are installed as extras."""

import importlib
from types import ModuleType

from calm_jax.core.errors import InputError


def import_extra(asker: str, package: str, extra: str) -> ModuleType:
  """Imports a package, or a module of it.

  InputError says who asked, and which extra has it.
  """
  try:
    return importlib.import_module(package)
  except ImportError as error:
    name = package.partition(".")[0]
    raise InputError(
      f"{asker}: the package {name} is not installed; install it with"
      f" pip install 'calm_jax[{extra}]'"
    ) from error
