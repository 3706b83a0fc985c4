"""What the command lines share."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from calm_jax.errors import InputError

_USAGE = 2


def run_with_config(main: Callable) -> None:
  """Runs main(config) with the file named by --config.

  Wrong input ends with its message and exit code 2, without a traceback.
  """
  config = config_flags.DEFINE_config_file(
    "config", None, "a file of configs/, with :variant", lock_config=True
  )
  allowed = flags.DEFINE_bool(
    "allow_code_execution",
    False,
    "evaluate by running, in a sandbox, programs that models write",
  )

  def guarded(argv):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax tells of every file.
    try:
      if len(argv) > 1:
        raise InputError(f"unexpected arguments: {argv[1:]}")
      loaded = _loaded(config)
      if allowed.value:
        _allow_code_execution(loaded)
      main(loaded)
    except InputError as error:
      _stop(error)

  flags.mark_flag_as_required("config")
  app.run(guarded, flags_parser=_parse)


def guarded(main: Callable[[], None]) -> None:
  """Runs main(); wrong input ends as for `run_with_config`."""
  try:
    main()
  except InputError as error:
    _stop(error)


def keep_compiled_programs() -> None:
  """Keeps compiled programs on disk, for the next start of a command line.

  In JAX_COMPILATION_CACHE_DIR if that is set, else in ~/.cache/calm_jax.
  """
  if not jax.config.jax_compilation_cache_dir:
    folder = Path.home() / ".cache" / "calm_jax"
    jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except (flags.Error, OSError) as error:
    # The flag's own message holds the traceback of what the file raised.
    first = cause = error
    while cause := cause.__context__:
      first = cause if isinstance(cause, InputError) else first
    _stop(first)
  except AttributeError as error:
    frames = traceback.walk_tb(error.__traceback__)
    if any(frame.f_code.co_name == "get_config" for frame, _ in frames):
      raise  # A mistake inside the file, which the traceback shows.
    _stop(f"--config has no option {error}")


def _loaded(config):
  try:
    config.value.keys()
  except OSError as error:
    # What was wrong with the file is raised by its first use.
    raise InputError(f"--config: {error}") from error
  return config.value


def _allow_code_execution(config) -> None:
  if "task" not in config or "allow_code_execution" not in config.task:
    raise InputError("--allow_code_execution: this experiment runs no code")
  config.task.allow_code_execution = True


def _stop(error) -> NoReturn:
  print(f"error: {error}", file=sys.stderr)
  sys.exit(_USAGE)
