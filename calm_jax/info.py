"""Says what a checkpoint or a composition is, without reading its weights.

python -m calm_jax.info DIR_OR_ID
"""

from __future__ import annotations

import argparse
import math

import jax
from rich.console import Console
from rich.table import Table

from calm_jax import artefact, cli, composing, composition, tree
from calm_jax.connections import Composition, paper_count
from calm_jax.models import decoder, folders, loading
from calm_jax.models.config import ModelConfig

_FILES = ("config.json", "*.json", "README.md")


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m calm_jax.info", description=__doc__.split("\n")[0]
  )
  parser.add_argument("model", help="a checkpoint or composition: folder or id")
  name = parser.parse_args().model
  console = Console()
  if artefact.describes_composition(name):
    describe_composition(name, console)
  else:
    console.print(name, soft_wrap=True)
    console.print(_models({"": _config(name)}))


def describe_composition(name: str, console: Console) -> None:
  """Prints the models, their connections, and what composing them costs."""
  folder = folders.locate(name, None, _FILES).folder
  saved = artefact.read_config(folder)
  configs = {
    part: _config(model["name"], model["revision"])
    for part, model in saved["models"].items()
  }
  parts = []
  for joined in saved["augmenting"]:
    options = {k: v for k, v in joined.items() if k != "name"}
    config = configs[f"augmenting/{joined['name']}"]
    parts.append((
      joined["name"],
      composing.join(config, configs["anchor"], **options),
    ))  # fmt: skip
  spec = Composition(configs["anchor"], tuple(parts))
  for part, model in saved["models"].items():
    at = f" at {model['revision']}" if model["revision"] else ""
    console.print(f"{part}: {model['name']}{at}", soft_wrap=True)
  console.print(_models(configs))
  table = Table("augmenting", "connections", "visibility", "norm", "Θ_C")
  theta = jax.eval_shape(lambda: composition.init(jax.random.key(0), spec))
  for part, joined in parts:
    pairs = ", ".join(f"{c.augmenting}→{c.anchor}" for c in joined.connections)
    table.add_row(
      part,
      pairs,
      joined.visibility,
      str(joined.norm),
      f"{_count(theta[part]):,}",
    )
  console.print(table)
  anchor = _count(decoder.param_shapes(spec.anchor))
  console.print(
    f"Θ_C: {_count(theta):,} parameters, {_count(theta) / anchor:.1%} of the "
    f"anchor's ({paper_count(spec):,} counted as in the paper's C.1)."
  )
  console.print(
    "Multiplications a generated token: "
    f"{per_token(spec) / per_token(Composition(spec.anchor)):.2f} of the "
    "anchor's alone."
  )


def per_token(spec: Composition) -> int:
  """Multiplications of weights for one token that is generated.

  All models of a composition count up to the last layer that is needed, f_proj
  as folded into W_K and W_V.
  """
  total = _layers(spec.anchor, spec.anchor.num_layers)
  total += spec.anchor.vocab_size * spec.anchor.width
  heads = spec.anchor.num_heads
  inner = heads * (spec.anchor.width // heads)
  for _, joined in spec.augmenting:
    last = max(c.augmenting for c in joined.connections)
    total += _layers(joined.config, last)
    widths = spec.anchor.width + joined.config.width
    total += len(joined.connections) * 2 * inner * widths
  return total


def _layers(config: ModelConfig, layers: int) -> int:
  """The weights that a token meets in the first layers."""
  total = 0.0
  for name, leaf in tree.flatten(
    decoder.param_shapes(config)["layers"]
  ).items():
    if name.endswith("kernel"):
      share = 1.0
      if "experts" in name:
        share = config.experts_per_token / config.num_experts
      total += share * math.prod(leaf.shape[1:])
  return round(layers * total)


def _config(name: str, revision: str | None = None) -> ModelConfig:
  return loading.load_config(folders.locate(name, revision, _FILES).folder)


def _count(shapes) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _models(configs: dict[str, ModelConfig]) -> Table:
  table = Table(
    "", "layers", "width", "vocabulary", "length", "parameters",
    "in bfloat16", "cache/token",
  )  # fmt: skip
  for name, config in configs.items():
    count = _count(decoder.param_shapes(config))
    cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    table.add_row(
      name,
      str(config.num_layers),
      str(config.width),
      f"{config.vocab_size:,}",
      f"{config.max_length:,}",
      f"{count:,}",
      _bytes(2 * count),
      _bytes(2 * cached),
    )
  return table


def _bytes(n: float) -> str:
  for unit in ("B", "kB", "MB"):
    if n < 1000:
      return f"{n:.3g} {unit}"
    n /= 1000
  return f"{n:.3g} GB"


if __name__ == "__main__":
  cli.guarded(main)
