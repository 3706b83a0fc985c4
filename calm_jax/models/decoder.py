"""One decoder, in steps: embed, layers [start, stop), logits.

The caller may stop after any layer and go on with another hidden state; that
is all that composition needs, so there are no hooks. Parameters are a nested
dict with the layers stacked, and matrices perhaps quantised (`quantisation`):

  {"embed": {"embedding": [V, D]}        and learned "position_embedding",
   "layers": {"attention": {...}, ...}   each [num_layers, ...],
   "final_norm": {"scale": [D]},
   "head": {"kernel": [D, V]}}           unless tied
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.models import cache as cache_lib
from calm_jax.models.attention import PIECES
from calm_jax.models.block import Block
from calm_jax.models.config import ModelConfig
from calm_jax.models.layers import Linear, at_least_float32, norm
from calm_jax.models.masks import Context, first_alike, make_context
from calm_jax.models.quantisation import dense, is_quantised, matmul

Array = jax.Array
_LANES = 128  # A vocabulary is filled up to a multiple of it.


def init(rng: Array, config: ModelConfig) -> dict:
  """Draws random float32 parameters: normal with variance 1 / fan-in.

  Embeddings have standard deviation 0.02, norms scale by one, biases are zero;
  matrices that write into the residual stream are divided by sqrt(2 layers).
  """

  def draw(key, path, shape):
    owner, name = path[-2].key, path[-1].key
    if name == "scale":
      value = 0 if config.norm == "rms_plus_one" else 1
      return jnp.full(shape.shape, value, jnp.float32)
    if name == "bias":
      return jnp.zeros(shape.shape, jnp.float32)
    variance = 0.02**2 if name.endswith("embedding") else 1 / shape.shape[-2]
    if owner in ("output", "down"):
      variance /= 2 * config.num_layers
    return variance**0.5 * jax.random.normal(key, shape.shape, jnp.float32)

  leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config))
  keys = jax.random.split(rng, len(leaves))
  drawn = [draw(k, p, s) for k, (p, s) in zip(keys, leaves, strict=True)]
  return jax.tree_util.tree_unflatten(tree, drawn)


def param_shapes(config: ModelConfig) -> dict:
  """Returns the parameter tree as ShapeDtypeStructs; nothing is allocated."""
  return _zeros.eval_shape(config)


@functools.partial(jax.jit, static_argnums=0)  # so that it is traced once
def _zeros(config: ModelConfig) -> dict:
  """Makes parameters of the right names, shapes and dtypes."""
  rng, x = jax.random.key(0), jnp.zeros((1, 1, config.width))
  positions, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
  context = make_context(config, positions, mask)
  layer = Block(config).init(rng, x, context)["params"]
  params = {
    "embed": {"embedding": jnp.zeros((config.vocab_size, config.width))},
    "layers": jax.tree.map(
      lambda p: jnp.zeros((config.num_layers, *p.shape)), layer
    ),
    "final_norm": norm(config).init(rng, x)["params"],
  }
  if config.learned_positions:
    table_PD = jnp.zeros((config.max_length, config.width))
    params["embed"]["position_embedding"] = table_PD
  if not config.tie_embeddings:
    params["head"] = Linear(config.vocab_size).init(rng, x)["params"]
  return params


def embed(
  params: dict, config: ModelConfig, tokens_BL: Array, positions_BL: Array
) -> Array:
  """Computes the hidden states before the first layer, [B, L, D].

  Learned positions beyond the table are NaN, not the last one.
  """
  embed = params["embed"]
  rows = jax.tree.map(lambda table: table[tokens_BL], embed["embedding"])
  x_BLD = dense(rows, config.compute.dtype)
  if config.embedding_scale != 1:
    x_BLD = x_BLD * jnp.asarray(config.embedding_scale, x_BLD.dtype)
  if config.learned_positions:
    table_PD = embed["position_embedding"].astype(config.compute.dtype)
    x_BLD = x_BLD + jnp.take(table_PD, positions_BL, axis=0, mode="fill")
  if config.compute.place is not None:
    x_BLD = config.compute.place.states(x_BLD)
  return x_BLD


def run_layers(
  params: dict,
  config: ModelConfig,
  x_BLD: Array,
  context: Context,
  start: int = 0,
  stop: int | None = None,
  cache: Any = None,
) -> tuple[Array, Any]:
  """Runs layers start+1 .. stop (counting from 1) on the states after `start`.

  Returns the hidden states after layer `stop`, by default the last, and the
  cache from `empty_cache` with the new keys and values from slot `index` on.
  """
  stop = config.num_layers if stop is None else stop
  if isinstance(params["layers"], tuple):  # of `unstack`, like the cache
    return _run_apart(
      params["layers"], config, x_BLD, context, start, stop, cache
    )
  # The gradient of indexing would add into the whole stack once per layer, so
  # a scan over all layers slices the stack itself. To slice some layers before
  # the scan would copy them, so these are indexed inside; and so are experts in
  # decoding, of which the scan would copy a layer's all, where few are needed.
  sliced = (start, stop) == (0, config.num_layers)
  sliced = sliced and not (config.num_experts and cache is not None)
  place = config.compute.place

  def run_layer(carry, scanned):
    x, cache = carry
    layer, weights = scanned
    if sliced:
      weights = _placed(config, weights)
    else:
      weights = _placed(config, params["layers"], layer=layer)
    x, cache = Block(config).apply(
      {"params": weights}, x, context, cache, layer
    )
    return (x if place is None else place.states(x), cache), None

  policy = _remat_policy(config.compute.remat, sliced)
  if policy is not None:
    run_layer = jax.checkpoint(run_layer, policy=policy, prevent_cse=False)
  scanned = jnp.arange(start, stop), params["layers"] if sliced else None
  unroll = min(config.compute.unroll, stop - start)
  return jax.lax.scan(run_layer, (x_BLD, cache), scanned, unroll=unroll)[0]


def _run_apart(
  layers: tuple[dict, ...],
  config: ModelConfig,
  x_BLD: Array,
  context: Context,
  start: int,
  stop: int,
  cache: tuple | None,
) -> tuple[Array, tuple | None]:
  """`run_layers` of layers that are not stacked."""
  caches = [None] * config.num_layers if cache is None else list(cache)
  for i in range(start, stop):
    like = first_alike(config, i)
    x_BLD, caches[i] = _layer(
      config, like, layers[i], x_BLD, context, caches[i]
    )
  return x_BLD, None if cache is None else tuple(caches)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(config: ModelConfig, layer: int, weights, x_BLD, context, cache):
  """Runs one layer under jit: layers that are alike are traced once."""
  return Block(config).apply({"params": weights}, x_BLD, context, cache, layer)


def _remat_policy(remat: str, sliced: bool) -> Callable | None:
  """Chooses what of a layer is kept for the backward pass; None for all.

  Weights that were indexed are never kept, which would copy the stack.
  """
  if remat == "full":
    return jax.checkpoint_policies.nothing_saveable
  if remat == "dots":
    return _keeps_products
  if sliced:
    return None
  cheap = {"dynamic_slice", "squeeze", "sharding_constraint"}
  cheap |= {"convert_element_type"}
  return lambda primitive, *_, **__: primitive.name not in cheap


def _keeps_products(primitive, *args, **params) -> bool:
  """Keeps what products of matrices and attention kernels compute.

  Of attention that is its output, and cuDNN's statistics of its softmax.
  """
  is_kernel = primitive.name.startswith("dot_product_attention_fwd")
  is_kernel |= primitive.name == "name" and params["name"] == PIECES
  return is_kernel or jax.checkpoint_policies.dots_saveable(
    primitive, *args, **params
  )


def _placed(config: ModelConfig, weights: dict, part="layers", layer=None):
  """Gathers weights for the computation if they are sharded.

  With `layer`, that layer's are picked from a stack first; experts stay stacked
  for `MoE` to pick from.
  """

  def gather(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if layer is not None:
      if "experts" in name.split("/"):
        return leaf
      leaf = leaf[layer]
    place = config.compute.place
    return leaf if place is None else place.weight(f"{part}/{name}", leaf)

  return jax.tree_util.tree_map_with_path(gather, weights)


def head_weights(params: dict, config: ModelConfig) -> dict:
  """Returns the parameters that `logits` reads, as the loss needs them.

  They are gathered if sharded. In half precision an odd vocabulary is filled
  up: tensor cores read rows that start at multiples of 16 bytes, and XLA would
  copy all logits and their gradients to such rows.
  """
  owner, name = "head", "kernel"
  if config.tie_embeddings:
    owner, name = "embed", "embedding"
  weight = _placed(config, {name: params[owner][name]}, owner)
  weights = {"final_norm": params["final_norm"], owner: weight}
  itemsize = jnp.dtype(config.compute.dtype).itemsize
  is_odd = itemsize == 2 and config.vocab_size * itemsize % 16
  return fill_up(weights) if is_odd else weights


def fill_up(weights: dict) -> dict:
  """Adds zeros to the vocabulary of `head_weights`, to a multiple of 128.

  A quantised matrix is left as it is, since it is made anew at each use.
  """
  owner, name, axis = "head", "kernel", 1
  if "embed" in weights:
    owner, name, axis = "embed", "embedding", 0
  weight = weights[owner][name]
  if is_quantised(weight):
    return weights
  widths = [(0, 0), (0, 0)]
  widths[axis] = 0, -weight.shape[axis] % _LANES
  return weights | {owner: {name: jnp.pad(weight, widths)}}


def logits(params: dict, config: ModelConfig, x_BLD: Array) -> Array:
  """Computes float32 logits or wider [B, L, V]; reads `head_weights` only.

  Those of what `fill_up` added are the least number.
  """
  x: Any = norm(config).apply({"params": params["final_norm"]}, x_BLD)
  flat = x.reshape(-1, x.shape[-1]).astype(config.compute.dtype)
  if config.tie_embeddings:
    flat = matmul(flat, params["embed"]["embedding"], transposed=True)
  else:
    flat = matmul(flat, params["head"]["kernel"])
  dtype = at_least_float32(config.compute.dtype)
  logits_BLV = flat.reshape(*x.shape[:-1], -1).astype(dtype)
  if config.logit_scale != 1:
    logits_BLV = logits_BLV * config.logit_scale
  if config.logit_cap is not None:
    logits_BLV = config.logit_cap * jnp.tanh(logits_BLV / config.logit_cap)
  if logits_BLV.shape[-1] > config.vocab_size:
    is_token_V = jnp.arange(logits_BLV.shape[-1]) < config.vocab_size
    least = jnp.finfo(logits_BLV.dtype).min
    logits_BLV = jnp.where(is_token_V, logits_BLV, least)
  return logits_BLV


def empty_cache(
  config: ModelConfig, batch: int, slots: int, stacked: bool = True
) -> dict | tuple:
  """Makes an empty `cache`: of all layers, or (`unstack`) one of each."""
  shape = batch, config.num_kv_heads, slots, config.head_dim
  rows = [config.num_layers] if stacked else [1] * config.num_layers
  caches = [cache_lib.empty(r, *shape, config.compute.dtype) for r in rows]
  return caches[0] if stacked else tuple(caches)


def unstack(params: dict) -> dict:
  """Returns the parameters with "layers" as a tuple of trees, one a layer.

  XLA's CPU backend copies a layer's weights out of the stack at each step of a
  scan, so decoding is several times slower. The result is views of the stack,
  on one CPU.
  """

  def view(leaf, layer):
    return jax.device_put(np.asarray(leaf)[layer], may_alias=True)

  return split_layers(params, functools.partial(pick_layer, pick=view))


def stack_devices(params: dict) -> set[jax.Device]:
  """Returns the devices that hold the stack of layers."""
  leaves = jax.tree.leaves(params["layers"])
  return set().union(*(leaf.devices() for leaf in leaves))


def pick_layer(stack: dict, layer: Array | int, pick=operator.getitem) -> dict:
  """Returns a layer's tree out of the stack of all."""
  return jax.tree.map(lambda leaf: pick(leaf, layer), stack)


def split_layers(
  params: dict, pick: Callable[[dict, int], dict] = pick_layer
) -> dict:
  """The parameters with "layers" as a tuple of trees, by `pick(stack, i)`."""
  stack = params["layers"]
  count = len(jax.tree.leaves(stack)[0])
  return params | {"layers": tuple(pick(stack, i) for i in range(count))}
