"""Overhead as in Appendix C: by hand, by the trainer and by the compiler."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.core import flops, trees
from calm_jax.core.batch import Batch, Sequence
from calm_jax.core.errors import InputError
from calm_jax.models import decoder, lora
from calm_jax.models.config import ModelConfig
from calm_jax.planning import overhead
from calm_jax.training import optimizer
from calm_jax.training import step as step_lib
from calm_jax.training.stage import Stage

B, L, M = 3, 37, 53


def model(width, layers, **changes) -> ModelConfig:
  return ModelConfig(
    **{
      "vocab_size": 301, "width": width, "num_layers": layers, "num_heads": 4,
      "num_kv_heads": 2, "head_dim": 24, "mlp_width": 5 * width // 2,
    } | changes
  )  # fmt: skip


ANCHOR = model(72, 5)
SMALL = model(40, 7, head_dim=8, num_kv_heads=1, vocab_size=97)
PLAIN = model(56, 3, gated_mlp=False, tie_embeddings=True)
SPEC = Composition(
  ANCHOR,
  (
    ("a", Augmenting(SMALL, (Connection(2, 2), Connection(5, 4)))),
    ("b", Augmenting(PLAIN, (Connection(3, 3),), norm=False)),
  ),
)


# By hand. A product of [T, I] and [I, O] is 2 T I O FLOPs, and so is each of
# its two gradients.


def attention(c, length=L):
  return 2 * 2 * B * length * length * c.num_heads * c.head_dim


def linears(c, length=L):
  attended = c.width * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
  mlp = (3 if c.gated_mlp else 2) * c.width * c.mlp_width
  return 2 * B * length * (attended + mlp)


def layer(c, length=L):
  return linears(c, length) + attention(c, length)


def head(c, length=L):
  return 2 * B * length * c.width * c.vocab_size


def alone(c, length=L):
  return c.num_layers * layer(c, length) + head(c, length)


def connection(E, read=L):
  """Forward: f_proj, W_K, W_V; W_Q, W_O; scores and weighted values."""
  D = ANCHOR.width
  keys_values, query = read * (E * D + 2 * D * D), L * 2 * D * D
  return 2 * B * (keys_values + query + 2 * L * read * D)


def taps(read=L):
  return 5 * layer(SMALL, read) + 3 * layer(PLAIN, read)


@pytest.fixture(scope="module")
def counted():
  return overhead.training_flops(SPEC, B, L)


@pytest.mark.parametrize("read", [L, M])
def test_forward_passes_and_steps_by_hand(read, counted):
  got = counted
  if read != L:
    got = overhead.training_flops(SPEC, B, L, read)
  once = 2 * connection(SMALL.width, read) + connection(PLAIN.width, read)
  assert got["anchor_forward"] == alone(ANCHOR)
  assert got["augmenting_forward"] == alone(SMALL, read) + alone(PLAIN, read)
  forward = taps(read) + alone(ANCHOR) + once
  assert got["composed_forward"] == forward
  assert got["anchor_step"] == 3 * got["anchor_forward"]
  assert got["augmenting_step"] == 3 * got["augmenting_forward"]
  # Back to layer 2: the head's input, three layers' inputs and activations,
  # twice the connections, less what would go on into a frozen m_A: "b" has no
  # norm before its projection that would need it.
  back = head(ANCHOR) + 3 * (linears(ANCHOR) + 2 * attention(ANCHOR)) + 2 * once
  back -= 2 * B * read * PLAIN.width * ANCHOR.width
  assert got["composed_step"] == forward + back
  assert [got[k] for k in ("batch", "length", "augmenting_length")] == [
    B, L, read
  ]  # fmt: skip


def test_flops_are_the_model_s_and_not_of_how_it_is_computed(counted):
  spec = SPEC.with_compute(lambda part: {"remat": "full"})
  assert overhead.training_flops(spec, B, L) == counted


def test_lora_by_hand(counted):
  kernels = [
    (72, 96), (72, 48), (72, 48), (96, 72), (72, 180), (72, 180), (180, 72)
  ]  # fmt: skip
  of_one = 5 * sum(map(sum, kernels))
  rank = round(trees.count(theta(SPEC)) / of_one)
  assert counted["lora_rank"] == rank
  adapters = 5 * 2 * B * L * rank * sum(map(sum, kernels))
  # All but the gradients of m_B's weights; the loop over layers has the
  # gradient of its input in the first one too.
  want = 2 * alone(ANCHOR) + 5 * attention(ANCHOR) + 3 * adapters
  assert counted["lora_step"] == want


# By the trainer, and by the compiler.


def theta(spec):
  return jax.eval_shape(lambda: cross_attention.init(jax.random.key(0), spec))


def traced(spec: Composition, run: str, rank: int):
  """The trainer's step of a run, and the shapes of its arguments."""
  model, trainable = {
    "composed": ("composed", "composition/.*"),
    "anchor": ("anchor", "anchor/.*"),
    "lora": ("anchor", "anchor/.*/lora_."),
  }[run]
  params = {
    "anchor": decoder.param_shapes(spec.anchor),
    "augmenting": {
      n: decoder.param_shapes(a.config) for n, a in spec.augmenting
    },
    "composition": theta(spec),
  }
  if run == "lora":
    params["anchor"] = jax.eval_shape(
      lambda p: lora.add(p, rank, jax.random.key(0)), params["anchor"]
    )
  mask = trees.mask(params, [trainable])
  stage = Stage(model=model)
  made = optimizer.make_optimizer(stage, mask)
  chosen, frozen = trees.partition(params, mask)
  state = jax.eval_shape(lambda p: step_lib.initial_state(made, p), chosen)
  ids = jax.ShapeDtypeStruct((B, L), jnp.int32)
  weights = jax.ShapeDtypeStruct((B, L), jnp.float32)
  batch = Batch(Sequence(ids, ids, ids), {}, {}, ids, ids, weights)
  return step_lib.make_step(spec, stage, made), (state, frozen, batch)


