"""Writes a model or a composition as a new folder that transformers loads.

  python -m calm_jax.export --model=DIR_OR_ID --folder=NEW
  python -m calm_jax.export --model=DIR_OR_ID --folder=NEW --references

With --references, a composition's folder holds Θ_C only, and where its frozen
models are.
"""

import argparse

from calm_jax import cli
from calm_jax.language_model import load_any


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m calm_jax.export", description=__doc__.split("\n")[0]
  )
  flag = parser.add_argument
  cli.model_flags(parser)
  flag("--folder", required=True, help="the new folder")
  flag("--dtype", help="of the weights; as saved by default")
  flag("--ignore", default="", help="keys of config.json, with commas")
  flag(
    "--references",
    action="store_true",
    help="of the frozen models write only where they are",
  )
  given = vars(parser.parse_args())
  model, folder = given.pop("model"), given.pop("folder")
  references = given.pop("references")
  # Without quantise, which would be refused.
  composed = load_any(model, quantise="", **given)
  composed.export_hf(folder, references=references)
  trust = ", trust_remote_code=True" if composed.is_composed else ""
  print(f"AutoModelForCausalLM.from_pretrained({folder!r}{trust}) loads it")


if __name__ == "__main__":
  cli.guarded(main)
