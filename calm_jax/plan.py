"""Says what a run needs of machines that are not there, before they are paid.

  python -m calm_jax.plan --config=configs/code.py --topology=v5e:4x4
  python -m calm_jax.plan --config=configs/compose.py --topology=v5p:4x4x4 \\
    --config.anchor=configs/shapes/llama3-70b.json \\
    --config.augmenting=configs/shapes/llama3-8b.json --search

It compiles the training step, and what an evaluation reads and decodes, for a
topology from shapes alone: v5e:, v5p: and v6e: with the `tpu` extra and no TPU,
gpu:8xH100 with the `gpu` extra and no GPU. Without that extra the CPU's
compiler stands in, which knows shapes and collectives but not what a GPU keeps
in between. No weight is read: a model's config.json is enough, also by itself.
See docs/plan.md.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

from ml_collections import ConfigDict

from calm_jax import cli
from calm_jax.core import files
from calm_jax.core.errors import InputError, check_folder
from calm_jax.core.typed_fields import Count, CountOrRest, Range
from calm_jax.experiments import config_files
from calm_jax.generation import decode
from calm_jax.planning import (
  estimate,
  programs,
  search,
  shapes,
  tables,
  topology,
)


@dataclasses.dataclass(frozen=True)
class PlanOptions:
  """The flags besides --config."""

  topology: str = cli.option(
    "such as v5e:4x4, gpu:8xH100 or cpu:8; see docs/plan.md", ""
  )
  choices: bool = cli.option(
    "print what each kind of device chooses by default, and compile nothing",
    False,
  )
  stage: str = cli.option("a stage of the recipe; its last if empty", "")
  search: bool = cli.option(
    "look for a mesh and a remat policy, instead of the config's", False
  )
  compiles: Count = cli.option(
    "training steps that the search compiles at most", 4
  )
  largest_batch: bool = cli.option("look for the largest batch that fits", True)
  decode_rows: CountOrRest = cli.option(
    "rows that decode together; those of the config's evaluations for -1, and "
    "none are planned for 0",
    -1,
  )
  effort: Annotated[float, Range(-1, 1)] = cli.option(
    "of the TPU's compiler to make programs fast: 0 is that of a run, which "
    "takes many times as long to compile as -1",
    -1.0,
  )
  minutes: float = cli.option("after which nothing further is compiled", 9.0)
  json: str = cli.option("file to write; none if empty", "")


def main(config: ConfigDict, options: PlanOptions) -> dict[str, Any]:
  """Plans the run of a config; returns what it prints, as JSON."""
  if options.json:
    check_folder("the folder of --json", Path(options.json).parent)
  if options.choices:
    tables.show_choices(config_files.read_settings(config))
    return {}
  topology.prepare(options.topology, options.effort)
  until = time.monotonic() + 60 * options.minutes
  target = topology.target(options.topology)
  job = shapes.job(config_files.read_settings(config), options.stage)
  settings, rows = job.settings, job.stage.batch_size
  if options.search:
    cases = search.search(
      job, target, rows, compiles=options.compiles, until=until, say=tables.say
    )
    best = cases[0]
    if best.found is None:
      raise InputError(
        f"{options.topology}: nothing was compiled; {best}: {best.reason}"
      )
  else:
    axes = dict(settings.mesh)
    if all(size == 1 for size in axes.values()):
      axes["fsdp"] = len(target.devices)
    case = search.Case(axes, settings.remat, rows)
    best = search.compiled(job, target, case)
    cases = [best]
  largest, batches = None, []
  if options.largest_batch and time.monotonic() < until:
    largest, batches = search.largest(job, target, best, until=until)
  rows = options.decode_rows
  if rows < 0:
    rows = getattr(settings.task, "eval_batch_size", 32)
  prompts = programs.longest_prompts(job, rows)
  reading = decoding = None
  placed = programs.place(job, target, best.axes)
  if rows and time.monotonic() < until:
    program = programs.reading(placed, prompts)
    reading = estimate.estimate(placed, program)
  if rows and time.monotonic() < until:
    program = programs.decoding(placed, prompts)
    decoding = estimate.estimate(placed, program, decode.CHUNK)
  plan = tables.Plan(
    job, target, cases, largest, batches, prompts, reading, decoding
  )
  result = tables.to_json(plan)
  tables.show(plan)
  if options.json:
    text = json.dumps(result, indent=1) + "\n"
    files.write_atomically(Path(options.json), text)
  return result


if __name__ == "__main__":
  cli.run_with_config(main, PlanOptions)
