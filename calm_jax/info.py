"""Says what a checkpoint or a composition is, without reading its weights.

  python -m calm_jax.info DIR_OR_ID
  python -m calm_jax.info COMPOSITION --anchor=DIR_OR_ID    if that was moved
  python -m calm_jax.info --anchor=DIR_OR_ID --augmenting=DIR_OR_ID
  python -m calm_jax.info --anchor=DIR_OR_ID --augmenting=NAME=DIR,NAME=DIR
  python -m calm_jax.info --example=bert

Of a composition, made or only planned, it shows what it costs beside the
anchor, as Appendix C of the paper counts and as the program does: parameters,
FLOPs (of matrix products), and training as a share of what fine-tuning all of
m_B costs. The example is Appendix C's own.
"""

import argparse
import math
from collections.abc import Collection
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from calm_jax import cli
from calm_jax.composition import (
  checkpoint,
  cross_attention,
  gguf_files,
  model_files,
)
from calm_jax.composition.connections import Composition, connect
from calm_jax.core import hub, trees
from calm_jax.core.errors import check_float, check_int
from calm_jax.models import decoder, quantisation
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import loading
from calm_jax.planning import flops, overhead

_FILES = ("config.json", "*.json", "README.md")


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m calm_jax.info",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "model", nargs="?", help="a checkpoint or composition: folder or id"
  )
  parser.add_argument("--example", choices=["bert"], help="of Appendix C")
  parser.add_argument(
    "--anchor", help="m_B of a composition, also a planned one"
  )
  parser.add_argument(
    "--augmenting", help="its m_A; several: NAME=DIR,NAME=DIR"
  )
  share = overhead.PAPER_DATA_SHARE
  for name, kind, default, described in (
    ("connections", int, None, "its number; by default m_A's layers / 4"),
    ("batch_size", int, 1, "rows of a training step"),
    ("length", int, 512, "tokens of a row"),
    ("augmenting_length", int, 0, "of m_A, of other tokens; 0: as many"),
    ("data_share", float, share, "Θ_C's data, of that of fine-tuning m_B"),
  ):
    parser.add_argument(f"--{name}", type=kind, default=default, help=described)
  parser.add_argument(
    "--ignore", default="", help="keys of config.json, with commas"
  )
  arguments = parser.parse_args()
  planned = arguments.anchor, arguments.augmenting
  if arguments.model is None and arguments.example is None:
    is_right = all(planned)
  else:
    is_right = not (arguments.example and (arguments.model or any(planned)))
  if not is_right:
    parser.error(
      "give a model, or both --anchor and --augmenting, or --example"
    )
  check_int("--batch_size", arguments.batch_size, 1)
  check_int("--length", arguments.length, 1)
  check_int("--augmenting_length", arguments.augmenting_length)
  check_float("--data_share", arguments.data_share, 0, 1)
  return arguments


def main() -> None:
  """Runs the command line."""
  arguments, console = _arguments(), Console()
  name, planned = arguments.model, (arguments.anchor, arguments.augmenting)
  if arguments.example:
    spec = overhead.bert()
    lines = ["BERT-small (m_A) and BERT-large (m_B), as in Appendix C.1"]
  elif not name:
    spec = plan(*planned, arguments.connections, arguments.ignore)
    others = _augmenting(planned[1]).items()
    lines = [f"anchor: {planned[0]}"]
    lines += [f"augmenting/{part}: {path}" for part, path in others]
  elif checkpoint.describes_composition(name, *planned):
    spec, lines = _saved_composition(name, *planned)
  else:
    console.print(name, soft_wrap=True)
    console.print(_model_table({"": _config(name, ignore=arguments.ignore)}))
    return
  for line in lines:
    console.print(line, soft_wrap=True)
  _print_composition(spec, console)
  _print_overhead(spec, arguments, console)


def plan(
  anchor: str, augmenting: str, connections: int | None = None, ignore: str = ""
) -> Composition:
  """Joins checkpoints as `compose` would; several m_A by name.

  Raises:
    InputError: one is not there, or so many connections are impossible.
  """
  config = _config(anchor, ignore=ignore)
  joined = [
    (part, connect(_config(path, ignore=ignore), config, connections))
    for part, path in _augmenting(augmenting).items()
  ]
  return Composition(config, tuple(joined))


def _augmenting(locations: str) -> dict[str, str]:
  if Path(locations).is_dir():  # whatever its name
    return {"m_A": locations}
  return model_files.by_name(locations) or {"m_A": locations}


