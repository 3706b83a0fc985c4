"""Measures tokens a second of generation: anchor, composed, and transformers.

  python -m benchmarks.generate [--repeats 5]
  python -m benchmarks.generate --pair=gemma --dtype=bfloat16 --rows=1,8
  python -m benchmarks.generate --growth

Random weights, greedy, one batch for each number of rows. The contestants take
turns, so that a busy machine slows all of them; ratios are of medians.
transformers is timed if torch is installed, unless --no-torch. Pairs are those
of benchmarks.pairs.

--bandwidth, which is on where the device is no CPU, adds decoding alone: the
difference between two continuations, of NEW and of fewer tokens, whose caches
have as many slots, has no prompt in it. A step makes a token of each row. The
share is the time that the bytes that it cannot do without (benchmarks.traffic)
take at the speed of a large copy, bytes read and written, over its own time;
copies take turns with the contestants. transformers' model has no soft cap of
attention's scores, see benchmarks.torch_loop.

--growth is the same of the composed small pair, twice as large in one respect
each, every shape by itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine, pairs, traffic
from calm_jax.composition import forward, inference
from calm_jax.composition.connections import Composition
from calm_jax.composition.model import Model
from calm_jax.generation import batching, decode
from calm_jax.models import quantisation

PROMPT, NEW = 32, 64
GOAL = 0.7
ALONE, COMPOSED = "anchor alone", "composed"
THEIRS = "transformers, anchor alone"


class Run(NamedTuple):
  """One contestant.

  Attributes:
    generate: continues all prompts by that many tokens.
    parameters: how many it has.
    bytes: that a token must read, on average, or None if it is not known.
  """

  generate: Callable[[int], object]
  parameters: int
  bytes: float | None


def shorter(prompt: int, new: int) -> int:
  """The fewest new tokens that take as many slots as `new` do.

  Raises:
    ValueError: there are none fewer, or the last steps of both are not whole
      chunks apart.
  """
  prompt = batching.round_up(prompt)
  slots = batching.round_up(prompt + new + decode.CHUNK)
  short = new
  while short > decode.CHUNK and batching.round_up(prompt + short) == slots:
    short -= decode.CHUNK
  if short == new:
    raise ValueError(
      f"--new={new} after --prompt={prompt}: {new - decode.CHUNK} new tokens "
      f"have other caches than {slots} slots; give more"
    )
  return short


def prompts_of(rows: int, length: int, vocabulary: int) -> list[list[int]]:
  random = np.random.default_rng(0)
  return random.integers(1, vocabulary, (rows, length)).tolist()


def ours(params: dict, spec: Composition, prompts, new: int, short: int) -> Run:
  rows, length = np.shape(prompts)
  # A token picked as the k-th has length + k - 2 before the one that is read.
  before = range(length + short - 1, length + new - 1)
  read = traffic.bytes_per_token(params, spec, rows, before) if before else None
  model = Model(spec, params)
  return Run(
    lambda n: decode.generate(model, prompts, max_new_tokens=n),
    sum(x.size for x in jax.tree.leaves(params)),
    read,
  )


def theirs(model, prompts) -> Run:
  """The same of a model of transformers."""
  import torch

  ids = torch.tensor(prompts, device=model.device)

  def generate(new: int):
    made = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=new,
      min_new_tokens=new,
      do_sample=False,
      pad_token_id=0,
    )
    return made.tolist()  # which waits for the device

  return Run(generate, sum(p.numel() for p in model.parameters()), None)


def their_model(options):
  """transformers' model of the anchor's shape; None where there is none."""
  try:
    from benchmarks import torch_loop

    device = torch_loop.device()
  except ImportError as error:
    print(f"transformers is not timed: {error}")
    return None
  anchor = pairs.jsons(options.pair)[0]
  return torch_loop.random_model(anchor, options.dtype, device).eval()


def measure(
  runs: dict[str, Run], lengths: tuple[int, ...], repeats: int, copy=None
) -> dict[str, dict[str, float]]:
  """Medians by name: "whole" seconds, of the first of `lengths`.

  With two, "token", seconds of decoding one more of each row; with `copy`,
  which measures bytes a second, "share" of the limit too.
  """
  found: dict[str, dict[str, list[float]]] = {}
  for name, run in runs.items():
    found[name] = {"whole": [], "token": [], "share": []}
    for length in lengths:
      run.generate(length)  # compiles
  for _ in range(repeats):
    for name, run in runs.items():
      speed = copy() if copy else 0.0
      seconds = []
      for length in lengths:
        began = time.perf_counter()
        run.generate(length)
        seconds.append(time.perf_counter() - began)
      kept = found[name]
      kept["whole"].append(seconds[0])
      if len(lengths) == 1:
        continue
      token = (seconds[0] - seconds[1]) / (lengths[0] - lengths[1])
      kept["token"].append(token)
      if copy and run.bytes:
        # Times add up, not rates.
        speed = 2 / (1 / speed + 1 / copy())
        kept["share"].append(run.bytes / speed / token)
  return {
    name: {what: statistics.median(x) for what, x in kept.items() if x}
    for name, kept in found.items()
  }


def contest(options) -> dict[int, dict[str, dict[str, float]]]:
  """Prints the tables; returns what `measure` finds, by the number of rows."""
  lengths, copy = (options.new,), None
  if options.bandwidth:
    lengths += (shorter(options.prompt, options.new),)
    copy = machine.make_copy(options.copy_megabytes)
  spec = pairs.computed(pairs.pair(options.pair), dtype=options.dtype)
  params = pairs.parameters(spec, options.dtype)
  if options.quantise:
    params = inference.change_models(
      params, lambda model: quantisation.quantise(model, options.quantise)
    )
  whole = Table(
    "prompt and all", "rows", "parameters", "tokens/s", "time, of the anchor's"
  )
  decoding = Table(
    "decoding alone", "rows", "ms a step", "of the anchor's", "MB it reads",
    f"of a copy (goal {GOAL})",
  )  # fmt: skip
  model = their_model(options) if options.torch else None
  every = {}
  for rows in options.rows:
    prompts = prompts_of(rows, options.prompt, spec.anchor.vocab_size)
    runs = {}
    for name, which in ((ALONE, "anchor"), (COMPOSED, "composed")):
      described, held = forward.submodel(spec, params, which)
      runs[name] = ours(held, described, prompts, options.new, lengths[-1])
    if model is not None:
      runs[THEIRS] = theirs(model, prompts)
    found = every[rows] = measure(runs, lengths, options.repeats, copy)
    base = found[ALONE]
    for name, got in found.items():
      whole.add_row(
        name,
        f"{rows}",
        f"{runs[name].parameters:,}",
        f"{rows * options.new / got['whole']:,.0f}",
        f"{got['whole'] / base['whole']:.2f}",
      )
      if options.bandwidth:
        cells = [f"{1e3 * got['token']:.2f}"]
        cells += [f"{got['token'] / base['token']:.2f}"]
        if "share" in got:
          cells += [f"{runs[name].bytes / 1e6:,.1f}", f"{got['share']:.3f}"]
        decoding.add_row(name, f"{rows}", *cells)
  console = Console()
  console.print(whole)
  if copy:
    console.print(decoding)
    console.print(f"a copy moves {copy() / 1e9:,.1f} GB a second")
  return every


def growth(options) -> None:
  """The composed small pair twice as large, in one respect each."""
  shapes = {
    "51M + 10M, 2 connections, 8 x 32": {},
    "twice the layers": {"deep": 2},
    "twice the width": {"wide": 2},
    "8 times the prompt": {"prompt": 8 * PROMPT},
    "twice the rows": {"rows": 16},
    "4 connections": {"connections": 4},
  }
  table = Table(
    "", "tokens/s", "ms a step", "ratio", "MB it reads", "ratio", "of a copy"
  )
  copy = machine.make_copy(options.copy_megabytes)
  base = None
  for name, how in shapes.items():
    how = {"prompt": PROMPT, "rows": 8} | how
    prompts = prompts_of(how.pop("rows"), how.pop("prompt"), pairs.V)
    spec = pairs.computed(pairs.small(**how), dtype=options.dtype)
    rows, length = np.shape(prompts)
    lengths = options.new, shorter(length, options.new)
    params = pairs.parameters(spec, options.dtype)
    run = ours(params, spec, prompts, *lengths)
    got = measure({"": run}, lengths, options.repeats, copy)[""]
    base = base or (got["token"], run.bytes)
    table.add_row(
      name,
      f"{rows * options.new / got['whole']:,.0f}",
      f"{1e3 * got['token']:.2f}",
      f"{got['token'] / base[0]:.2f}",
      f"{run.bytes / 1e6:,.1f}",
      f"{run.bytes / base[1]:.2f}",
      f"{got['share']:.3f}",
    )
    del params, run
    jax.clear_caches()
  Console().print(table)


def main(arguments: list[str] | None = None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = argparse.BooleanOptionalAction
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--pair", choices=pairs.PAIRS, default="small")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--quantise", default="", help="int8 or int4")
  parser.add_argument(
    "--rows", type=lambda text: [int(n) for n in text.split(",")], default=[8]
  )
  parser.add_argument("--prompt", type=int, default=PROMPT)
  parser.add_argument("--new", type=int, default=NEW)
  parser.add_argument("--bandwidth", action=flag)
  parser.add_argument("--copy_megabytes", type=int, default=512)
  parser.add_argument("--torch", action=flag, default=True)
  parser.add_argument("--growth", action="store_true")
  options = parser.parse_args(arguments)
  # JAX would take most of an accelerator's memory, and leave torch too little.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  on_cpu = jax.default_backend() == "cpu"
  if options.bandwidth is None:
    options.bandwidth = not on_cpu
  return growth(options) if options.growth else contest(options)


if __name__ == "__main__":
  main()
