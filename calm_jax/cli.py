"""What the command lines share."""

from __future__ import annotations

import sys
from collections.abc import Callable

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

  def guarded(argv):
    if len(argv) > 1:
      raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax tells of every file.
    try:
      main(config.value)
    except InputError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(_USAGE)

  flags.mark_flag_as_required("config")
  app.run(guarded)
