"""Parameters as decoding reads them fastest."""

from collections.abc import Callable

import jax

from calm_jax.composition import cross_attention, execution
from calm_jax.composition.connections import Composition
from calm_jax.core.errors import check_choice
from calm_jax.models import decoder, joined, quantisation


def prepare(
  spec: Composition, params: dict, layout: str = "auto"
) -> tuple[Composition, dict]:
  """Folds each f_proj, and arranges layers as a device decodes them fastest.

  "apart" is views of the parameters on a CPU; "joined" is a copy of all layers.

  Args:
    spec, params: a model or a composition.
    layout: one of `execution.LAYOUTS`, or "auto" for that of `choose_layout`.
  """
  check_choice("layout", layout, ("auto", *execution.LAYOUTS))
  if layout == "auto":
    layout = choose_layout(params)
  params = cross_attention.fold(params)
  if layout == "stacked":
    return spec, params
  if layout == "apart":
    return spec, change_models(params, decoder.unstack)
  join = jax.jit(_join)
  params = change_models(params, lambda p: decoder.split_layers(p, join))
  return spec, _transpose_connections(params)


def shapes(
  spec: Composition, params: dict, layout: str
) -> tuple[Composition, dict]:
  """Returns what `prepare` does, for shapes and one of `execution.LAYOUTS`."""
  params = jax.eval_shape(cross_attention.fold, params)
  if layout == "stacked":
    return spec, params
  pick = decoder.pick_layer
  if layout == "joined":
    pick = _join

  def split(params):
    split = change_models(params, lambda p: decoder.split_layers(p, pick))
    return _transpose_connections(split) if layout == "joined" else split

  return spec, jax.eval_shape(split, params)


def _join(stack: dict, layer: jax.Array | int) -> dict:
  return joined.join(decoder.pick_layer(stack, layer))


def _transpose_connections(params: dict) -> dict:
  """Transposes the matrices of the composition, if there is one."""

  def is_linear(node) -> bool:
    return isinstance(node, dict) and "kernel" in node

  def change(node):
    return joined.transpose(node) if is_linear(node) else node

  theta = params.get("composition")
  if theta is None:
    return params
  theta = jax.tree.map(change, theta, is_leaf=is_linear)
  return params | {"composition": theta}


def choose_layout(params: dict) -> str:
  """Chooses a layout by the devices that hold the parameters."""
  models = [params["anchor"], *params.get("augmenting", {}).values()]
  devices = set().union(*map(decoder.stack_devices, models))
  stacks = [model["layers"] for model in models]
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(stacks))
  first = next(iter(devices))
  kind, stats = execution.Device.of(first), {}
  if kind.memory is not None:
    stats = first.memory_stats()
  free = kind.memory - stats["bytes_in_use"] if stats else None
  return execution.layout(kind, len(devices), size, free)


def least_rows(params: dict) -> int:
  """Returns how many rows decode together at least.

  XLA's compiler for GPUs norms one row by several kernels, and two by one; but
  it reads the few bits of quantised weights for one row at a time.
  """
  anchor = params["anchor"]
  return (
    2 if joined.is_joined(anchor) and not quantisation.kind_of(anchor) else 1
  )


def change_models(params: dict, change: Callable[[dict], dict]) -> dict:
  """The tree with the parameters of each frozen model changed."""
  models = {"anchor": change(params["anchor"])}
  if "augmenting" in params:
    models["augmenting"] = {
      name: change(model) for name, model in params["augmenting"].items()
    }
  return params | models