@pytest.mark.parametrize("run", ["composed", "anchor", "lora"])
def test_the_trainer_does_what_was_counted(run, counted):
  step, arguments = traced(SPEC, run, counted["lora_rank"])
  assert flops.count(step, *arguments) == counted[f"{run}_step"]


def three(unroll: int) -> Composition:
  """Two models of three layers."""
  anchor, small = model(200, 3), model(104, 3)
  pairs = Connection(1, 1), Connection(2, 3)
  spec = Composition(anchor, (("a", Augmenting(small, pairs)),))
  return spec.with_compute(lambda part: {"unroll": unroll})


@functools.cache
def of_three() -> dict:
  return overhead.training_flops(three(unroll=1), B, L)


@pytest.mark.parametrize("run", ["composed", "anchor", "lora"])
def test_the_compiler_counts_little_more(run):
  ours = of_three()
  # XLA counts the body of a loop once, so for XLA there is none. It has
  # elementwise work besides, and of LoRA no gradient of the first layer's
  # input, which a loop over layers cannot leave out.
  step, arguments = traced(three(unroll=9), run, ours["lora_rank"])
  theirs = step.lower(*arguments).compile().cost_analysis()["flops"]
  ratio = theirs / ours[f"{run}_step"]
  print(f"{run}: {theirs:.4g} FLOPs by XLA, {ratio:.3f} of ours")
  assert 0.98 < ratio < 1.06


