"""Counts what a composition costs beside its anchor (Appendix C), from shapes.

Each line of the table has the paper's arithmetic beside what the program has
and does: its parameters, and the matrix products of its steps (`flops`). The
paper's arithmetic goes wrong in these places:

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

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition import connections, cross_attention, forward
from calm_jax.composition.connections import Augmenting, Composition
from calm_jax.core import trees
from calm_jax.core.batch import Batch, plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.models import decoder, lora
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families
from calm_jax.planning import flops
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

  Returns:
    Numbers of parameters of "anchor", "augmenting" (all of them together),
    "composition" (Θ_C) and "composed", their sum. With "paper_" before each,
    the same by the formulas of C.1.
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
  forward and a backward pass; what the optimizer does is elementwise.

  Args:
    spec: with at least one augmenting model.
    batch: rows.
    length: tokens of a row.
    augmenting_length: tokens of a row of the augmenting models; 0 if they read
      the anchor's.

  Returns:
    "composed_step" (training Θ_C), "anchor_step", "augmenting_step" (all of
    each augmenting model by itself), "lora_step" (a LoRA of the anchor of
    "lora_rank", about as large as Θ_C; None for a mixture of experts); a
    "_forward" for each but LoRA; and "batch", "length", "augmenting_length".

  Raises:
    InputError: there is no augmenting model.
  """
  if not spec.augmenting:
    raise InputError("there is no augmenting model, so no overhead to count")
  other_length = augmenting_length or length
  # The counts are the models', whatever kernel, remat and mesh they run with.
  spec = spec.with_compute(
    lambda part: {"attention": "xla", "remat": "auto", "place": None}
  )
  params = {
    "anchor": decoder.param_shapes(spec.anchor),
    "augmenting": {
      name: decoder.param_shapes(a.config) for name, a in spec.augmenting
    },
    "composition": cross_attention.param_shapes(spec),
  }
  sizes = batch, length, other_length
  alone = Composition(spec.anchor)
  anchor = {"anchor": params["anchor"]}
  counts = {
    "composed_step": _count(spec, params, sizes, "composition/.*"),
    "anchor_step": _count(alone, anchor, sizes, "anchor/.*"),
    "augmenting_step": 0,
    "lora_step": None,
    "lora_rank": None,
    "composed_forward": _count(spec, params, sizes),
    "anchor_forward": _count(alone, anchor, sizes),
    "augmenting_forward": 0,
    "batch": batch,
    "length": length,
    "augmenting_length": other_length,
  }
  for name, joined in spec.augmenting:
    model = Composition(joined.config), {"anchor": params["augmenting"][name]}
    rows = batch, other_length, other_length
    counts["augmenting_step"] += _count(*model, rows, "anchor/.*")
    counts["augmenting_forward"] += _count(*model, rows)
  if not spec.anchor.num_experts:
    size = trees.count(params["composition"])
    rank = lora.closest_rank(params["anchor"], size)
    adapted = jax.eval_shape(
      lambda p: {"anchor": lora.add(p, rank, jax.random.key(0))},
      params["anchor"],
    )
    counts["lora_rank"] = rank
    counts["lora_step"] = _count(alone, adapted, sizes, "anchor/.*/lora_.")
  return counts


def _count(
  spec: Composition,
  params: dict,
  sizes: tuple[int, int, int],
  trainable: str = "",
) -> int:
  """Counts a step on the leaves that `trainable` names, or a forward pass."""
  batch, length, other_length = sizes
  names = [name for name, _ in spec.augmenting]

  def logits(chosen, frozen, tokens_BL):
    rows = plain_sequence(jnp.zeros((batch, other_length), jnp.int32))
    visible_BL = jnp.full(tokens_BL.shape, other_length)
    rows_of_all = Batch(
      plain_sequence(tokens_BL),
      dict.fromkeys(names, rows),
      dict.fromkeys(names, visible_BL),
      prompt_ends=jnp.full(tokens_BL.shape, length),
    )
    params = trees.merge(chosen, frozen)
    return forward.forward(params, spec, rows_of_all)[0]

  def loss(chosen, frozen, tokens_BL):
    logits_BLV = logits(chosen, frozen, tokens_BL)
    ones_BL = jnp.ones(tokens_BL.shape)
    return loss_lib.cross_entropy(logits_BLV, tokens_BL, ones_BL)[0].sum()

  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  leaves = trees.partition(params, trees.mask(params, [trainable or ".*"]))
  return flops.count(jax.grad(loss) if trainable else logits, *leaves, tokens)


def table(
  counts: dict[str, int], steps: dict[str, Any], data_share: float
) -> list[CostRow]:
  """Makes the table of Appendix C for one composition.

  Args:
    counts: of `parameters`.
    steps: of `training_flops`.
    data_share: the share of the data of fine-tuning m_B that Θ_C is trained
      on; m_A is trained on all of it.
  """

  def size(part: str) -> float:
    return counts[part] / counts["anchor"]

  def forward_pass(part: str) -> float:
    return steps[f"{part}_forward"] / steps["anchor_forward"]

  def step(part: str) -> float | None:
    count = steps[f"{part}_step"]
    return None if count is None else count / steps["anchor_step"]

  small = counts["paper_augmenting"] / counts["paper_anchor"]
  theta = counts["paper_composition"] / counts["paper_anchor"]
  rank = steps["lora_rank"]
  adapter = "LoRA" if rank is None else f"LoRA of rank {rank}"
  few = f"training Θ_C on {100 * data_share:.3g}% of the data"
  cost, step_a = data_share * step("composed"), step("augmenting")
  forward_a = forward_pass("augmenting")
  forward_both = forward_pass("composed")
  rows = [
    (part, f"parameters of {name}", counts[f"paper_{part}"], counts[part])
    for part, name in zip(_PARTS, ("m_B", "m_A", "Θ_C", "all"), strict=True)
  ]
  rows += [
    ("composition_share", "Θ_C / m_B", theta, size("composition")),
    ("augmenting_share", "m_A / m_B", small, size("augmenting")),
    ("composed_forward", "forward: composed / m_B", None, forward_both),
    ("augmenting_forward", "forward: m_A / m_B", None, forward_a),
    ("composed_step", "step: Θ_C / all of m_B", 1.0, step("composed")),
    ("lora_step", f"step: {adapter} / all of m_B", None, step("lora")),
    ("augmenting_step", "step: all of m_A / all of m_B", small, step_a),
    ("compose_cost", few, data_share, cost),
    ("both_cost", f"{few}, m_A on all", small + data_share, step_a + cost),
  ]
  return [CostRow(*row) for row in rows]


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
