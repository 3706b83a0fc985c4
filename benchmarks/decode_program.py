"""Counts what a GPU launches for a token, by the program compiled for it.

  python -m benchmarks.decode_program [--topology=gpu:1xH100] [--rows=1]

No clock and no GPU: programs of the gemma pair's shapes, with few layers, are
compiled for the topology, which needs the CUDA plugin of JAX. A layer is the
difference of one with 4 and one with 3 layers of the anchor; a turn of the loop
makes a token.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import devices, pairs
from calm_jax.composition import execution, inference
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.generation import decode
from calm_jax.models import quantisation
from calm_jax.models.config import ModelConfig
from calm_jax.planning import hlo, programs, topology

SLOTS = 256


class Token(NamedTuple):
  """What a GPU launches for a token, and the bytes that it moves."""

  launches: int
  megabytes: float


def shallow(config: ModelConfig, layers: int) -> ModelConfig:
  full = tuple(i for i in config.full_layers if i < layers)
  return dataclasses.replace(config, num_layers=layers, full_layers=full)


def token(
  target: topology.Target,
  layers: int,
  layout: str,
  kind: str = "",
  rows: int = 1,
  composed: bool = False,
) -> Token:
  """Counts a token of an anchor with so many layers.

  Args:
    target: for which the program is compiled.
    layers: of the anchor; composed, its first is joined to the augmenting
      model's third.
    layout: one of `execution.LAYOUTS`.
    kind: one of `quantisation.KINDS`.
    rows: that decode together.
    composed: whether there is an augmenting model.
  """
  spec = pairs.computed(pairs.pair("gemma"), dtype="bfloat16")
  augmenting = ()
  if composed:
    other = shallow(dict(spec.augmenting)[pairs.NAME].config, 3)
    augmenting = ((pairs.NAME, Augmenting(other, (Connection(3, 1),))),)
  spec = Composition(shallow(spec.anchor, layers), augmenting)
  params = jax.eval_shape(lambda: pairs.parameters(spec, "bfloat16"))
  params = inference.change_models(
    params, lambda model: quantisation.shapes(model, kind)
  )
  _, prepared = inference.shapes(spec, params, layout)
  rows = max(rows, inference.least_rows(prepared))
  job = devices.job(spec, rows, SLOTS)
  model = "composed" if composed else "anchor"
  job = job._replace(
    params=params, stage=dataclasses.replace(job.stage, model=model)
  )
  placed = programs.Placed(job, None, target)
  program = programs.decoding(placed, rows, SLOTS, layout)
  text = program.compiled.as_text()
  chunk = hlo.count(text, decode.CHUNK)
  return Token(
    round(chunk.launches / decode.CHUNK), chunk.memory / decode.CHUNK / 1e6
  )


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--topology", default="gpu:1xH100")
  parser.add_argument("--rows", type=int, default=1)
  options = parser.parse_args(arguments)
  topology.prepare(options.topology)
  target = topology.target(options.topology)
  table = Table(
    "layers", "weights", "launches a layer", "MB a layer", "a connection*"
  )
  cases = [(layout, "") for layout in execution.LAYOUTS]
  cases += [("joined", kind) for kind in ("int8", "int4")]
  for layout, kind in cases:
    more, fewer = (token(target, n, layout, kind, options.rows) for n in (4, 3))
    both = token(target, 3, layout, kind, options.rows, composed=True)
    table.add_row(
      layout,
      kind or "bfloat16",
      f"{more.launches - fewer.launches}",
      f"{more.megabytes - fewer.megabytes:.1f}",
      f"{both.launches - fewer.launches}",
    )
  console = Console()
  console.print(f"{options.topology}, {options.rows} rows, {SLOTS} slots")
  console.print(table)
  console.print("* with 3 layers of the augmenting model, and its embedding")


if __name__ == "__main__":
  main()
