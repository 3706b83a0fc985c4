"""Parameters as decoding reads them fastest."""

from collections.abc import Callable

import jax

from calm_jax.composition import cross_attention
from calm_jax.models import decoder

# Of a GPU's memory, the share that stays free beside a second copy of layers.
_SPARE = 0.1


def prepare(params: dict, apart: bool | None = None) -> dict:
  """Folds each f_proj, and gives layers arrays of their own where it pays.

  On a CPU the result is views of the parameters; on a GPU layers apart are a
  copy of them.

  Args:
    params: the tree of a model or of a composition.
    apart: whether layers leave their stacks; None for `layers_apart`.
  """
  apart = layers_apart(params) if apart is None else apart
  params = cross_attention.fold(params)
  return change_models(params, decoder.unstack) if apart else params


def layers_apart(params: dict) -> bool:
  """Returns whether layers leave their stacks to decode.

  They do on one CPU, where it costs nothing, and on one GPU with room for a
  copy of all layers. A TPU slices a stack without a copy; on several devices
  `decoder.run_layers` gathers a layer at a time.
  """
  models = [params["anchor"], *params.get("augmenting", {}).values()]
  devices = set().union(*map(decoder.stack_devices, models))
  if len(devices) > 1:
    return False
  [device] = devices
  if device.platform != "gpu":
    return device.platform == "cpu"
  stats = device.memory_stats() or {}
  if "bytes_limit" not in stats:
    return True
  stacks = [model["layers"] for model in models]
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(stacks))
  free = stats["bytes_limit"] - stats["bytes_in_use"]
  return size + _SPARE * stats["bytes_limit"] <= free


def change_models(params: dict, change: Callable[[dict], dict]) -> dict:
  """The tree with the parameters of each frozen model changed."""
  models = {"anchor": change(params["anchor"])}
  if "augmenting" in params:
    models["augmenting"] = {
      name: change(model) for name, model in params["augmenting"].items()
    }
  return params | models
