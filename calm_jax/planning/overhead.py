"""Counts what a composition costs beside its anchor (Appendix C), from shapes.

Each line of the table has the paper's arithmetic beside what the program has
and does. The paper's arithmetic goes wrong in these places:

- C.1 leaves out W^O of a connection (D_B^2; §3.1 trains it) and of m_B's
  self-attention, biases, norms, positions, gated MLPs and a separate head.
- C.1 counts the embeddings of m_B once in each layer. So its 1.5% is 5.7%.
- C.1 says "all layers of m_B" where n = 4 is all layers of m_A: m_B has 24.
- C.2 takes a token of composition to cost what one of fine-tuning m_B does.
  m_A's forward pass and the connections add to that; the gradients of m_B's
  weights (a third), and all below the first connection, are not needed.
- C.2 takes cost as linear in parameters. But looking up an embedding costs
  nothing, and the products of attention with L^2 have no parameters.
- C.2 needs "5-7%" of the data in its text and has 2% in its arithmetic.
- Appendix C has nothing on inference, where every token goes through both
  models, nor on memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition import connections, cross_attention, forward
from calm_jax.composition.connections import Augmenting, Composition
from calm_jax.core import flops, trees
from calm_jax.core.batch import Batch, plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.models import decoder, lora
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families
from calm_jax.training import loss as loss_lib

PAPER_DATA_SHARE = 0.02  # (iii) of C.2
# What Appendix C prints, by `CostRow.key`: of BERT in C.1, assumed in C.2.
PRINTED = {
  "anchor": "≈1B",
  "composition": "≈15M",
  "composition_share": "1.5%",
  "augmenting_share": "10% (assumed)",
  "compose_cost": "2%",
  "both_cost": "12%",
}
_PARTS = "anchor", "augmenting", "composition", "composed"


class CostRow(NamedTuple):
  """A line of the table: counts are int, shares float, None is not known."""

  key: str
  what: str
  paper: int | float | None
  counted: int | float | None


def parameters(spec: Composition) -> dict[str, int]:
  """Counts the parameters of a composition (C.1).

  Returns numbers of "anchor", "augmenting" (all together), "composition" (Θ_C)
  and "composed" (all); the same by C.1's formulas with "paper_" before each.
  """
  counts = {}
  for prefix, count_model, theta in (
    ("", _count_model, trees.count(cross_attention.param_shapes(spec))),
    ("paper_", paper_model_count, connections.paper_count(spec)),
  ):
    models = [count_model(joined.config) for _, joined in spec.augmenting]
    parts = count_model(spec.anchor), sum(models), theta
    for part, count in zip(_PARTS, (*parts, sum(parts)), strict=True):
      counts[prefix + part] = count
  return counts


def _count_model(config: ModelConfig) -> int:
  return trees.count(decoder.param_shapes(config))


def paper_model_count(config: ModelConfig) -> int:
  """Counts parameters as C.1 does: N (V D + 3 D^2 + 2 D^2 K), K = F / D."""
  D = config.width
  layer = config.vocab_size * D + 3 * D * D + 2 * D * config.mlp_width
  return config.num_layers * layer


def training_flops(
  spec: Composition, batch: int, length: int, augmenting_length: int = 0
) -> dict[str, int | None]:
  """Counts the FLOPs of steps and forward passes on batch x length tokens.

  Only matrix products count, attention without its causal half. A step is a
  forward and a backward pass; what the optimizer does is elementwise. Rows of
  augmenting models have `augmenting_length` tokens; if 0, the anchor's.
  InputError if there is no augmenting model.

  Returns:
    "composed_step" (training Θ_C), "anchor_step", "augmenting_step" (all of
    each augmenting model by itself), "lora_step" (a LoRA of the anchor of
    "lora_rank", about as large as Θ_C; None for a mixture of experts); a
    "_forward" for each but LoRA; and "batch", "length", "augmenting_length".
  """
  if not spec.augmenting:
    raise InputError("there is no augmenting model, so no overhead to count")
  # The counts are the models', whatever kernel, remat and mesh they run with.
  spec = spec.with_compute(
    lambda part: {"attention": "xla", "remat": "none", "place": None}
  )
  shapes = decoder.param_shapes(spec.anchor)
  theta = cross_attention.param_shapes(spec)
  others = {n: decoder.param_shapes(a.config) for n, a in spec.augmenting}
  other_length = augmenting_length or length
  sizes = batch, length, other_length
  other_sizes = batch, other_length, other_length
  params = {"anchor": shapes, "augmenting": others, "composition": theta}
  composed = spec, params, sizes
  anchor = Composition(spec.anchor), {"anchor": shapes}, sizes
  alone = [
    (Composition(joined.config), {"anchor": others[name]}, other_sizes)
    for name, joined in spec.augmenting
  ]
  lora_step = rank = None
  if not spec.anchor.num_experts:
    rank = lora.closest_rank(shapes, trees.count(theta))
    adapted = jax.eval_shape(
      lambda p: {"anchor": lora.add(p, rank, jax.random.key(0))}, shapes
    )
    lora_step = _count(anchor[0], adapted, sizes, "anchor/.*/lora_.")
  return {
    "composed_step": _count(*composed, "composition/.*"),
    "anchor_step": _count(*anchor, "anchor/.*"),
    "augmenting_step": sum(_count(*model, "anchor/.*") for model in alone),
    "lora_step": lora_step,
    "lora_rank": rank,
    "composed_forward": _count(*composed),
    "anchor_forward": _count(*anchor),
    "augmenting_forward": sum(_count(*model) for model in alone),
    "batch": batch,
    "length": length,
    "augmenting_length": other_length,
  }


def _count(
  spec: Composition,
  params: dict,
  sizes: tuple[int, int, int],
  trainable: str = "",
) -> int:
  """Counts a step on the leaves that `trainable` names, or a forward pass."""
  batch, length, other_length = sizes
  names = [name for name, _ in spec.augmenting]

  def loss_or_logits(chosen, frozen, tokens_BL):
    rows = plain_sequence(jnp.zeros((batch, other_length), jnp.int32))
    visible_BL = jnp.full(tokens_BL.shape, other_length)
    rows_of_all = Batch(
      plain_sequence(tokens_BL),
      dict.fromkeys(names, rows),
      dict.fromkeys(names, visible_BL),
      prompt_ends=jnp.full(tokens_BL.shape, length),
    )
    params = trees.merge(chosen, frozen)
    logits_BLV = forward.forward(params, spec, rows_of_all)[0]
    if not trainable:
      return logits_BLV
    ones_BL = jnp.ones(tokens_BL.shape)
    return loss_lib.cross_entropy(logits_BLV, tokens_BL, ones_BL)[0].sum()

  function = jax.grad(loss_or_logits) if trainable else loss_or_logits
  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  leaves = trees.partition(params, trees.mask(params, [trainable or ".*"]))
  return flops.count(function, *leaves, tokens)


def table(
  counts: dict[str, int], steps: dict[str, Any], data_share: float
) -> list[CostRow]:
  """Makes the table of Appendix C from `parameters` and `training_flops`.

  Θ_C is trained on `data_share` of the data of fine-tuning m_B, m_A on all.
  """
  model, paper = (
    {part: counts[by + part] / counts[by + "anchor"] for part in _PARTS}
    for by in ("", "paper_")
  )
  rows = []
  for part, name in zip(_PARTS, ("m_B", "m_A", "Θ_C", "all"), strict=True):
    both = counts[f"paper_{part}"], counts[part]
    rows.append(CostRow(part, f"parameters of {name}", *both))
  for part, name in ("composition", "Θ_C"), ("augmenting", "m_A"):
    share = f"{part}_share"
    rows.append(CostRow(share, f"{name} / m_B", paper[part], model[part]))
  rank, small = steps["lora_rank"], paper["augmenting"]
  adapter = "LoRA" if rank is None else f"LoRA of rank {rank}"
  shares: dict[str, Any] = {}
  for key, what, expected in (
    ("composed_forward", "forward: composed / m_B", None),
    ("augmenting_forward", "forward: m_A / m_B", None),
    ("composed_step", "step: Θ_C / all of m_B", 1.0),
    ("lora_step", f"step: {adapter} / all of m_B", None),
    ("augmenting_step", "step: all of m_A / all of m_B", small),
  ):
    alone = steps["anchor_" + key.split("_")[1]]
    shares[key] = None if steps[key] is None else steps[key] / alone
    rows.append(CostRow(key, what, expected, shares[key]))
  cost = data_share * shares["composed_step"]
  both = small + data_share, shares["augmenting_step"] + cost
  few = f"training Θ_C on {100 * data_share:.3g}% of the data"
  rows.append(CostRow("compose_cost", few, data_share, cost))
  rows.append(CostRow("both_cost", f"{few}, m_A on all", *both))
  return rows


def bert() -> Composition:
  """Builds C.1's example: BERT-small (m_A) and BERT-large (m_B), as decoders.

  Their blocks are GPT-2's. What BERT has besides, a norm of the embeddings,
  two segments and a pooler, is a percent of it.
  """
  shared = {"model_type": "gpt2", "vocab_size": 30_000, "n_positions": 512}
  shared["activation_function"] = "gelu"
  small, large = (
    families.from_hf(
      shared | {"n_layer": layers, "n_embd": width, "n_head": width // 64}
    )
    for layers, width in ((4, 512), (24, 1024))
  )
  pairs = connections.default_connections(4, 24, 4)
  return Composition(large, (("m_A", Augmenting(small, pairs, norm=False)),))
