"""Parameters as decoding reads them fastest."""

from collections.abc import Callable

import jax

from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Composition
from calm_jax.core.errors import check_choice
from calm_jax.models import attention, decoder, joined

# How layers are held: in stacks, as views of them, or copied and joined.
LAYOUTS = ("stacked", "apart", "joined")
# Of a GPU's memory, the share that stays free beside a second copy of layers.
_SPARE = 0.1


def prepare(
  spec: Composition, params: dict, layout: str = "auto"
) -> tuple[Composition, dict]:
  """Folds each f_proj, and arranges layers as a device decodes them fastest.

  "apart" is views of the parameters on a CPU; "joined" is a copy of all layers.

  Args:
    spec, params: a model or a composition.
    layout: one of LAYOUTS, or "auto" for that of `choose_layout`.
  """
  check_choice("layout", layout, ("auto", *LAYOUTS))
  if layout == "auto":
    layout = choose_layout(params)
  params = cross_attention.fold(params)
  if layout == "stacked":
    return spec, params
  if layout == "apart":
    return spec, change_models(params, decoder.unstack)
  spec, join = spec.with_compute(_kernels(spec)), jax.jit(_join)
  params = change_models(params, lambda p: decoder.split_layers(p, join))
  return spec, _transpose_connections(params)


def shapes(
  spec: Composition, params: dict, layout: str
) -> tuple[Composition, dict]:
  """Returns what `prepare` does, for a tree of shapes and one of LAYOUTS."""
  params = jax.eval_shape(cross_attention.fold, params)
  if layout == "stacked":
    return spec, params
  pick = decoder.pick_layer
  if layout == "joined":
    spec, pick = spec.with_compute(_kernels(spec)), _join

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


def _kernels(spec: Composition) -> Callable[[str], dict]:
  """The changes of `Compute`, by models, for decoding on a GPU."""
  kernels = spec.anchor.compute.decoding
  if kernels == "auto":
    is_half = spec.anchor.compute.dtype in attention.HALVES
    kernels = "triton" if is_half else "xla"
  return lambda _: {"decoding": kernels}


def choose_layout(params: dict) -> str:
  """Chooses one of LAYOUTS by the devices that hold the parameters.

  XLA's backends for CPUs and GPUs copy the slices of a stack. Views cost
  nothing on one CPU; one NVIDIA GPU needs room for a copy of all layers. A TPU
  slices without a copy; on several devices `decoder.run_layers` gathers a layer
  at a time.
  """
  models = [params["anchor"], *params.get("augmenting", {}).values()]
  devices = set().union(*map(decoder.stack_devices, models))
  if len(devices) > 1:
    return "stacked"
  [device] = devices
  if device.platform == "cpu":
    return "apart"
  if device.platform != "gpu" or attention.nvidia_generation(device) < 8:
    return "stacked"
  stats = device.memory_stats() or {}
  if "bytes_limit" not in stats:
    return "joined"
  stacks = [model["layers"] for model in models]
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(stacks))
  free = stats["bytes_limit"] - stats["bytes_in_use"]
  fits = size + _SPARE * stats["bytes_limit"] <= free
  return "joined" if fits else "stacked"


def change_models(params: dict, change: Callable[[dict], dict]) -> dict:
  """The tree with the parameters of each frozen model changed."""
  models = {"anchor": change(params["anchor"])}
  if "augmenting" in params:
    models["augmenting"] = {
      name: change(model) for name, model in params["augmenting"].items()
    }
  return params | models
