"""What the command lines share."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from calm_jax.core.errors import (
  EXIT_CODES,
  InputError,
  LostProcess,
  StorageError,
)
from calm_jax.training import signals

_LINES = re.MULTILINE | re.DOTALL
_NOTHING = "the same command starts from the beginning"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def run_with_config(main: Callable, options: type | None = None) -> None:
  """Runs main(config), with the file named by --config.

  With a dataclass of options it is main(config, options), by a flag for each
  field. A field without a default must be given. Such a command keeps nothing
  for its next start.

  What is no fault of the program ends with a message, without a traceback, and
  with the exit code that `errors` gives it.
  """
  # --help lists the flags as those of the module that is run.
  flags.disclaim_key_flags()
  config = config_flags.DEFINE_config_file(
    "config", None, "a file of configs/, with :variant", lock_config=True
  )
  allowed = flags.DEFINE_bool(
    "allow_code_execution",
    False,
    "evaluate by running, in a sandbox, programs that models write",
  )

  def run(argv):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax tells of every file.
    with _told():
      if len(argv) > 1:
        raise InputError(f"unexpected arguments: {argv[1:]}")
      loaded = _loaded(config)
      if allowed.value:
        _allow_code_execution(loaded)
      workdir = Path(loaded.workdir)
      with signals.raised(
        loaded.grace, lambda: _NOTHING if options else _kept(workdir)
      ):
        given = {f.name: flags.FLAGS[f.name].value for f in fields}
        main(loaded, *([options(**given)] if options else []))

  fields = dataclasses.fields(options) if options else ()
  for field in fields:
    _define(field, options.__doc__)
  flags.mark_flag_as_required("config")
  app.run(run, flags_parser=_parse)


def _define(field: dataclasses.Field, described: str) -> None:
  make = {
    "str": flags.DEFINE_string, "bool": flags.DEFINE_bool,
    "int": flags.DEFINE_integer, "float": flags.DEFINE_float,
  }[field.type]  # fmt: skip
  required = field.default is dataclasses.MISSING
  said = re.search(rf"^ +{field.name}: ((?:(?!^ +\w+: ).)*)", described, _LINES)
  make(
    field.name, None if required else field.default, " ".join(said[1].split())
  )
  if required:
    flags.mark_flag_as_required(field.name)


def guarded(main: Callable[[], None]) -> None:
  """Runs main(); errors end as for `run_with_config`."""
  with _told():
    main()


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
    _stop(InputError(first))
  except AttributeError as error:
    frames = traceback.walk_tb(error.__traceback__)
    if any(frame.f_code.co_name == "get_config" for frame, _ in frames):
      raise  # A mistake inside the file, which the traceback shows.
    _stop(InputError(f"--config has no option {error}"))


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


@contextlib.contextmanager
def _told() -> Iterator[None]:
  """Ends the process on an error: with its message if it has an exit code.

  One of several processes ends at once. An orderly end waits for the others,
  who wait for this one; that it is gone is what they can learn.
  """
  try:
    yield
  except tuple(EXIT_CODES) as error:
    _stop(error)
  except OSError as error:
    if error.errno in _NO_SPACE:
      _stop(StorageError(f"{error}; make room and start again"))
    _leave_others()
    raise
  except jax.errors.JaxRuntimeError as error:
    if _several():
      _stop(
        LostProcess(
          f"{error}\nMost likely, another process of this run is gone: the "
          "first one that ended says why. Start all processes again by the "
          "same command; the run goes on from its last checkpoint."
        )
      )
    raise
  except Exception:
    _leave_others()
    raise


def _several() -> bool:
  return jax.distributed.is_initialized() and jax.process_count() > 1


def _leave_others() -> None:
  if _several():
    traceback.print_exc()
    _exit(1)


def _kept(workdir: Path) -> str:
  """What a signal's message says of the checkpoints in a folder."""
  steps = {
    folder.parent.relative_to(workdir).as_posix(): max(
      (int(step.name) for step in folder.iterdir() if step.name.isdigit()),
      default=0,
    )
    for folder in sorted(workdir.glob("**/checkpoints"))
  }
  named = ", ".join(f"{name} step {step}" for name, step in steps.items())
  return (
    f"{workdir} keeps {named or 'no checkpoint yet'}; started again by the "
    "same command, it goes on from there"
  )


def _stop(error: BaseException) -> NoReturn:
  print(f"error: {error}", file=sys.stderr)
  _exit(EXIT_CODES[type(error)])


def _exit(code: int) -> NoReturn:
  if _several():
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
      time.sleep(1)  # All are connected to it: it leaves last.
    os._exit(code)
  sys.exit(code)