def _saved_composition(
  name: str, anchor: str | None, augmenting: str | None
) -> tuple[Composition, list[str]]:
  """Returns a saved composition, and a line on each of its models."""
  folder = hub.locate(name, None, _FILES).folder
  saved = checkpoint.read_config(folder)
  models = model_files.find(folder, saved, anchor, augmenting, _FILES)
  configs, lines = {}, []
  for part, source in models.items():
    ignore = saved["models"][part].get("ignore", ())
    configs[part] = loading.load_config(source.folder, ignore)
    revision = f" at {source.revision}" if source.revision else ""
    lines.append(f"{part}: {source.name}{revision}")
  joined = []
  for options in saved["augmenting"]:
    part = options.pop("name")
    config = configs[f"augmenting/{part}"]
    joined.append((part, connect(config, configs["anchor"], **options)))
  return Composition(configs["anchor"], tuple(joined)), lines


def _print_composition(spec: Composition, console: Console) -> None:
  theta = cross_attention.param_shapes(spec)
  configs = {"anchor": spec.anchor}
  table = Table("augmenting", "connections", "visibility", "norm", "Θ_C")
  for part, joined in spec.augmenting:
    configs[f"augmenting/{part}"] = joined.config
    pairs = ", ".join(f"{c.augmenting}→{c.anchor}" for c in joined.connections)
    count = f"{trees.count(theta[part]):,}"
    table.add_row(part, pairs, joined.visibility, str(joined.norm), count)
  console.print(_model_table(configs))
  console.print(table)
  count = trees.count(theta)
  share = count / trees.count(decoder.param_shapes(spec.anchor))
  console.print(f"Θ_C: {count:,} parameters, {share:.1%} of the anchor's.")
  alone = flops.generated_token(Composition(spec.anchor))
  console.print(
    "Multiplications a generated token: "
    f"{flops.generated_token(spec) / alone:.2f} of the anchor's alone."
  )


def _print_overhead(
  spec: Composition, arguments: argparse.Namespace, console: Console
) -> None:
  batch, length = arguments.batch_size, arguments.length
  steps = overhead.training_flops(
    spec, batch, length, arguments.augmenting_length
  )
  printed = ["paper prints"] if arguments.example else []
  table = Table("", *printed, "as the paper counts", "as the program does")
  counts = overhead.parameters(spec)
  for row in overhead.table(counts, steps, arguments.data_share):
    cells = [overhead.PRINTED.get(row.key, "–")] if printed else []
    table.add_row(row.what, *cells, _shown(row.paper), _shown(row.counted))
  console.print(table)
  console.print(
    f"Steps and forward passes of {batch} x {length} tokens. A step on all of "
    f"m_B is {steps['anchor_step']:.3g} FLOPs."
  )


def _shown(value: float | None) -> str:
  if value is None:
    return "–"
  return f"{value:,}" if isinstance(value, int) else f"{value:.1%}"


def _config(name: str, ignore: Collection[str] = ()) -> ModelConfig:
  folder = gguf_files.locate(name, None, _FILES).folder
  return loading.load_config(folder, ignore)


def _model_table(configs: dict[str, ModelConfig]) -> Table:
  names = "layers width vocab length parameters memory"
  table = Table("", *names.split(), "cache a token", padding=(0, 1, 0, 0))
  for column in table.columns:
    column.overflow = "fold"  # a narrow terminal shows all digits
  for name, config in configs.items():
    shapes = decoder.param_shapes(config)
    memory = [
      f"{_bytes(_size(shapes, kind))} {kind or 'bf16'}"
      for kind in quantisation.KINDS
    ]
    counts = config.vocab_size, config.max_length, trees.count(shapes)
    table.add_row(
      name,
      str(config.num_layers),
      str(config.width),
      *(f"{n:,}" for n in counts),
      "\n".join(memory),
      _bytes(4 * config.num_layers * config.num_kv_heads * config.head_dim),
    )
  return table


def _size(shapes: dict, kind: str) -> int:
  """Bytes of the parameters; of what is not quantised in bfloat16."""
  return sum(
    math.prod(leaf.shape) * min(leaf.dtype.itemsize, 2)
    for leaf in jax.tree.leaves(quantisation.shapes(shapes, kind))
  )


def _bytes(n: float) -> str:
  for unit in ("B", "kB", "MB"):
    if n < 1000:
      return f"{n:.3g} {unit}"
    n /= 1000
  return f"{n:.3g} GB"


if __name__ == "__main__":
  cli.guarded(main)
