"""What transformers computes, and how far from it we are."""

from __future__ import annotations

import json
import pathlib

import compiler
import helpers
import jax
import numpy as np
import safetensors
import torch
import transformers
from golden import options

from calm_jax.models.hf import loading

LENGTH = sum(options.LENGTHS)
# Threads that wait for each other cost more than these models do.
torch.set_num_threads(1)


def shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """The tensors of a folder of one file."""
  with safetensors.safe_open(folder / "model.safetensors", "np") as file:
    return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118


def write(folder: pathlib.Path, config: dict) -> pathlib.Path:
  """A checkpoint of random weights, its form that of transformers."""
  settings = dict(config)
  settings = transformers.AutoConfig.for_model(
    settings.pop("model_type"), **settings
  )
  model = transformers.AutoModelForCausalLM.from_config(settings)
  model.save_pretrained(folder)
  written = json.loads((folder / "config.json").read_text())
  return options.write(folder, written, shapes(folder))


def read(folder: pathlib.Path):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()


@torch.no_grad()
def logits(model, tokens_BL, **inputs) -> np.ndarray:
  tensors = {k: torch.from_numpy(np.int64(v)) for k, v in inputs.items()}
  ids = torch.from_numpy(np.int64(tokens_BL))
  return model(input_ids=ids, **tensors).logits.numpy()


def alone(model) -> dict[int, np.ndarray]:
  """Logits of each sequence by itself, by its length."""
  return {n: logits(model, options.tokens(n)[None])[0] for n in options.LENGTHS}


# The same program, in half the time: most of it goes into compilation.
decode_quickly = jax.jit(
  helpers.decode_rows.__wrapped__,
  static_argnames="config",
  compiler_options={"xla_backend_optimization_level": 0} | compiler.QUICK,
)


def errors(
  folder: pathlib.Path, model, decode=helpers.decode_rows
) -> dict[str, float]:
  """Largest absolute difference of our logits, by the layout of the rows."""
  config = loading.load_config(folder)
  params = loading.load_params(folder, config)
  by_length = config.rope is not None and config.rope.kind in (
    "dynamic", "longrope"
  )  # fmt: skip
  expected = alone(model)
  sequences = (options.tokens(n) for n in options.LENGTHS)
  found = {}
  for name, (rows, places) in helpers.layouts(*sequences, LENGTH).items():
    ours = np.asarray(decode(params, config, rows))
    differences = [
      ours[row, slot : slot + len(ids)] - expected[len(ids)]
      for (row, slot), ids in places.items()
    ]
    # transformers turns all rows of a batch as its longest asks.
    if name != "packed" and not by_length:
      real = rows.segments > 0
      theirs = logits(
        model, rows.tokens, attention_mask=real, position_ids=rows.positions
      )
      differences.append(ours[real] - theirs[real])
    found[name] = max(float(np.abs(d).max()) for d in differences)
  return found