def test_experts_have_no_lora():
  spec = dataclasses.replace(
    SPEC, anchor=dataclasses.replace(ANCHOR, num_experts=4, experts_per_token=2)
  )
  steps = overhead.training_flops(spec, B, L)
  assert steps["lora_step"] is steps["lora_rank"] is None
  # Each token goes through two of the experts; their blocks may have gaps.
  router, expert = 2 * B * L * 72 * 4, 2 * 3 * 72 * 180
  dense = alone(ANCHOR) - 5 * B * L * expert
  mixed = dense + 5 * (router + 2 * B * L * expert)
  assert mixed <= steps["anchor_forward"] < 1.5 * mixed
  rows = overhead.table(overhead.parameters(spec), steps, 0.02)
  assert {r.key: r.counted for r in rows}["lora_step"] is None


def test_results_are_plain_numbers(counted):
  assert json.loads(json.dumps(counted)) == counted
  assert all(isinstance(v, int) for v in counted.values())


def test_without_augmenting_models_there_is_nothing_to_count():
  with pytest.raises(InputError, match="no augmenting model"):
    overhead.training_flops(Composition(ANCHOR), B, L)


# Appendix C.


def test_parameters_by_hand():
  counts = overhead.parameters(SPEC)
  D = 72
  of_a, of_b = 40 * D + 4 * D * D + 40 + D, 56 * D + 4 * D * D
  assert counts["composition"] == 2 * of_a + of_b
  assert counts["paper_composition"] == (
    2 * (40 * D + 3 * D * D) + 56 * D + 3 * D * D
  )
  layer = 72 * 96 * 2 + 72 * 48 * 2 + 3 * 72 * 180 + 2 * 72
  assert counts["anchor"] == 5 * layer + 2 * 301 * 72 + 72
  parts = ("anchor", "augmenting", "composition")
  assert counts["composed"] == sum(counts[p] for p in parts)


def test_the_papers_example():
  spec = overhead.bert()
  (_, joined), b = spec.augmenting[0], spec.anchor
  a = joined.config
  # N_A = 4, D_A = 512, N_B = 24, D_B = 1024, V_B = 30K, K_B = 4, n = 4.
  assert (a.num_layers, a.width, b.num_layers, b.width) == (4, 512, 24, 1024)
  assert (b.vocab_size, b.mlp_width, len(joined.connections)) == (
    30_000, 4096, 4
  )  # fmt: skip
  counts = overhead.parameters(spec)
  assert counts["paper_composition"] == 14_680_064  # "15M"
  assert counts["paper_anchor"] == 1_014_104_064  # "1B"
  # W^O makes four times 1024^2 more.
  assert counts["composition"] == 14_680_064 + 4 * 1024**2
  # Embeddings once, positions, and 12 D^2 + 13 D in a layer (biases: 4 of
  # attention, 4 + 1 of the MLP; two norms of 2), a last norm.
  layer = 12 * 1024**2 + 13 * 1024
  once = (30_000 + 512) * 1024 + 24 * layer + 2 * 1024
  assert counts["anchor"] == once == 333_555_712
  steps = overhead.training_flops(spec, 1, 512)
  rows = {r.key: r for r in overhead.table(counts, steps, 0.02)}
  assert rows["composition_share"].paper == pytest.approx(0.01448, abs=1e-5)
  assert rows["composition_share"].counted == pytest.approx(0.0566, abs=1e-4)
  assert rows["compose_cost"].paper == 0.02
  share = counts["paper_augmenting"] / counts["paper_anchor"]
  assert rows["both_cost"].paper == share + 0.02
  assert set(overhead.PRINTED) <= set(rows)
  # 12 D^2 a layer and the head, and attention to all of 512 tokens.
  forward = 2 * 512 * (24 * 12 * 1024**2 + 30_000 * 1024)
  forward += 24 * 4 * 512 * 512 * 1024
  assert steps["anchor_forward"] == forward
  # First connection after layer 6: 18 of 24 layers and the head go back.
  assert rows["compose_cost"].counted == pytest.approx(0.01367, abs=1e-5)
  assert rows["both_cost"].counted == pytest.approx(
    steps["augmenting_step"] / (3 * forward) + 0.01367, abs=1e-5
  )
