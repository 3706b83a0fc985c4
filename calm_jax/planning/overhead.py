"""What a composition costs beside its anchor (Appendix C), from shapes alone.

C.1 counts parameters, C.2 estimates training. Beside their arithmetic stands
what the program has and does: its own parameters, and the matrix products of
its own steps (`flops`). Where the paper's arithmetic is wrong:

- C.1 gives a cross-attention 3 D_B^2 parameters. By §3.1 W^O in R^{D_B x D_B}
  is trained too, which makes 4 D_B^2.
- C.1's count of m_B has the embeddings V_B D_B inside the sum over layers, so
  N_B times instead of once, and leaves out W^O of the self-attention, D_B^2 a
  layer. In the BERT example the first makes 1 B of what is a third of that.
- So C.1's 1.5% is 5.7% for those two models, and C.2, which starts from it,
  calls that share negligible.
- C.1 says "all layers of m_B" where n = 4 is all layers of m_A: m_B has 24.

What it leaves out:

- C.1: biases, norms, positions, gated MLPs, a head apart from the embeddings.
- C.2 takes a token of composition to cost what one of fine-tuning m_B does.
  To that come m_A's forward pass and the connections; from it go the gradients
  of m_B's weights, a third, and all gradients up to the first connection.
- C.2 takes cost as linear in parameters, so m_A's share of the parameters for
  its share of the cost. Embeddings are parameters that cost nothing to look
  up; attention's products with L^2 cost, and have none.
- C.2 needs "5-7%" of the data in its text and has 2% in its arithmetic; at 5%
  its 12% would be 15%.
- Appendix C has nothing on inference, where every token goes through both
  models, nor on memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from calm_jax.composition import forward
from calm_jax.composition.connections import (
  Augmenting,
  Composition,
  default_connections,
  paper_count,
)
from calm_jax.core import trees
from calm_jax.core.batch import plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.models import decoder, lora
from calm_jax.models.config import ModelConfig
from calm_jax.planning import flops
from calm_jax.training import loss as loss_lib

PAPER_DATA_SHARE = 0.02  # (iii) of C.2
# What Appendix C prints, by `Row.key`: of BERT in C.1, assumed in C.2.
PRINTED = {
  "anchor": "≈1B", "composition": "≈15M", "composition_share": "1.5%",
  "augmenting_share": "10% (assumed)", "compose_cost": "2%",
  "both_cost": "12%",
}  # fmt: skip


class Row(NamedTuple):
  """A line of the table: counts are int, shares float, None is not known.

  Attributes:
    key: names the line.
    what: is counted.
    paper: by the arithmetic of Appendix C.
    counted: of the program.
  """

  key: str
  what: str
  paper: int | float | None
  counted: int | float | None


def parameters(spec: Composition) -> dict[str, int]:
  """Parametric overhead (C.1).

  Returns:
    Numbers of parameters of "anchor", "augmenting" (all of them together),
    "composition" (Θ_C) and "composed", their sum. With "paper_" before each,
    the same by the formulas of C.1.
  """
  models = [joined.config for _, joined in spec.augmenting]
  counts = {
    "anchor": trees.count(decoder.param_shapes(spec.anchor)),
    "augmenting": sum(trees.count(decoder.param_shapes(c)) for c in models),
    "composition": trees.count(forward.param_shapes(spec)),
    "paper_anchor": paper_model_count(spec.anchor),
    "paper_augmenting": sum(paper_model_count(c) for c in models),
    "paper_composition": paper_count(spec),
  }
  parts = ("anchor", "augmenting", "composition")
  for paper in ("", "paper_"):
    counts[f"{paper}composed"] = sum(counts[paper + part] for part in parts)
  return counts


def paper_model_count(config: ModelConfig) -> int:
  """Parameters of a model by C.1: N (V D + 3 D^2 + 2 D^2 K), K = F / D."""
  D = config.width
  layer = config.vocab_size * D + 3 * D * D + 2 * D * config.mlp_width
  return config.num_layers * layer


def training_flops(
  spec: Composition, batch: int, length: int, augmenting_length: int = 0
) -> dict[str, int | None]:
  """FLOPs of steps and forward passes, each on batch x length tokens.

  Of matrix products, attention without its causal half. A step is a forward
  and a backward pass; what the optimizer does is elementwise.

  Args:
    spec: with at least one augmenting model.
    batch: rows.
    length: tokens of a row.
    augmenting_length: of the augmenting models' rows, if their tokens are
      others than the anchor's; 0 if they are the same.

  Returns:
    Under "composed_step" training Θ_C, "anchor_step" all of the anchor,
    "augmenting_step" all of the augmenting models, each by itself, and
    "lora_step" a LoRA of the anchor of "lora_rank", which has about as many
    parameters as Θ_C (None for a mixture of experts, where there is none);
    forward passes under "composed_forward", "anchor_forward" and
    "augmenting_forward"; and "batch", "length", "augmenting_length".

  Raises:
    InputError: there is no augmenting model.
  """
  if not spec.augmenting:
    raise InputError("there is no augmenting model, so no overhead to count")
  own = augmenting_length or length
  # Of the models, whatever kernel, remat and mesh they run with.
  spec = spec.with_compute(
    lambda part: {"attention": "xla", "remat": "auto", "place": None}
  )
  theta = forward.param_shapes(spec)
  parts = {name: joined.config for name, joined in spec.augmenting}
  params = {
    "anchor": decoder.param_shapes(spec.anchor),
    "augmenting": {n: decoder.param_shapes(c) for n, c in parts.items()},
    "composition": theta,
  }
  anchor, anchor_params = Composition(spec.anchor), {"anchor": params["anchor"]}
  sizes = batch, length, own
  counted = {
    "composed_step": _step(spec, params, "composition/.*", sizes),
    "anchor_step": _step(anchor, anchor_params, "anchor/.*", sizes),
    "augmenting_step": 0,
    "lora_step": None,
    "lora_rank": None,
    "composed_forward": _forward(spec, params, sizes),
    "anchor_forward": _forward(anchor, anchor_params, sizes),
    "augmenting_forward": 0,
    "batch": batch,
    "length": length,
    "augmenting_length": own,
  }
  for name, config in parts.items():
    alone = Composition(config), {"anchor": params["augmenting"][name]}
    rows = batch, own, own
    counted["augmenting_step"] += _step(*alone, "anchor/.*", rows)
    counted["augmenting_forward"] += _forward(*alone, rows)
  if not spec.anchor.num_experts:
    rank = lora.closest_rank(params["anchor"], trees.count(theta))
    adapted = jax.eval_shape(
      lambda p: lora.add(p, rank, jax.random.key(0)), params["anchor"]
    )
    counted["lora_rank"] = rank
    counted["lora_step"] = _step(
      anchor, {"anchor": adapted}, "anchor/.*/lora_.", sizes
    )
  return counted


def _logits(params, spec, tokens_BL, own):
  anchor = plain_sequence(tokens_BL)
  shape = tokens_BL.shape[0], own
  heard = plain_sequence(jnp.zeros(shape, jnp.int32))
  names = [name for name, _ in spec.augmenting]
  return forward.forward(
    params,
    spec,
    anchor,
    dict.fromkeys(names, heard),
    dict.fromkeys(names, jnp.full(tokens_BL.shape, own)),
  )[0]


def _forward(spec, params, sizes) -> int:
  *shape, own = sizes
  return flops.count(
    lambda p, tokens: _logits(p, spec, tokens, own),
    params,
    jax.ShapeDtypeStruct(shape, jnp.int32),
  )


def _step(spec, params, trainable: str, sizes) -> int:
  *shape, own = sizes
  chosen, frozen = trees.partition(params, trees.mask(params, [trainable]))

  def loss(chosen, frozen, tokens):
    logits = _logits(trees.merge(chosen, frozen), spec, tokens, own)
    ones = jnp.ones(tokens.shape)
    return loss_lib.cross_entropy(logits, tokens, ones)[0].sum()

  tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
  return flops.count(jax.grad(loss), chosen, frozen, tokens)


def table(
  counts: dict[str, int], steps: dict[str, Any], data_share: float
) -> list[Row]:
  """Appendix C for one composition.

  Args:
    counts: of `parameters`.
    steps: of `training_flops`.
    data_share: what Θ_C is trained on, of the data that m_B would be
      fine-tuned on, and m_A is trained on.
  """

  def size_of(name):
    return counts[name] / counts["anchor"]

  def pass_of(name):
    return steps[f"{name}_forward"] / steps["anchor_forward"]

  def step_of(name):
    step = steps[f"{name}_step"]
    return None if step is None else step / steps["anchor_step"]

  small = counts["paper_augmenting"] / counts["paper_anchor"]
  theta = counts["paper_composition"] / counts["paper_anchor"]
  few = f"on {100 * data_share:.3g}% of the data"
  cost = data_share * step_of("composed")
  rank = steps["lora_rank"]
  adapter = "LoRA" if rank is None else f"LoRA of rank {rank}"
  return [
    Row(part, f"parameters of {what}", counts[f"paper_{part}"], counts[part])
    for part, what in (
      ("anchor", "m_B"), ("augmenting", "m_A"), ("composition", "Θ_C"),
      ("composed", "all"),
    )
  ] + [
    Row("composition_share", "Θ_C / m_B", theta, size_of("composition")),
    Row("augmenting_share", "m_A / m_B", small, size_of("augmenting")),
    Row("composed_forward", "forward: composed / m_B", None,
        pass_of("composed")),
    Row("augmenting_forward", "forward: m_A / m_B", None,
        pass_of("augmenting")),
    Row("composed_step", "step: Θ_C / all of m_B", 1.0, step_of("composed")),
    Row("lora_step", f"step: {adapter} / all of m_B", None,
        step_of("lora")),
    Row("augmenting_step", "step: all of m_A / all of m_B", small,
        step_of("augmenting")),
    Row("compose_cost", f"training Θ_C {few}", data_share, cost),
    Row("both_cost", f"training Θ_C {few}, m_A on all",
        small + data_share, step_of("augmenting") + cost),
  ]  # fmt: skip


def bert() -> Composition:
  """C.1's example: BERT-small (m_A) and BERT-large (m_B), as decoders.

  What BERT has besides, a norm of the embeddings, two segments and a pooler,
  is a percent of it.
  """

  def model(layers, width):
    return ModelConfig(
      vocab_size=30_000, width=width, num_layers=layers, num_heads=width // 64,
      num_kv_heads=width // 64, head_dim=64, mlp_width=4 * width,
      max_length=512, activation="gelu_exact", gated_mlp=False, mlp_bias=True,
      attention_bias=True, output_bias=True, norm="layer",
      learned_positions=True, tie_embeddings=True,
    )  # fmt: skip

  small, large = model(4, 512), model(24, 1024)
  pairs = default_connections(4, 24, 4)
  return Composition(large, (("m_A", Augmenting(small, pairs, norm=False)),))
