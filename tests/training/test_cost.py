"""What a training step costs: no work, memory or program text too many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from calm_jax.composition import cross_attention, forward
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.core.batch import plain_batch
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig

B, L, V = 2, 64, 301


def model(width: int, layers: int, **changes) -> ModelConfig:
  return ModelConfig(
    **{
      "vocab_size": V, "width": width, "num_layers": layers, "num_heads": 4,
      "num_kv_heads": 2, "head_dim": width // 4, "mlp_width": 3 * width,
    } | changes
  )  # fmt: skip


def lower(spec: Composition, batch: int = B, length: int = L):
  """The step that trains the composition, lowered without allocating."""
  frozen = {
    "anchor": decoder.param_shapes(spec.anchor),
    "augmenting": {
      n: decoder.param_shapes(a.config) for n, a in spec.augmenting
    },
  }
  theta = cross_attention.param_shapes(spec)
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

  def loss(theta, frozen, tokens):
    logits, _ = forward.forward(
      frozen | {"composition": theta}, spec, plain_batch(tokens)
    )
    picked = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)

  return jax.jit(jax.value_and_grad(loss)).lower(theta, frozen, tokens)


def join(anchor, augmenting, connections, norm=True) -> Composition:
  pairs = tuple(Connection(*c) for c in connections)
  return Composition(
    anchor, (("kv", Augmenting(augmenting, pairs, norm=norm)),)
  )


# FLOPs. A matmul [T, I] @ [I, O] is 2 T I O; each of its two gradients too.


def _attention(config_heads_width: int) -> int:
  """Scores and weighted values of one layer, without the causal half."""
  return 2 * 2 * B * L * L * config_heads_width


def _layer_linears(c: ModelConfig) -> int:
  inner = 2 * c.num_heads * c.head_dim + 2 * c.num_kv_heads * c.head_dim
  return 2 * B * L * c.width * (inner + 3 * c.mlp_width)


def _layer(c: ModelConfig) -> int:
  return _layer_linears(c) + _attention(c.num_heads * c.head_dim)


def least_flops(spec: Composition) -> int:
  """What one step cannot do without.

  m_A up to its last tapped layer, forward; m_B with its head, forward; the
  gradients of m_B's activations above the first connection; Θ_C three times
  (forward, dX, dW), less what would go on into a frozen state: the dX of the
  projections, and of the query of the first connection. A norm before those
  is trained, and needs them.
  """
  (_, joined), b = spec.augmenting[0], spec.anchor
  a, D = joined.config, b.width
  connections = sorted(joined.connections, key=lambda c: c.anchor)
  head = 2 * B * L * D * b.vocab_size
  total = max(c.augmenting for c in connections) * _layer(a)
  total += b.num_layers * _layer(b) + head
  above = b.num_layers - connections[0].anchor
  # Attention has four gradient matmuls for the two of its forward pass.
  total += head + above * (
    _layer_linears(b) + 2 * _attention(b.num_heads * b.head_dim)
  )
  square, projection = 2 * B * L * D * D, 2 * B * L * a.width * D
  for i, _ in enumerate(connections):
    total += 3 * (4 * square + projection + _attention(D))
    if not joined.norm:
      total -= projection + (square if i == 0 else 0)
  return total


@pytest.mark.parametrize("norm", [True, False])
def test_flops_are_at_most_a_tenth_above_the_least(norm):
  # XLA counts the body of a loop once, however often it runs, so all of
  # the layers are unrolled here. Much of m_A lies above its last tapped layer,
  # and half of m_B below the first connection, so that waste would show.
  anchor, augmenting = model(256, 6), model(256, 9)
  spec = join(anchor, augmenting, [(1, 3), (3, 5)], norm)
  spec = spec.with_compute(lambda part: {"unroll": 9})
  counted = lower(spec).compile().cost_analysis()["flops"]
  ratio = counted / least_flops(spec)
  print(f"norm={norm}: {counted:.4g} FLOPs, {ratio:.3f} of the least")
  assert 0.98 <= ratio <= 1.10  # below one, the count itself would be wrong


# Memory.


def memory(anchor_layers: int, augmenting_layers: int):
  """(bytes of arguments, temporary bytes); the anchor grows at its bottom."""
  anchor, augmenting = model(128, anchor_layers), model(128, augmenting_layers)
  spec = join(
    anchor,
    augmenting,
    [
      (augmenting_layers // 2, anchor_layers - 2),
      (augmenting_layers, anchor_layers - 1),
    ],
  )
  analysis = lower(spec, length=16).compile().memory_analysis()
  return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


def test_memory_does_not_grow_with_the_frozen_models():
  arguments, temporary = memory(6, 4)
  for grown in ((70, 4), (6, 68)):
    more_arguments, more_temporary = memory(*grown)
    added = more_arguments - arguments
    growth = more_temporary - temporary
    print(f"{grown}: {added:,} bytes of weights more, {growth:,} temporary")
    assert added > 30e6
    assert growth < 0.02 * added


# Size of the program.


def test_program_does_not_grow_with_depth():
  def lines(layers):
    spec = join(
      model(32, layers), model(32, 4), [(2, layers // 2), (4, layers)]
    )
    return len(lower(spec, length=16).as_text().splitlines())

  shallow, deep = lines(12), lines(48)
  print(f"{shallow} lines of StableHLO for 12 layers, {deep} for 48")
  assert deep <= 1.05 * shallow
