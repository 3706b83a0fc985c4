"""Serves a model or a composition by OpenAI's API.

  python -m calm_jax.serve --model=DIR_OR_ID
  python -m calm_jax.serve --model=DIR_OR_ID --port=8000 --api_key_file=key

Texts of all clients are decoded together. It listens on this machine only,
unless --host says otherwise. pip install 'calm_jax[serve]' installs what it
needs.
"""

import argparse
import contextlib
import dataclasses
from pathlib import Path

from calm_jax import cli
from calm_jax.core.errors import (
  InputError,
  Interrupted,
  Preempted,
  check_float,
  check_int,
)
from calm_jax.core.extras import import_extra
from calm_jax.language_model import load_any
from calm_jax.serving.engine import Engine
from calm_jax.serving.metrics import Metrics
from calm_jax.serving.tickets import ServingLimits

_HELP = {
  "rows": "texts that are decoded together",
  "queue": "texts that wait at most; later requests get status 429",
  "new_tokens": "of an answer at most",
  "seconds": "that an answer may take, its time in the queue included",
  "chunk": "tokens between which texts enter and leave",
}


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m calm_jax.serve", description=__doc__.split("\n")[0]
  )
  flag = parser.add_argument
  cli.model_flags(parser)
  flag("--name", help="that clients call the model by; as --model if not given")
  cli.number_flags(parser)
  flag("--host", default="127.0.0.1", help="the address to listen on")
  flag("--port", type=int, default=8000)
  flag("--api_key_file", type=Path, help="a file with the key of all clients")
  for field in dataclasses.fields(ServingLimits):
    flag(
      f"--{field.name}",
      type=type(field.default),
      default=field.default,
      help=_HELP[field.name],
    )
  return parser.parse_args()


def main() -> None:
  """Runs the command line."""
  arguments = _arguments()
  check_int("port", arguments.port, 0, 65535)
  limits = _limits(arguments)
  # Before the model is loaded, which may take long.
  import_extra("calm_jax.serve", "starlette", "serve")
  uvicorn = import_extra("calm_jax.serve", "uvicorn", "serve")
  from calm_jax.serving.api import Api

  key = None
  if arguments.api_key_file:
    key = arguments.api_key_file.read_text().strip()
    if not key:
      raise InputError(f"{arguments.api_key_file} holds no key")
  cli.keep_compiled_programs()
  model = load_any(
    arguments.model,
    arguments.dtype,
    arguments.quantise,
    anchor=arguments.anchor,
    augmenting=arguments.augmenting,
  )
  model.text()  # Raises for a model without a tokenizer.
  engine = Engine(model, limits, Metrics(), is_warm=True)
  api = Api(model, engine, arguments.name or arguments.model, key)
  # It ends answers that are on their way, and passes on the signal after that.
  with contextlib.suppress(Preempted, Interrupted):
    uvicorn.run(
      api.app(),
      host=arguments.host,
      port=arguments.port,
      log_level="warning",
      # Those that wait for nothing: /health, /metrics, readers that are slow.
      limit_concurrency=limits.rows + limits.queue + 64,
      timeout_graceful_shutdown=5,
    )


def _limits(arguments: argparse.Namespace) -> ServingLimits:
  """The limits that flags give; InputError for one that is out of range."""
  given = {
    f.name: getattr(arguments, f.name)
    for f in dataclasses.fields(ServingLimits)
  }
  for name, value in given.items():
    if name == "seconds":
      check_float(name, value, 0, 1e9, excluded=0)
    else:
      check_int(name, value, 1)
  return ServingLimits(**given)


if __name__ == "__main__":
  cli.guarded(main)
