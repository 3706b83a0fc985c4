"""The loss, as sums and weights, so that any split of a batch adds up.

B batch, L length, D width, V vocabulary; for R, S, T, n and l see `Chunks`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Head = Callable[[Any, Array], Array]
Shares = tuple[int, int]
_LANES = 128


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
  total_BL1 = jax.lax.platform_dependent(
    logits_BLV,
    cuda=single_pass_logsumexp,
    default=functools.partial(jax.nn.logsumexp, axis=-1, keepdims=True),
  )
  return (total_BL1 - target_BL1)[..., 0], (logits_BLV, targets_BL, total_BL1)


def single_pass_logsumexp(logits_BLV: Array) -> Array:
  """Computes the `logsumexp` of logits, [B, L, 1], of which one is finite.

  It finds maximum and sum together. So a GPU, which waits for its memory here,
  reads the logits once; a CPU would take longer.
  """

  def join(left, right):
    most = jnp.maximum(left[0], right[0])
    sums = (total * jnp.exp(top - most) for top, total in (left, right))
    return most, sum(sums)

  dtype = logits_BLV.dtype
  start = jnp.finfo(dtype).min, jnp.zeros((), dtype)
  operands = logits_BLV, jnp.ones_like(logits_BLV)
  axis = logits_BLV.ndim - 1
  most_BL, total_BL = jax.lax.reduce(operands, start, join, (axis,))
  return (most_BL + jnp.log(total_BL))[..., None]


def _token_losses_backward(saved, factor_BL):
  logits_BLV, targets_BL, total_BL1 = saved
  hit_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
  probability_BLV = jnp.exp(logits_BLV - total_BL1)
  return (probability_BLV - hit_BLV) * factor_BL[..., None], None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def chunked_rows(
  head: Head, params, x_BLD, targets_BL, weights_BL, size: int, shares=(1, 1)
):
  """`cross_entropy` of the logits that a head makes, few of them at a time.

  Chunks of positions without any weight are skipped, see `Chunks`.

  Args:
    head: (params, hidden states [..., D]) to logits, float32 [..., V].
    x_BLD: hidden states after the last layer.
    size: positions of a chunk on each device; 0 for all at once.
    shares: the numbers of devices that share the rows, and the tokens of a row.
  """
  chunks = Chunks(weights_BL, size, shares)

  def run(carry, x, targets, weights):
    return carry, _token_losses(head(params, x), targets) * weights

  _, losses = chunks.scan(run, None, x_BLD, targets_BL)
  return chunks.join(losses).sum(axis=-1), weights_BL.sum(axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6))
def chunked_sum(
  head: Head, params, x_BLD, targets_BL, weights_BL, size: int, shares=(1, 1)
):
  """The sum of `chunked_rows`, with gradients at no further matmul.

  A chunk's gradients are computed while its logits exist, in the forward pass,
  up to the factor of the sum. Kept are those of the hidden states and, summed
  over chunks, of the leaves of `params` that are differentiated. The weights
  are constants.
  """
  args = head, params, x_BLD, targets_BL, weights_BL, size, shares
  return chunked_rows(*args)[0].sum()


def _chunked_sum_forward(head, params, x, targets, weights, size, shares):
  """`chunked_sum`, and its gradients (None for leaves that need none)."""
  leaves, treedef = jax.tree.flatten(params)
  values = [leaf.value for leaf in leaves]
  trained = {i: x.value for i, x in enumerate(leaves) if x.perturbed}

  def loss(trained, x, targets, weights):
    merged = [trained.get(i, value) for i, value in enumerate(values)]
    logits = head(treedef.unflatten(merged), x)
    losses = _token_losses(logits, targets) * weights
    return losses.sum(), losses

  argnums = (0, 1) if x.perturbed else (0,)
  gradient = jax.grad(loss, argnums=argnums, has_aux=True)

  def run(sums, *chunk):
    (grads, *x_grad), losses = gradient(trained, *chunk)
    return jax.tree.map(jnp.add, sums, grads), (losses, x_grad)

  chunks = Chunks(weights.value, size, shares)
  zeros = jax.tree.map(jnp.zeros_like, trained)
  sums, (losses, x_grad) = chunks.scan(run, zeros, x.value, targets.value)
  grads = [sums.get(i) for i in range(len(leaves))]
  x_grad = chunks.join(x_grad[0]) if x_grad else None
  return losses.sum(), (treedef.unflatten(grads), x_grad)


def _chunked_sum_backward(head, size, shares, grads, factor):
  del head, size, shares
  scaled = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
  return *scaled, None, None


chunked_sum.defvjp(
  _chunked_sum_forward, _chunked_sum_backward, symbolic_zeros=True
)


class Chunks:
  """Chunks of a batch's positions, those without a weight in the last ones.

  Prompts, padding and gaps have no loss, and need no logits. Each device orders
  its own T positions: R devices share the rows of a batch, S the tokens of a
  row. Each of n chunks has l positions of each device, some of the last one's
  to fill it up.
  """

  def __init__(self, weights_BL: Array, size: int, shares: Shares):
    (B, L), (self.R, self.S) = weights_BL.shape, shares
    self.shape, self.T = (B, L), B * L // (self.R * self.S)
    size = size or self.T
    self.n = math.ceil(self.T / size)
    # Chunks of about one length, which accelerators want to be such a multiple.
    lanes = math.ceil(self.T / self.n / _LANES) * _LANES
    self.length = min(size, lanes)
    self.weights_RST = self._share(weights_BL)
    is_last_RST = self.weights_RST == 0
    self.order_RST = jnp.argsort(is_last_RST, axis=-1, stable=True)

  def scan(self, run: Callable, carry: Any, *arrays: Array) -> tuple[Any, Any]:
    """Scans over the chunks, and skips those without a weight.

    Args:
      run: (carry, chunks [R, S, l, ...] of the arrays and of the weights) to
        the new carry and outputs; those of a chunk that is skipped are zeros.
      carry: the first one.
      *arrays: [B, L, ...].
    """
    shares = [self._share(x) for x in arrays]
    if self.n == 1:
      carry, outputs = run(carry, *shares, self.weights_RST)
      return carry, jax.tree.map(lambda x: x[None], outputs)

    def picked(carry, index_RSl, weights_RSl):
      return run(carry, *(_take(x, index_RSl) for x in shares), weights_RSl)

    def step(carry, chunk):
      shapes = jax.eval_shape(picked, carry, *chunk)[1]

      def skip(carry, *_):
        zeros = [jnp.zeros(x.shape, x.dtype) for x in jax.tree.leaves(shapes)]
        return carry, jax.tree.structure(shapes).unflatten(zeros)

      is_needed = (chunk[1] != 0).any()
      return jax.lax.cond(is_needed, picked, skip, carry, *chunk)

    weights_RST = _take(self.weights_RST, self.order_RST)
    chunks = self._split(self.order_RST), self._split(weights_RST)
    return jax.lax.scan(step, carry, chunks)

  def join(self, chunks: Array) -> Array:
    """Puts outputs of a scan, [n, R, S, l, ...], back to [B, L, ...]."""
    (B, L), (R, S) = self.shape, (self.R, self.S)
    x = jnp.moveaxis(chunks, 0, 2).reshape(R, S, -1, *chunks.shape[4:])
    if self.n > 1:
      x = _take(x, jnp.argsort(self.order_RST, axis=-1))
    x = x.reshape(R, S, B // R, L // S, *x.shape[3:])
    return jnp.moveaxis(x, 1, 2).reshape(B, L, *x.shape[4:])

  def _share(self, x: Array) -> Array:
    """The positions of each device: [B, L, ...] to [R, S, T, ...]."""
    (B, L), (R, S), rest = self.shape, (self.R, self.S), x.shape[2:]
    x = jnp.moveaxis(x.reshape(R, B // R, S, L // S, *rest), 2, 1)
    return x.reshape(R, S, self.T, *rest)

  def _split(self, x_RST: Array) -> Array:
    """Cuts into chunks [n, R, S, l], and fills up with zeros."""
    x = jnp.pad(x_RST, [(0, 0), (0, 0), (0, self.n * self.length - self.T)])
    return jnp.moveaxis(x.reshape(self.R, self.S, self.n, self.length), 2, 0)


def _take(x: Array, index_RSl: Array) -> Array:
  """Takes positions of [R, S, T, ...]."""
  index = index_RSl.reshape(*index_RSl.shape, *[1] * (x.ndim - 3))
  return jnp.take_along_axis(x, index, axis=2, mode="promise_in_bounds")
