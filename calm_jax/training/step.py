"""The programs of training: the loss of a batch, and the jitted update."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from calm_jax.composition import forward
from calm_jax.composition.connections import Composition
from calm_jax.core import trees
from calm_jax.core.batch import Batch
from calm_jax.models import decoder
from calm_jax.parallel.sharding import Layout
from calm_jax.training import loss as loss_lib
from calm_jax.training.optimizer import Optimizer
from calm_jax.training.stage import Stage

Array = jax.Array


def row_losses(params: dict, spec: Composition, batch: Batch):
  """Cross-entropy in nats and weights of each row of a batch, [B] each."""
  return loss_lib.chunked_rows(*_loss_arguments(params, spec, batch))


def summed_loss(params: dict, spec: Composition, batch: Batch):
  """The sum of the losses of `row_losses`, to be differentiated."""
  return loss_lib.chunked_sum(*_loss_arguments(params, spec, batch))


def _loss_arguments(params: dict, spec: Composition, batch: Batch) -> tuple:
  """The arguments of `chunked_rows` and `chunked_sum` for a batch."""
  config, place = spec.anchor, spec.anchor.compute.place

  def head(weights, x_BLD):
    return decoder.logits(weights, config, x_BLD)

  weights = decoder.head_weights(params["anchor"], config)
  x_BLD, _ = forward.states(params, spec, batch)
  shares = (1, 1) if place is None else place.shares(x_BLD)
  labels = batch.targets, batch.weights
  return head, weights, x_BLD, *labels, config.compute.loss_chunk, shares


def initial_state(
  optimizer: Optimizer, trainable: dict, layout: Layout | None = None
) -> dict[str, Any]:
  """The training state before the first step, laid out as its parameters."""

  def rest(trainable):
    return {"opt_state": optimizer.init(trainable), "step": jnp.int32(0)}

  state = {"trainable": trainable}
  if layout is None:
    return state | rest(trainable)
  shardings = layout.following(state | jax.eval_shape(rest, trainable))
  del shardings["trainable"]
  return state | jax.jit(rest, out_shardings=shardings)(trainable)


def make_step(
  spec: Composition,
  stage: Stage,
  optimizer: Optimizer,
  layout: Layout | None = None,
) -> jax.stages.Wrapped:
  """The jitted update: (state, frozen, batch) -> (state, metrics).

  The state is donated; gradients are taken of its trainable leaves only.
  """

  @jax.value_and_grad
  def loss_and_gradient(trainable, frozen, piece, total):
    params = trees.merge(trainable, frozen)
    part, params = forward.submodel(spec, params, stage.model)
    return summed_loss(params, part, piece) / total

  def gradients(trainable, frozen, batch):
    total = jnp.maximum(batch.weights.sum(), 1)
    if stage.accumulate == 1:
      return loss_and_gradient(trainable, frozen, batch, total)
    pieces = jax.tree.map(
      lambda x: x.reshape(stage.accumulate, -1, *x.shape[1:]), batch
    )
    if layout is not None:
      pieces = layout.constrain_all("batch", pieces)

    def add(carry, piece):
      new = loss_and_gradient(trainable, frozen, piece, total)
      return jax.tree.map(jnp.add, carry, new), None

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable)
    return jax.lax.scan(add, zeros, pieces)[0]

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, frozen, batch):
    trainable = state["trainable"]
    loss, grads = gradients(trainable, frozen, batch)
    new, opt_state = optimizer.update(grads, state["opt_state"], trainable)
    metrics = {
      "loss": loss,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": optimizer.learning_rate(state["step"]),
      "tokens": (batch.anchor.segments > 0).sum(),
    }
    number = state["step"] + 1
    state = {"trainable": new, "opt_state": opt_state, "step": number}
    if layout is not None:
      shardings = layout.following(state)
      state = jax.lax.with_sharding_constraint(state, shardings)
    return state, metrics

  return step


def make_eval(spec: Composition, model: str) -> Callable:
  """Jitted (trainable, frozen, batch) -> (summed loss, weights)."""

  @jax.jit
  def evaluate(trainable, frozen, batch):
    part, params = forward.submodel(spec, trees.merge(trainable, frozen), model)
    loss_B, weight_B = row_losses(params, part, batch)
    return loss_B.sum(), weight_B.sum()

  return evaluate
