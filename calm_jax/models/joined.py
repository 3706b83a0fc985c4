"""Layers whose matrices are joined for decoding on a GPU.

Matrices that read the same input are one, and all are transposed: a row times a
matrix [out, in] is a sum over contiguous weights. In a layer's tree stand

  attention/query_key_value, attention/output    in place of query, key, value
  mlp/gate_up (without a gate up), mlp/down      in place of gate and up

each with the leaf "transposed" in place of "kernel". `Block` reads them; `step`
computes a decoding step of few rows by `linear_kernel` and `attention_kernel`.
"""

import functools

import jax
import jax.numpy as jnp

from calm_jax.models import attention_kernel, linear_kernel, quantisation, tiles
from calm_jax.models.config import ModelConfig
from calm_jax.models.layers import activation, norm
from calm_jax.models.masks import Context, at_layer

Array = jax.Array
_TOGETHER = {
  "attention": {"query_key_value": ("query", "key", "value")},
  "mlp": {"gate_up": ("gate", "up")},
}


def join(layer: dict) -> dict:
  """Joins and transposes the matrices of one layer; experts stay as they are.

  So do matrices with LoRA. Those that are quantised differently from their
  neighbours are transposed only.
  """
  layer = dict(layer)
  for part, together in _TOGETHER.items():
    kept = layer[part] = dict(layer[part])
    if "experts" in kept:
      continue
    for name, module in kept.items():
      if "kernel" in module and "lora_a" not in module:
        kept[name] = transpose(module)
    for name, members in together.items():
      modules = [kept[m] for m in members if m in kept]
      if len(modules) == len(members) and _alike(modules):
        kept[name] = concatenate(modules)
        for member in members:
          del kept[member]
  return layer


def transpose(module: dict) -> dict:
  """The parameters of a `Linear` with its kernel transposed."""
  rest = {name: leaf for name, leaf in module.items() if name != "kernel"}
  return rest | {"transposed": quantisation.transpose(module["kernel"])}


def concatenate(modules: list[dict]) -> dict:
  """Joins transposed `Linear`s that read the same input."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *modules)


def _alike(modules: list[dict]) -> bool:
  """Returns whether modules are transposed, and quantised alike."""
  trees = {jax.tree.structure(m) for m in modules}
  rows = {tuple(x.shape[1:] for x in jax.tree.leaves(m)) for m in modules}
  return len(trees) == len(rows) == 1 and "transposed" in modules[0]


def has_step(config: ModelConfig, layer: dict, x_BLD: Array) -> bool:
  """Returns whether `step` computes a layer for few rows of one new token."""
  c, few = config, x_BLD.shape[1] == 1 and len(x_BLD) <= tiles.ROWS
  if c.compute.decoding != "triton" or not few:
    return False
  if c.norm == "layer" or c.qk_norm == "full" or c.parallel_residual:
    return False
  up = "gate_up" if c.gated_mlp else "up"
  read = {"attention": ("query_key_value", "output"), "mlp": (up, "down")}
  return all(
    is_read(layer[part].get(name, {}))
    for part, names in read.items()
    for name in names
  )


def is_read(module: dict) -> bool:
  """Returns whether `linear_kernel.linear` reads a `Linear` with parameters."""
  if "transposed" not in module:
    return False
  weight = module["transposed"]
  if not quantisation.is_quantised(weight) or "int8" in weight:
    return True
  D = 2 * weight["int4"].shape[1]
  return -(-D // weight["scale"].shape[1]) % 2 == 0


def reads_table(config: ModelConfig, table_VD: Array | dict, rows: int) -> bool:
  """Returns whether a kernel multiplies states with a quantised table.

  XLA would write it to memory dequantised; it streams one that is not.
  """
  few = config.compute.decoding == "triton" and rows <= tiles.ROWS
  quantised = quantisation.is_quantised(table_VD)
  return few and quantised and is_read({"transposed": table_VD})


def linear(x_BD: Array, module: dict, **options) -> tuple[Array, Array]:
  """`linear_kernel.linear` with the parameters of a `Linear`."""
  weight, bias = module["transposed"], module.get("bias")
  return linear_kernel.linear(x_BD, weight, bias, **options)


def step(
  config: ModelConfig,
  layer: int,
  weights: dict,
  x_BD: Array,
  delta_BD: Array | None,
  before: dict,
  context: Context,
  cache: dict,
) -> tuple[Array, Array, dict]:
  """Runs one layer on the newest token of each row, by kernels.

  Args:
    config, layer: the model, and which layer computes as this one does.
    weights: of the layer, from `join`.
    x_BD: the states after the layer before, but for
    delta_BD: what its MLP adds, before its norm; None if nothing is left.
    before: the weights of that layer.
    context: of the step.
    cache: of this layer alone.

  Returns:
    The states and the new `delta_BD`, and the cache.
  """
  c, attention, mlp = config, weights["attention"], weights["mlp"]
  eps, plus_one = c.norm_eps, c.norm == "rms_plus_one"

  def rms(owner, name):
    if name not in owner:
      return None
    return tiles.RmsNorm(owner[name]["scale"], eps, plus_one)

  def residual(delta_BD, owner, name):
    if delta_BD is None:
      return None
    normed = rms(owner, f"{name}_post_norm")
    return linear_kernel.Residual(delta_BD, normed, c.residual_scale)

  qkv_BF, x_BD = linear(
    x_BD,
    attention["query_key_value"],
    norm=rms(weights, "attention_norm"),
    residual=residual(delta_BD, before, "mlp"),
  )
  rope, mask_B11S = at_layer(c, context, layer)
  turn = None
  if rope is not None:
    turn = attention_kernel.Turn.make(rope, c.head_dim)
  scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
  out_BF, cache = attention_kernel.attend(
    qkv_BF,
    cache,
    bias(mask_B11S),
    context.index + 1,
    c.num_heads,
    scale / (layer + 1) if c.scale_by_depth else scale,
    c.attention_cap,
    attention_kernel.NewToken(
      turn, rms(attention, "query_norm"), rms(attention, "key_norm")
    ),
  )
  delta_BD, _ = linear(out_BF, attention["output"])
  hidden_BF, x_BD = linear(
    x_BD,
    mlp["gate_up" if c.gated_mlp else "up"],
    norm=rms(weights, "mlp_norm"),
    residual=residual(delta_BD, weights, "attention"),
    activation=activation(c.activation),
    gated=c.gated_mlp,
  )
  return x_BD, linear(hidden_BF, mlp["down"])[0], cache


def bias(mask_B11S: Array) -> Array:
  """Makes the bias of the scores of one query a row, float32 [B, S]."""
  return jnp.where(mask_B11S[:, 0, 0], 0, -1e30).astype(jnp.float32)


def finish(
  config: ModelConfig, weights: dict, x_BD: Array, delta_BD: Array
) -> Array:
  """The states after a layer of `step`, all added."""
  if config.post_norm:
    params = {"params": weights["mlp_post_norm"]}
    delta_BD = norm(config).apply(params, delta_BD)
  if config.residual_scale != 1:
    delta_BD = delta_BD * config.residual_scale
  return x_BD + delta_BD


run_step = functools.partial(jax.jit, static_argnums=(0, 1))(step)
