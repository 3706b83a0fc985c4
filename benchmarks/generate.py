"""Tokens a second of generation: anchor alone, composed, and transformers.

  python -m benchmarks.generate [--repeats 5]

Random weights in float32, greedy, one batch. The contestants take turns, so
that a busy machine slows all of them; ratios are of medians. transformers is
timed if torch is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from calm_jax import composition, decode, tree
from calm_jax.connections import Augmenting, Composition, default_connections
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig

BATCH, PROMPT, NEW = 8, 32, 64
V = 8192


def model(width: int, layers: int, mlp_width: int) -> ModelConfig:
  return ModelConfig(
    vocab_size=V,
    width=width,
    num_layers=layers,
    num_heads=8,
    num_kv_heads=8,
    head_dim=width // 8,
    mlp_width=mlp_width,
  )


def ours(spec: Composition, prompts) -> tuple[Callable, int]:
  """(generate, number of parameters)."""
  init = jax.jit(decoder.init, static_argnums=1)
  keys = jax.random.split(jax.random.key(0), 3)
  params = {"anchor": init(keys[0], spec.anchor)}
  if spec.augmenting:
    params["augmenting"] = {
      name: init(keys[1], joined.config) for name, joined in spec.augmenting
    }
    params["composition"] = composition.init(keys[2], spec)
  return (
    lambda: decode.generate(params, spec, prompts, max_new_tokens=NEW),
    tree.count(params),
  )


def theirs(config: ModelConfig, prompts) -> tuple[Callable, int]:
  """The same for a transformers Llama of the same shape."""
  import torch
  import transformers

  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=V,
      hidden_size=config.width,
      num_hidden_layers=config.num_layers,
      intermediate_size=config.mlp_width,
      num_attention_heads=config.num_heads,
      bos_token_id=None,
      eos_token_id=None,
      pad_token_id=0,
    )
  ).eval()
  ids = torch.tensor(prompts)
  return (
    lambda: model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=NEW,
      min_new_tokens=NEW,
      do_sample=False,
    ),
    sum(p.numel() for p in model.parameters()),
  )


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--repeats", type=int, default=5)
  repeats = parser.parse_args().repeats
  anchor, augmenting = model(512, 12, 1632), model(256, 8, 600)
  joined = Augmenting(
    augmenting, default_connections(augmenting.num_layers, anchor.num_layers)
  )
  prompts = np.random.default_rng(0).integers(1, V, (BATCH, PROMPT)).tolist()
  runs = {
    "anchor alone": ours(Composition(anchor), prompts),
    "composed": ours(Composition(anchor, (("kv", joined),)), prompts),
  }
  try:
    runs["transformers, anchor alone"] = theirs(anchor, prompts)
  except ImportError as error:
    print(f"transformers is not timed: {error}")
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for run, _ in runs.values():
    run()  # compiles
  for _ in range(repeats):
    for name, (run, _) in runs.items():
      began = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - began)
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  table = Table("", "parameters", "tokens/s", "time, of the anchor alone's")
  for name, median in medians.items():
    table.add_row(
      name,
      f"{runs[name][1]:,}",
      f"{BATCH * NEW / median:,.0f}",
      f"{median / medians['anchor alone']:.2f}",
    )
  Console().print(table)


if __name__ == "__main__":
  main()
