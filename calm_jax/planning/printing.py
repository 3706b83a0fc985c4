"""A plan as JSON, and as tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from calm_jax.planning.chips import GIB
from calm_jax.planning.estimate import Estimate
from calm_jax.planning.search import Case

_STAND_IN = (
  "compiled by the CPU's compiler, with the plain attention: what is given and "
  "the collectives are those of the devices; temporaries and bytes moved are "
  "an upper guess"
)
_SHOWN = 12


def say(line: str) -> None:
  """What is being done, as it is done."""
  Console(soft_wrap=True, highlight=False).print(line)


def report(found: dict[str, Any]) -> dict[str, Any]:
  """What `plan.main` found, as JSON."""
  target, job = found["topology"], found["job"]
  best = found["cases"][0]
  tokens = best.rows * job.stage.length
  result = {
    "topology": target.name,
    "chip": target.chip._asdict(),
    "chips": len(target.devices),
    "exact": target.exact,
    "best": _case(best, tokens),
    "cases": [_case(c, c.rows * job.stage.length) for c in found["cases"]],
  }
  if found["largest"] is not None:
    result["largest_batch"] = found["largest"]
    result["batches"] = {
      case.rows: _estimate(case.found) for case in found["batches"]
    }
  if "decode" in found:
    result["decode"] = _estimate(found["decode"]) | found["decode_shape"]
  return result


def _case(case: Case, tokens: int) -> dict[str, Any]:
  out = dataclasses.asdict(case) | {"found": None, "text": str(case)}
  if case.found is not None:
    out["found"] = _estimate(case.found)
    if case.found.step:
      out["found"]["tokens_per_second"] = tokens / case.found.step
  return out


def _estimate(found: Estimate) -> dict[str, Any]:
  return dataclasses.asdict(found)


def show(result: dict[str, Any]) -> None:
  """Prints the tables."""
  console = Console(soft_wrap=True, highlight=False)
  chip, best = result["chip"], result["best"]
  console.print(
    f"[bold]{result['topology']}[/]: {result['chips']} chips of "
    f"{_gib(chip['hbm'])}; {best['text']}"
  )
  if not result["exact"]:
    console.print(_STAND_IN)
  columns = {"training step": best["found"]}
  if "decode" in result:
    decode = result["decode"]
    title = f"{decode['rows']} rows decode, {decode['slots']} slots"
    columns[title] = decode
  _show_memory(console, columns, chip)
  _show_speed(console, columns)
  for name, count in best["found"]["kernels"].items():
    console.print(f"kernel in {count} places of the step: {name}")
  if len(result["cases"]) > 1:
    _show_cases(console, result["cases"])
  if "tokens_per_second" in best["found"]:
    console.print(
      f"at most {best['found']['tokens_per_second']:,.0f} tokens/s in training"
    )
  if "decode" in result and result["decode"]["step"]:
    rate = result["decode"]["rows"] / result["decode"]["step"]
    console.print(f"at most {rate:,.0f} tokens/s in decoding")
  if result.get("largest_batch") is not None:
    tried = ", ".join(map(str, sorted(result["batches"])))
    console.print(
      f"largest batch seen to fit: {result['largest_batch']} rows (compiled: "
      f"{tried})"
    )


def _show_memory(console: Console, columns: dict[str, Any], chip) -> None:
  table = Table("on each chip", *columns, title="memory")
  kinds = list(dict.fromkeys(k for c in columns.values() for k in c["memory"]))
  for kind in kinds:
    sizes = [c["memory"].get(kind) for c in columns.values()]
    if any(sizes):
      table.add_row(kind, *("" if s is None else _gib(s) for s in sizes))
  table.add_section()
  table.add_row("all", *(_gib(c["total"]) for c in columns.values()))
  table.add_row(
    f"fits {_gib(chip['hbm'])}",
    *("yes" if c["fits"] else "NO" for c in columns.values()),
  )
  if any(c["unread"] > 0.01 * c["total"] for c in columns.values()):
    unread = (_gib(c["unread"]) for c in columns.values())
    table.add_row("of all not read", *unread)
  table.columns[1].justify = "right"
  console.print(table)


def _show_speed(console: Console, columns: dict[str, Any]) -> None:
  table = Table("", *columns, title="work, and the time that it takes at least")
  found = list(columns.values())

  def row(name, values):
    table.add_row(name, *values)

  row("FLOPs, each once", (f"{c['flops']:.3g}" for c in found))
  row("FLOPs of a chip", (f"{c['worked']:.3g}" for c in found))
  row("memory moved, a chip", (_gib(c["moved"]) for c in found))
  for kind in dict.fromkeys(k for c in found for k in c["sent"]):
    row(f"{kind}, sent", (_gib(c["sent"].get(kind, 0)) for c in found))
  if all(c["seconds"] for c in found):
    for name in found[0]["seconds"]:
      row(name, (f"{1e3 * c['seconds'][name]:.3g} ms" for c in found))
    row("bound by", (c["bound"] for c in found))
  console.print(table)


def _show_cases(console: Console, cases: list[dict[str, Any]]) -> None:
  table = Table("case", "memory", "fits", "step", title="cases")
  for case in cases[:_SHOWN]:
    found = case["found"]
    if found is not None:
      row = _gib(found["total"]), "yes" if found["fits"] else "NO"
      row = *row, f"{found['step']:.3g} s"
    else:
      row = f"about {_gib(case['guess'])}", case["reason"] or "not compiled"
      row = *row, f"about {case['seconds']:.3g} s"
    table.add_row(case["text"], *row)
  console.print(table)
  if len(cases) > _SHOWN:
    console.print(f"and {len(cases) - _SHOWN} more; --json has them all")


def _gib(size: float) -> str:
  return f"{size / GIB:.3f} GiB"
