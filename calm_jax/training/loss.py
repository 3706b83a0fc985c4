"""The loss, as sums and weights, so that any split of a batch adds up.

B batch, L length, D width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Head = Callable[[Any, Array], Array]


def cross_entropy(logits_BLV: Array, targets_BL: Array, weights_BL: Array):
  """Weighted cross-entropy in nats, and the weights, summed over each row [B].

  A weight is 0 where a position has no target or is a prompt's.
  """
  loss_BL = _token_losses(logits_BLV, targets_BL)
  return jnp.sum(loss_BL * weights_BL, axis=-1), jnp.sum(weights_BL, axis=-1)


@jax.custom_vjp
def _token_losses(logits_BLV: Array, targets_BL: Array) -> Array:
  """Cross-entropy [B, L]. Its gradient is one pass over the logits."""
  return _token_losses_forward(logits_BLV, targets_BL)[0]


def _token_losses_forward(logits_BLV, targets_BL):
  target_BL1 = jnp.take_along_axis(logits_BLV, targets_BL[..., None], -1)
  total_BL1 = jax.nn.logsumexp(logits_BLV, axis=-1, keepdims=True)
  return (total_BL1 - target_BL1)[..., 0], (logits_BLV, targets_BL, total_BL1)


def _token_losses_backward(saved, factor_BL):
  logits_BLV, targets_BL, total_BL1 = saved
  hit_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
  probability_BLV = jnp.exp(logits_BLV - total_BL1)
  return (probability_BLV - hit_BLV) * factor_BL[..., None], None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def chunked_rows(head: Head, params, x_BLD, targets_BL, weights_BL, limit: int):
  """`cross_entropy` of the logits that a head makes, few of them at a time.

  Args:
    head: (params, hidden states [B, l, D]) to logits, float32 [B, l, V].
    x_BLD: hidden states after the last layer.
    limit: logits that may exist at a time, but at least one position of each
      row does; 0 for all of them.
  """
  chunks = _split(head, params, limit, x_BLD, targets_BL, weights_BL)

  def add(loss_B, chunk):
    x, targets, weights = chunk
    return loss_B + cross_entropy(head(params, x), targets, weights)[0], None

  first = jax.tree.map(lambda x: x[0], chunks)
  sum_B = jax.eval_shape(lambda: add(0.0, first)[0])
  zeros_B = jnp.zeros(sum_B.shape, sum_B.dtype)
  return jax.lax.scan(add, zeros_B, chunks)[0], weights_BL.sum(axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def chunked_sum(head: Head, params, x_BLD, targets_BL, weights_BL, limit: int):
  """The sum of `chunked_rows`, with gradients at no further matmul.

  A chunk's gradients are computed while its logits exist, in the forward pass,
  up to the factor of the sum. Kept are those of the hidden states and, summed
  over chunks, of the leaves of `params` that are differentiated. The weights
  are constants.
  """
  args = head, params, x_BLD, targets_BL, weights_BL, limit
  return chunked_rows(*args)[0].sum()


def _chunked_sum_forward(head, params, x, targets, weights, limit):
  """`chunked_sum`, and its gradients (None for leaves that need none)."""
  leaves, treedef = jax.tree.flatten(params)
  values = [leaf.value for leaf in leaves]
  trained = {i: x.value for i, x in enumerate(leaves) if x.perturbed}

  def loss(trained, x, targets, weights):
    merged = [trained.get(i, value) for i, value in enumerate(values)]
    logits = head(treedef.unflatten(merged), x)
    return cross_entropy(logits, targets, weights)[0].sum()

  gradient = jax.value_and_grad(loss, argnums=(0, 1) if x.perturbed else (0,))

  def add(carry, chunk):
    value, (trained_grads, *x_grad) = gradient(trained, *chunk)
    return jax.tree.map(jnp.add, carry, (value, trained_grads)), x_grad

  arrays = [v.value for v in (x, targets, weights)]
  chunks = _split(head, treedef.unflatten(values), limit, *arrays)
  value = jax.eval_shape(lambda: loss(trained, *(x[0] for x in chunks)))
  zeros = jnp.zeros((), value.dtype), jax.tree.map(jnp.zeros_like, trained)
  (total, trained_grads), x_grads = jax.lax.scan(add, zeros, chunks)
  x_grad = _join(x_grads[0], x.value.shape) if x_grads else None
  grads = [trained_grads.get(i) for i in range(len(leaves))]
  return total, (treedef.unflatten(grads), x_grad)


def _chunked_sum_backward(head, limit, grads, factor):
  del head, limit
  scaled = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
  return *scaled, None, None


chunked_sum.defvjp(
  _chunked_sum_forward, _chunked_sum_backward, symbolic_zeros=True
)


def _split(head, params, limit, x_BLD, *others_BL) -> tuple[Array, ...]:
  """Chunks [n, B, l, ...] of arrays [B, L, ...], filled up with zeros.

  A chunk is every n-th position, so that all devices have a share of it.
  """
  B, L = x_BLD.shape[:2]
  V = jax.eval_shape(head, params, x_BLD).shape[-1]
  longest = L if limit == 0 else min(L, max(1, limit // (B * V)))
  n = math.ceil(L / longest)
  length = math.ceil(L / n)

  def split(x):
    padding = [(0, 0), (0, n * length - L)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding).reshape(B, length, n, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0)

  return tuple(split(x) for x in (x_BLD, *others_BL))


def _join(chunks: Array, shape: tuple[int, ...]) -> Array:
  """The inverse of `_split`."""
  x = jnp.moveaxis(chunks, 0, 2).reshape(shape[0], -1, *shape[2:])
  return x[:, : shape[1]]
