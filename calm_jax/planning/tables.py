"""Shows a plan as JSON and as tables."""

import dataclasses
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from calm_jax.composition import execution
from calm_jax.experiments import run_models
from calm_jax.experiments.settings import Settings
from calm_jax.parallel.chips import GIB, GPUS, TPUS
from calm_jax.planning import shapes, topology
from calm_jax.planning.estimate import Estimate
from calm_jax.planning.programs import Prompts
from calm_jax.planning.search import Case
from calm_jax.planning.shapes import Job
from calm_jax.planning.topology import Target

_STAND_IN = (
  "compiled by the CPU's compiler, with the plain attention: what is given and "
  "the collectives are those of the devices; temporaries and bytes moved are "
  "an upper guess"
)
_SHOWN = 12


class Plan(NamedTuple):
  """A job on a topology, and how it can run there."""

  job: Job
  target: Target
  cases: list[Case]  # the best first
  largest: int | None  # rows of the largest batch that fits, if looked for
  batches: list[Case]  # compiled to find it
  prompts: Prompts  # that are read and continued
  reading: Estimate | None  # of all prompts
  decoding: Estimate | None  # of a token of each


def say(line: str | Table) -> None:
  """Prints a line or a table."""
  Console(soft_wrap=True, highlight=False).print(line)


def to_json(plan: Plan) -> dict[str, Any]:
  """The plan as `json.dumps` takes it."""

  def case_json(case: Case) -> dict[str, Any]:
    made: dict[str, Any] = dataclasses.asdict(case) | {"text": str(case)}
    if case.found is not None and case.found.step:
      tokens = case.rows * plan.job.stage.length
      made["found"]["tokens_per_second"] = tokens / case.found.step
    return made

  cases = [case_json(case) for case in plan.cases]
  result: dict[str, Any] = {
    "topology": plan.target.name,
    "chip": plan.target.chip._asdict(),
    "chips": len(plan.target.devices),
    "exact": plan.target.exact,
    "best": cases[0],
    "cases": cases,
  }
  if plan.largest is not None:
    result["largest_batch"] = plan.largest
    result["batches"] = {
      case.rows: dataclasses.asdict(case.needs) for case in plan.batches
    }
  passes = {"read": plan.reading, "decode": plan.decoding}
  for name, found in passes.items():
    if found is not None:
      result[name] = dataclasses.asdict(found) | plan.prompts._asdict()
  return result


def show(plan: Plan) -> None:
  """Prints the tables."""
  target, best, prompts = plan.target, plan.cases[0], plan.prompts
  decoding = plan.decoding
  say(
    f"[bold]{target.name}[/]: {len(target.devices)} chips of "
    f"{_gib(target.chip.hbm)}; {best}"
  )
  if not target.exact:
    say(_STAND_IN)
  programs = {"training step": best.needs}
  if plan.reading is not None:
    title = f"{prompts.rows} prompts of {prompts.length:,} tokens are read"
    programs[title] = plan.reading
  if decoding is not None:
    title = f"{prompts.rows} rows decode, {prompts.slots:,} slots"
    programs[title] = decoding
  say(_memory_table(programs, target.chip.hbm))
  say(_speed_table(programs))
  for name, count in best.needs.kernels.items():
    say(f"kernel in {count} places of the step: {name}")
  if len(plan.cases) > 1:
    say(_case_table(plan.cases))
  if len(plan.cases) > _SHOWN:
    say(f"and {len(plan.cases) - _SHOWN} more; --json has them all")
  if best.needs.step:
    rate = best.rows * plan.job.stage.length / best.needs.step
    say(f"at most {rate:,.0f} tokens/s in training")
  if decoding is not None and decoding.step:
    say(f"at most {prompts.rows / decoding.step:,.0f} tokens/s in decoding")
  if plan.largest is not None:
    tried = ", ".join(map(str, sorted(case.rows for case in plan.batches)))
    say(f"largest batch seen to fit: {plan.largest} rows (compiled: {tried})")


def show_choices(settings: Settings) -> None:
  """Prints what one device of each kind chooses for each stage of a run."""
  chips = {"cpu": execution.Device("cpu")}
  for platform, kinds in {"gpu": GPUS, "tpu": TPUS}.items():
    chips |= {n: topology.kind(platform, chip) for n, chip in kinds.items()}
  for stage in (*settings.recipe, *settings.alternatives):
    job = shapes.job(settings, stage)
    work = run_models.stage_work(job.stage, job.params)
    rows = []
    for device in chips.values():
      spec = execution.for_training(job.spec, settings.asked, device, work)
      layers = execution.layout(device, 1, 0, None)
      rows.append(execution.describe(spec, work) | {"decoding": layers})
    table = Table("device", *rows[0], title=f"{stage}, {settings.dtype}")
    for name, row in zip(chips, rows, strict=True):
      table.add_row(name, *row.values())
    say(table)


def _memory_table(programs: dict[str, Estimate], hbm: int) -> Table:
  table = Table("on each chip", *programs, title="memory")
  estimates = list(programs.values())
  for kind in dict.fromkeys(kind for e in estimates for kind in e.memory):
    sizes = [e.memory.get(kind) for e in estimates]
    if any(sizes):
      table.add_row(kind, *("" if s is None else _gib(s) for s in sizes))
  table.add_section()
  table.add_row("all", *(_gib(e.total) for e in estimates))
  table.add_row(f"fits {_gib(hbm)}", *map(_yes_or_no, estimates))
  if any(e.unread > 0.01 * e.total for e in estimates):
    table.add_row("of all not read", *(_gib(e.unread) for e in estimates))
  table.columns[1].justify = "right"
  return table


def _speed_table(programs: dict[str, Estimate]) -> Table:
  title = "work, and the time that it takes at least"
  table = Table("", *programs, title=title)
  estimates = list(programs.values())
  rows = {
    "FLOPs, each once": [f"{e.flops:.3g}" for e in estimates],
    "FLOPs of a chip": [f"{e.worked:.3g}" for e in estimates],
    "memory moved, a chip": [_gib(e.moved) for e in estimates],
  }
  for kind in dict.fromkeys(kind for e in estimates for kind in e.sent):
    rows[f"{kind}, sent"] = [_gib(e.sent.get(kind, 0)) for e in estimates]
  times = [e.seconds for e in estimates if e.seconds]
  if len(times) == len(estimates):
    for name in times[0]:
      rows[name] = [f"{1e3 * seconds[name]:.3g} ms" for seconds in times]
    rows["bound by"] = [e.bound for e in estimates]
  for name, cells in rows.items():
    table.add_row(name, *cells)
  return table


def _case_table(cases: list[Case]) -> Table:
  table = Table("case", "memory", "fits", "step", title="cases")
  for case in cases[:_SHOWN]:
    if case.found is None:
      row = f"about {_gib(case.guess)}", case.reason or "not compiled"
      seconds = f"about {case.seconds:.3g} s"
    else:
      row = _gib(case.found.total), _yes_or_no(case.found)
      seconds = f"{case.found.step:.3g} s"
    table.add_row(str(case), *row, seconds)
  return table


def _yes_or_no(found: Estimate) -> str:
  return "yes" if found.fits else "NO"


def _gib(size: float) -> str:
  return f"{size / GIB:.3f} GiB"
