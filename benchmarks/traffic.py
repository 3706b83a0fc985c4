"""Counts the bytes that a step of decoding cannot avoid reading."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import jax

from calm_jax.composition import cross_attention, forward
from calm_jax.composition.connections import Composition
from calm_jax.core import trees
from calm_jax.models.config import ModelConfig


def nbytes(params) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def weights(params: dict, spec: Composition, rows: int) -> int:
  """Counts the bytes of parameters that a step on one token a row reads.

  All of the anchor and of the composition, f_proj folded as decoding has it,
  and each augmenting model up to its last tapped layer, without its head. Of
  an embedding the rows of the tokens, or, where it is the head too, all of it
  once. For models without experts.

  Args:
    params: the tree, or its shapes.
    spec: what it is.
    rows: how many tokens are read.
  """
  params = jax.eval_shape(cross_attention.fold, params)
  anchor = params["anchor"]
  total = sum(nbytes(anchor[k]) for k in anchor if k != "embed")
  if spec.anchor.tie_embeddings:
    total += nbytes(anchor["embed"])
  else:
    total += _embedded(anchor, rows)
  for name, joined in spec.augmenting:
    config, own = joined.config, params["augmenting"][name]
    last = max(c.augmenting for c in joined.connections)
    total += nbytes(own["layers"]) * last // config.num_layers
    total += _embedded(own, rows) + nbytes(params["composition"][name])
  return total


def _embedded(model: dict, rows: int) -> int:
  return sum(
    rows * nbytes(x) // x.shape[0] for x in jax.tree.leaves(model["embed"])
  )


def caches(spec: Composition, rows: int, before: int) -> int:
  """Counts the bytes of keys and values that a token reads after `before`.

  Of a layer with a window, those that it sees; of slots that are not filled,
  nothing.
  """
  one = trees.flatten(
    jax.eval_shape(lambda: forward.empty_cache(spec, rows, 1))
  )

  def slots(config: ModelConfig, layers: int) -> int:
    windowed = set()
    if config.window is not None:
      windowed = set(range(layers)) - set(config.full_layers)
    # A window has the token itself in it.
    seen = min(before, (config.window or 1) - 1)
    return len(windowed) * seen + (layers - len(windowed)) * before

  total = 0
  parts = {"anchor": (spec.anchor, spec.anchor.num_layers)} | {
    f"augmenting/{name}": (a.config, max(c.augmenting for c in a.connections))
    for name, a in spec.augmenting
  }
  for part, (config, layers) in parts.items():
    slot = _under(one, f"{part}/layers") // config.num_layers
    total += slot * slots(config, layers)
  return total + _under(one, "cross") * before


def _under(leaves: dict, prefix: str) -> int:
  return nbytes([x for n, x in leaves.items() if n.startswith(f"{prefix}/")])


def bytes_per_token(
  params: dict, spec: Composition, rows: int, before: Iterable[int]
) -> float:
  """Counts all bytes of a step: the mean over numbers of tokens `before` it."""
  read = statistics.fmean(caches(spec, rows, n) for n in before)
  return weights(params, spec, rows) + read
