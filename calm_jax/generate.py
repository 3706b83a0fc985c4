"""Continues text with a model or a composition, as it comes.

  python -m calm_jax.generate --model=DIR_OR_ID --prompt="Once upon"
  python -m calm_jax.generate --model=DIR_OR_ID --prompts=file.jsonl
  python -m calm_jax.generate --model=DIR_OR_ID      asks for prompts
  python -m calm_jax.generate --model=DIR_OR_ID --chat

With --chat prompts are what a user says to an instruct model, and what you type
is one conversation.

A file holds a JSON object {"prompt"} a line; the answers are printed as
{"prompt", "completion"}, a line each. Programs are kept in the folder of
JAX_COMPILATION_CACHE_DIR, or in ~/.cache/calm_jax: the next start is quicker.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calm_jax import cli
from calm_jax.core.errors import InputError
from calm_jax.data.examples import read_prompts
from calm_jax.experiments import sharded_models
from calm_jax.generation.sampling import Sampler
from calm_jax.parallel import mesh
from calm_jax.parallel.rules import SHARDING
from calm_jax.parallel.sharding import Layout
from calm_jax.reporting import figures
from calm_jax.reporting.attention import draw_maps

# Flags that are arguments of `LanguageModel.generate`, with their defaults.
_OPTIONS = {"max_new_tokens": 128, "seed": 0} | vars(Sampler())


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m calm_jax.generate", description=__doc__.split("\n")[0]
  )
  flag = parser.add_argument
  cli.model_flags(parser)
  which = parser.add_mutually_exclusive_group()
  which.add_argument("--prompt", help="the text to continue")
  which.add_argument("--prompts", type=Path, help='a file of lines {"prompt"}')
  flag("--chat", action="store_true", help="talk by the model's chat template")
  flag("--system", help="the system message of a chat")
  for name, default in _OPTIONS.items():
    flag(f"--{name}", type=type(default), default=default)
  flag(
    "--stop", action="append", default=[], help="ends a text; may be repeated"
  )
  flag("--batch_size", type=int, default=64)
  cli.number_flags(parser)
  flag("--ignore", default="", help="keys of config.json, with commas")
  flag("--mesh", help="devices along axes: tensor=4, or fsdp=-1 for all")
  flag("--attention", help="a .png file: where a composition looks meanwhile")
  arguments = parser.parse_args()
  if arguments.prompts and arguments.attention:
    parser.error("--attention draws a --prompt, none of --prompts")
  if arguments.chat and arguments.attention:
    parser.error("--attention draws a --prompt, no --chat")
  if arguments.system is not None and not arguments.chat:
    parser.error("--system is for --chat")
  return arguments


def main() -> None:
  """Runs the command line."""
  arguments = _arguments()
  cli.keep_compiled_programs()
  options: dict[str, Any] = {
    name: getattr(arguments, name) for name in (*_OPTIONS, "stop")
  }
  # Before the model is loaded, which may take long.
  Sampler(**{name: options[name] for name in vars(Sampler())})
  if arguments.attention:
    figures.load_matplotlib()
  prompts = read_prompts(arguments.prompts) if arguments.prompts else []
  layout = _layout(arguments.mesh) if arguments.mesh else None
  names = ("dtype", "quantise", "ignore", "anchor", "augmenting")
  given = {name: getattr(arguments, name) for name in names}
  model = sharded_models.load(arguments.model, layout, **given)
  system = arguments.system
  said = [] if system is None else [_message("system", system)]
  if arguments.prompts:
    asked: dict[str, Any] = {"prompts": prompts}
    if arguments.chat:
      talks = [[*said, _message("user", prompt)] for prompt in prompts]
      asked = {"messages": talks}
    texts = model.generate(**asked, batch_size=arguments.batch_size, **options)
    for prompt, text in zip(prompts, texts, strict=True):
      print(json.dumps({"prompt": prompt, "completion": text}))
    return
  is_given = arguments.prompt is not None
  for prompt in [arguments.prompt] if is_given else _typed_prompts():
    pieces = []
    said.append(_message("user", prompt))
    asked = {"messages": said} if arguments.chat else {"prompt": prompt}
    for piece in model.stream(**asked, **options):
      print(piece, end="", flush=True)
      pieces.append(piece)
    print()
    said.append(_message("assistant", "".join(pieces)))
    if arguments.attention:
      maps = model.attention(prompt, "".join(pieces))
      figures.save_figure(draw_maps(maps), arguments.attention)


def _layout(asked: str) -> Layout | None:
  """The layout of a mesh such as "fsdp=2,tensor=4"."""
  sizes = dict.fromkeys(mesh.AXES, 1)
  for part in asked.split(","):
    axis, _, count = part.partition("=")
    if axis not in sizes or not re.fullmatch(r"-?\d+", count):
      raise InputError(
        f"--mesh={asked} is not like fsdp=2,tensor=4; the axes are {[*sizes]}"
      )
    sizes[axis] = int(count)
  return sharded_models.make_layout(sizes, SHARDING)


def _message(role: str, content: str) -> dict[str, str]:
  return {"role": role, "content": content}


def _typed_prompts() -> Iterator[str]:
  while True:
    try:
      yield input("> " if sys.stdin.isatty() else "")
    except EOFError:
      return
    except UnicodeDecodeError as error:
      raise InputError(f"a prompt is not UTF-8 text: {error}") from error


if __name__ == "__main__":
  cli.guarded(main)
