"""Plans held against what the trainer compiles, for test_plan_truth.

  python tests/plan_driver.py FOLDER '{"name": ["truth", {"axes": ...}], ...}'

prints JSON, by name: for "truth" what the plan says of a step and what the
compiler says of the one that a run makes; for "long_row" what a search found.
The devices are those of XLA_FLAGS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import jax

from calm_jax.experiments import recipe
from calm_jax.experiments.config_files import read_settings
from calm_jax.planning import estimate, programs, search, shapes, topology
from calm_jax.planning.shapes import Job
from calm_jax.training import step as step_lib
from calm_jax.training.trackers import Trackers
from configs import kv

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}


class _FirstStep(Exception):
  """Ends a run at its first step."""


def first_step(run: Callable[[], Any]) -> Any:
  """The step that a run of the trainer compiles, which is not run."""
  make = step_lib.make_step

  def recording(*arguments):
    step = make(*arguments)

    def record(*given):
      raise _FirstStep(step.lower(*given).compile())

    return record

  step_lib.make_step = recording
  try:
    run()
  except _FirstStep as found:
    return found.args[0]
  finally:
    step_lib.make_step = make
  raise AssertionError("the run made no step")


def by_compiler(compiled) -> dict[str, float]:
  """Bytes and FLOPs on a device, of a compiled step."""
  memory = compiled.memory_analysis()
  return {
    "arguments": memory.argument_size_in_bytes,
    "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "flops": compiled.cost_analysis()["flops"],
  }


def by_plan(job: Job, axes: dict[str, int], count: int) -> dict[str, float]:
  """The same of what is planned."""
  name = "cpu" if count == 1 else f"cpu:{count}"
  placed = programs.place(job, topology.target(name), axes)
  return estimated(placed, programs.training(placed, job.stage.batch_size))


def estimated(
  placed: programs.Placed, program: programs.CompiledProgram
) -> dict[str, float]:
  """The same of a program that was planned."""
  found = estimate.estimate(placed, program)
  given = sum(found.memory[kind] for kind in programs.KINDS)
  return {
    "arguments": given - found.unread + found.memory["alignment"],
    "results": found.memory["results"],
    "temporaries": found.memory["temporaries"],
    "flops": found.worked,
  }


def config_of(folder: str, axes: dict[str, int], **changes):
  """A small run; no loop has two turns, of which XLA would count one."""
  config = kv.get_config("tiny")
  config.workdir, config.composition.connections = folder, ((1, 1),)
  config.recipe, config.alternatives = ("compose",), ()
  config.mesh.update(axes)
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(num_heads=8, num_kv_heads=4)
    config[f"{side}_model"].update(width=64, mlp_width=128)
  config.augmenting_model.num_layers = 1
  config.stages.compose.update(length=32)
  config.update_from_flattened_dict(changes)
  return config


def truth(folder: str, axes: dict[str, int], **changes) -> dict[str, dict]:
  """What both say of one config."""
  settings = read_settings(config_of(folder, axes, **changes))
  return {
    "compiler": by_compiler(
      first_step(lambda: recipe.run_recipe(settings, Trackers()))
    ),
    "plan": by_plan(shapes.job(settings), ONE | axes, jax.device_count()),
  }


def long_row(folder: str, chips: int, length: int) -> dict[str, Any]:
  """A search for one long row, whose two heads are for two chips."""
  config = config_of(folder, {})
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(num_heads=2, num_kv_heads=2)
    config[f"{side}_model"].max_length = length
  config.stages.compose.update(length=length, batch_size=1)
  target = topology.target(f"cpu:{chips}")
  target = target._replace(chip=target.chip._replace(hbm=2**25))
  said = []
  found = search.search(
    shapes.job(read_settings(config)), target, 1,
    compiles=1, until=float("inf"), say=said.append,
  )  # fmt: skip
  return {
    "axes": [case.axes for case in found],
    "fits": [case.found and case.found.fits for case in found],
    "said": said,
  }


def main() -> None:
  folder, jobs = sys.argv[1], json.loads(sys.argv[2])
  kinds = {"truth": truth, "long_row": long_row}
  found = {
    name: kinds[kind](f"{folder}/{name}", **asked)
    for name, (kind, asked) in jobs.items()
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main()
