"""FLOPs of matrix products, by formula from a config.

They are for what has no trace (see `core.flops`): the least that a step could
do, and guesses.
"""

import math

from calm_jax.composition.connections import Composition
from calm_jax.core import trees
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig


def multiplied_weights(config: ModelConfig, layers: int) -> int:
  """Counts the weights that a token is multiplied with in the first layers.

  Of a mixture of experts those that a token goes through count.
  """
  leaves = trees.flatten(decoder.param_shapes(config)["layers"])
  total = 0.0
  for name, leaf in leaves.items():
    if name.endswith("kernel"):
      share = 1.0
      if "experts" in name:
        share = config.experts_per_token / config.num_experts
      total += share * math.prod(leaf.shape[1:])
  return round(layers * total)


def generated_token(spec: Composition) -> int:
  """Counts the multiplications of weights for one token that is generated.

  All models of a composition count up to the last layer that is needed, f_proj
  as folded into W_K and W_V.
  """
  anchor = spec.anchor
  total = multiplied_weights(anchor, anchor.num_layers)
  total += anchor.vocab_size * anchor.width
  inner = anchor.num_heads * (anchor.width // anchor.num_heads)
  for _, joined in spec.augmenting:
    last = max(c.augmenting for c in joined.connections)
    total += multiplied_weights(joined.config, last)
    widths = anchor.width + joined.config.width
    total += len(joined.connections) * 2 * inner * widths
  return total


def training_step(
  spec: Composition,
  rows: int,
  length: int,
  attended: float = 1.0,
  weighted: float = 1.0,
) -> int:
  """Counts the FLOPs that a step on Θ_C cannot do without.

  They are m_A up to its last tapped layer and m_B, forward; the head and m_B
  above the first connection, backward, without gradients of weights; and the
  connections with theirs. The norms before a projection and before a query are
  trained: gradients of what they read count, even into a frozen model.

  All models read the same `rows` of `length` tokens. `attended` is the share of
  the products of queries and keys that counts; 0.5 for those of the past alone.
  `weighted` is the share of positions that have a loss, so need logits.
  """
  tokens = rows * length

  def attention(width: int) -> int:
    return int(4 * attended * tokens * length * width)

  def layers(config: ModelConfig, count: int, attentions: int = 1) -> int:
    each = attention(config.num_heads * config.head_dim)
    products = 2 * tokens * multiplied_weights(config, count)
    return products + count * attentions * each

  anchor, D = spec.anchor, spec.anchor.width
  first = anchor.num_layers
  total = layers(anchor, first)
  total += round(weighted * tokens) * 2 * 2 * D * anchor.vocab_size
  for _, joined in spec.augmenting:
    config, connections = joined.config, joined.connections
    total += layers(config, max(pair.augmenting for pair in connections))
    first = min(first, *(pair.anchor for pair in connections))
    kernels = D * (config.width + 4 * D)
    total += len(connections) * 3 * (2 * tokens * kernels + attention(D))
  # The gradients of attention are four products for two.
  return total + layers(anchor, anchor.num_layers - first, attentions=2)
