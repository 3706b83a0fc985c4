"""Losses, as sums and weights, so that any split of a batch adds up.

B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Head = Callable[[Any, Array], Array]


def cross_entropy(logits_BLV: Array, targets_BL: Array, weights_BL: Array):
  """Cross-entropy of the targets, summed over each row.

  Args:
    logits_BLV: float32.
    targets_BL: int32 token ids.
    weights_BL: float32; 0 where a position has no target or is a prompt's.

  Returns:
    (weighted losses in nats [B], weights [B]).
  """
  loss_BL = _nats(logits_BLV, targets_BL)
  return jnp.sum(loss_BL * weights_BL, axis=-1), jnp.sum(weights_BL, axis=-1)


@jax.custom_vjp
def _nats(logits_BLV: Array, targets_BL: Array) -> Array:
  """Cross-entropy [B, L]. Its gradient is one pass over the logits."""
  return _nats_forward(logits_BLV, targets_BL)[0]


def _nats_forward(logits_BLV, targets_BL):
  target_BL1 = jnp.take_along_axis(logits_BLV, targets_BL[..., None], -1)
  total_BL1 = jax.nn.logsumexp(logits_BLV, axis=-1, keepdims=True)
  return (total_BL1 - target_BL1)[..., 0], (logits_BLV, targets_BL, total_BL1)


def _nats_backward(kept, factor_BL):
  logits_BLV, targets_BL, total_BL1 = kept
  hit_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
  return (jnp.exp(logits_BLV - total_BL1) - hit_BLV) * factor_BL[
    ..., None
  ], None


_nats.defvjp(_nats_forward, _nats_backward)


def chunked_rows(
  head: Head,
  params: Any,
  x_BLD: Array,
  targets_BL: Array,
  weights_BL: Array,
  limit: int,
):
  """`cross_entropy` of the logits that a head makes, few of them at a time.

  Args:
    head: (params, hidden states [B, l, D]) to logits, float32 [B, l, V].
    params: of the head.
    x_BLD: hidden states after the last layer.
    targets_BL, weights_BL: as for `cross_entropy`.
    limit: logits that may exist at a time, but at least one position of each
      row does; 0 for all of them.
  """
  chunks = _cut(head, params, limit, x_BLD, targets_BL, weights_BL)

  def add(loss_B, chunk):
    x, targets, weights = chunk
    return loss_B + cross_entropy(head(params, x), targets, weights)[0], None

  start_B = jax.eval_shape(lambda: add(0.0, jax.tree.map(_first, chunks))[0])
  zeros_B = jnp.zeros(start_B.shape, start_B.dtype)
  return jax.lax.scan(add, zeros_B, chunks)[0], weights_BL.sum(axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def chunked_sum(
  head: Head,
  params: Any,
  x_BLD: Array,
  targets_BL: Array,
  weights_BL: Array,
  limit: int,
) -> Array:
  """The sum of `chunked_rows`, with gradients at no further matmul.

  A chunk's gradients are taken while its logits are there, in the forward
  pass: what is kept of it is the gradient of its hidden states, and, of the
  leaves of `params` that are being differentiated, the sum over chunks. So
  the result is one number: its gradients are known up to a factor.

  Gradients go to `params` and `x_BLD`; the weights are constants.
  """
  args = head, params, x_BLD, targets_BL, weights_BL, limit
  return chunked_rows(*args)[0].sum()


def _forward(head, params, x, targets, weights, limit):
  """`chunked_sum`, and its gradients (None for leaves that need none)."""
  leaves, treedef = jax.tree.flatten(params)
  values = [leaf.value for leaf in leaves]
  chosen = [i for i, leaf in enumerate(leaves) if leaf.perturbed]

  def loss(trained, x, targets, weights):
    every = list(values)
    for i, leaf in zip(chosen, trained, strict=True):
      every[i] = leaf
    logits = head(treedef.unflatten(every), x)
    return cross_entropy(logits, targets, weights)[0].sum()

  trained = [values[i] for i in chosen]
  both = jax.value_and_grad(loss, argnums=(0, 1) if x.perturbed else (0,))

  def add(carry, chunk):
    value, (of_trained, *of_x) = both(trained, *chunk)
    return jax.tree.map(jnp.add, carry, (value, of_trained)), of_x

  whole = [v.value for v in (x, targets, weights)]
  chunks = _cut(head, treedef.unflatten(values), limit, *whole)
  value = jax.eval_shape(lambda: loss(trained, *map(_first, chunks)))
  zeros = jnp.zeros((), value.dtype), jax.tree.map(jnp.zeros_like, trained)
  (total, of_trained), of_x = jax.lax.scan(add, zeros, chunks)
  of_x = [_join(g, x.value.shape) for g in of_x]
  grads = [None] * len(leaves)
  for i, grad in zip(chosen, of_trained, strict=True):
    grads[i] = grad
  return total, (treedef.unflatten(grads), of_x[0] if of_x else None)


def _backward(head, limit, grads, factor):
  del head, limit
  of_params, of_x = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
  return of_params, of_x, None, None


chunked_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _cut(head, params, limit, x_BLD, *others_BL) -> tuple[Array, ...]:
  """Chunks [n, B, l, ...] of arrays [B, L, ...]; what is added is zero.

  A chunk is every n-th position, so that it is spread over devices as evenly
  as the whole, whichever axes they share.
  """
  B, L = x_BLD.shape[:2]
  V = jax.eval_shape(head, params, x_BLD).shape[-1]
  most = L if limit == 0 else min(L, max(1, limit // (B * V)))
  n = math.ceil(L / most)
  each = math.ceil(L / n)

  def one(x):
    gap = [(0, 0), (0, n * each - L)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, gap).reshape(B, each, n, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0)

  return tuple(one(x) for x in (x_BLD, *others_BL))


def _join(chunks: Array, shape: tuple[int, ...]) -> Array:
  """The inverse of `_cut`."""
  n, B, each = chunks.shape[:3]
  x = jnp.moveaxis(chunks, 0, 2).reshape(B, each * n, *chunks.shape[3:])
  return x[:, : shape[1]]


def _first(chunks: Array) -> Array:
  return chunks[0]
