"""The command lines' flags, and how their errors become exit codes.

A command that takes a config runs by `run_with_config`, any other by `guarded`.
"""

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from calm_jax.core import errors
from calm_jax.core.errors import InputError
from calm_jax.core.typed_fields import typed
from calm_jax.experiments.settings import Settings
from calm_jax.models import quantisation
from calm_jax.training import signals

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# A path that was given names nothing, or what cannot be read or written.
_WRONG_PATH = (
  *(FileNotFoundError, FileExistsError, PermissionError),
  *(IsADirectoryError, NotADirectoryError),
)
_FLAGS: dict[Any, Callable[..., Any]] = {
  str: flags.DEFINE_string,
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
}


def option(description: str, default: Any = dataclasses.MISSING) -> Any:
  """A field of a dataclass of options; without a default it must be given."""
  return dataclasses.field(default=default, metadata={"help": description})


def run_with_config(main: Callable, options: type | None = None) -> None:
  """Runs main(config), with the file named by --config.

  With a dataclass whose fields are `option`s it is main(config, options), and
  each field has a flag. Such a command keeps nothing for its next start.

  Errors of `errors.EXIT_CODES` end the process with their message and code.
  """
  # --help lists the flags as those of the module that is run.
  flags.disclaim_key_flags()
  config = config_flags.DEFINE_config_file(
    "config", None, "a file of configs/, with :variant", lock_config=True
  )
  flags.mark_flag_as_required("config")
  allowed = flags.DEFINE_bool(
    "allow_code_execution",
    False,
    "evaluate by running, in a sandbox, programs that models write",
  )
  fields = dataclasses.fields(options) if options else ()
  for field in fields:
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    kind = getattr(field.type, "__origin__", field.type)
    _FLAGS[kind](field.name, default, field.metadata["help"])
    if required:
      flags.mark_flag_as_required(field.name)

  def run(argv):
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax tells of every file.
    with _exit_codes():
      if len(argv) > 1:
        raise InputError(f"unexpected arguments: {argv[1:]}")
      loaded = _loaded(config, allowed.value)
      given = {field.name: flags.FLAGS[field.name].value for field in fields}
      arguments = [typed(options, given, "")] if options else []

      def kept() -> str:
        return _kept_checkpoints(Path(loaded.workdir))

      with signals.raised(loaded.grace, _nothing_kept if options else kept):
        main(loaded, *arguments)

  app.run(run, flags_parser=_parse)


def guarded(main: Callable[[], None]) -> None:
  """Runs main(); its errors end as for `run_with_config`."""
  with _exit_codes(), signals.raised(Settings.grace, _nothing_kept):
    main()


def model_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say which model to load, and where its parts are."""
  flag = parser.add_argument
  flag(
    "--model", required=True, help="a checkpoint or composition: folder or id"
  )
  flag("--anchor", help="where a composition's anchor is, if it was moved")
  flag("--augmenting", help="the same of its m_A; of several NAME=DIR,NAME=DIR")


def number_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say in which numbers a model computes."""
  flag = parser.add_argument
  flag("--dtype", help="of weights and computation")
  flag("--quantise", choices=quantisation.KINDS, help="the models' matrices")


def keep_compiled_programs() -> None:
  """Keeps compiled programs on disk, for the next start of a command line.

  In JAX_COMPILATION_CACHE_DIR if that is set, else in ~/.cache/calm_jax.
  """
  # pyrefly: ignore [missing-attribute]  # JAX defines its options by name.
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


def _loaded(config: flags.FlagHolder, runs_code: bool) -> ConfigDict:
  try:
    loaded = config.value
    loaded.keys()
  except OSError as error:
    # A fault of the file is raised by its first use.
    raise InputError(f"--config: {error}") from error
  if runs_code:
    if "task" not in loaded or "allow_code_execution" not in loaded.task:
      raise InputError("--allow_code_execution: this experiment runs no code")
    loaded.task.allow_code_execution = True
  return loaded


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
  """Ends the process on an error: with its message if it has an exit code.

  One of several processes ends at once, so that the others learn that it is
  gone. An orderly end would wait for them, while they wait for it.
  """

  def in_one_line(message, category, filename, lineno, line=None) -> str:
    return f"warning: {message}\n"  # without the place in the source

  warnings.formatwarning = in_one_line
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      # Of an encoding without a character, its number is written.
      stream.reconfigure(errors="backslashreplace")
  try:
    yield
    sys.stdout.flush()
  except tuple(errors.EXIT_CODES) as error:
    _stop(error)
  except BrokenPipeError:
    # What reads the output, such as `head`, has left: nobody is to be told.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _exit(128 + signal.SIGPIPE)
  except Exception as error:
    if isinstance(error, _WRONG_PATH) and error.filename is not None:
      _stop(InputError(error))
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
      _stop(errors.StorageError(f"{error}; make room and start again"))
    if not _several():
      raise
    if isinstance(error, jax.errors.JaxRuntimeError):
      advice = (
        "Most likely, another process of this run is gone: the first one that "
        "ended says why. Start all processes again by the same command; the "
        "run goes on from its last checkpoint."
      )
      _stop(errors.LostProcess(f"{error}\n{advice}"))
    traceback.print_exc()
    _exit(1)


def _several() -> bool:
  return jax.distributed.is_initialized() and jax.process_count() > 1


def _nothing_kept() -> str:
  return "the same command starts from the beginning"


def _kept_checkpoints(workdir: Path) -> str:
  """Names the newest step of each stage, for the message of a signal."""
  kept = []
  # Unlike glob, it passes over what a save in the background removes meanwhile.
  for folder, names, _ in os.walk(workdir):
    path = Path(folder)
    if path.name == "checkpoints":
      if steps := [int(name) for name in names if name.isdigit()]:
        stage = path.parent.relative_to(workdir).as_posix()
        kept.append(f"{stage} step {max(steps)}")
      names.clear()
  listed = ", ".join(sorted(kept)) or "no checkpoint yet"
  return (
    f"{workdir} keeps {listed}; started again by the same command, it goes on "
    "from there"
  )


def _stop(error: BaseException) -> NoReturn:
  if isinstance(error, errors.Preempted):
    # A second one, during the exit, would change its code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
  print(f"error: {error}", file=sys.stderr)
  _exit(errors.EXIT_CODES[type(error)])


def _exit(code: int) -> NoReturn:
  if _several():
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
      time.sleep(1)  # All are connected to it: it leaves last.
    os._exit(code)
  sys.exit(code)
