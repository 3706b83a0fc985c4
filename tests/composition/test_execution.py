"""The choices of kernels, loss chunks and remat for a device and its work."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from calm_jax.composition import execution
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.composition.execution import Asked, Device, Work
from calm_jax.core.errors import InputError
from calm_jax.models.config import ModelConfig

AUTO = Asked()
CPU = Device("cpu")
H100 = Device("gpu", "9.0", 60 * 10**9)
T4 = Device("gpu", "7.5", 12 * 10**9)
V5E = Device("tpu", memory=16 * 2**30)
STEP = Work("composed", 8, 1024, 6 * 10**9)


def model(**changes) -> ModelConfig:
  fields = {
    "vocab_size": 256_000, "width": 2048, "num_layers": 26, "num_heads": 8,
    "num_kv_heads": 4, "head_dim": 128, "mlp_width": 8192,
  }  # fmt: skip
  config = ModelConfig(**fields | changes)
  return config.with_compute(dtype="bfloat16")


def composed(anchor_layer: int = 13, **changes) -> Composition:
  augmenting = model(width=512, num_layers=4, mlp_width=1024)
  pairs = (Connection(4, anchor_layer),)
  return Composition(model(**changes), (("kv", Augmenting(augmenting, pairs)),))


def chosen(device, work=STEP, asked=AUTO, **changes):
  spec = execution.for_training(composed(**changes), asked, device, work)
  return spec.anchor.compute


def chunk_of(device, work=STEP, **changes) -> int:
  """The positions that the head computes at a time."""
  return chosen(device, work, **changes).loss_chunk


@pytest.mark.parametrize(
  "device, kernel",
  [(CPU, "xla"), (H100, "cudnn"), (T4, "pieces"), (V5E, "splash")],
)
def test_each_device_gets_its_kernel(device, kernel):
  spec = execution.for_inference(composed(), AUTO, device)
  kernels = {c.compute.attention for c in execution.models(spec).values()}
  assert kernels == {kernel}


@pytest.mark.parametrize("packed", [True, False])
def test_the_kernel_knows_whether_rows_are_packed(packed):
  work = STEP._replace(packed=packed)
  assert chosen(V5E, work).reads_segments
  assert chosen(H100, work).reads_segments != packed
  assert not chosen(CPU, work).reads_segments


def test_what_is_asked_for_is_taken_or_refused():
  asked = Asked("xla", "full", 300, 2)
  compute = chosen(H100, asked=asked)
  chunk, unroll = compute.loss_chunk, compute.unroll
  found = compute.attention, compute.remat, chunk, unroll
  assert found == dataclasses.astuple(asked)
  with pytest.raises(InputError, match="runs on TPUs only"):
    chosen(H100, asked=Asked(attention="splash"))


@pytest.mark.parametrize("vocabulary", [1000, 32_000, 256_000])
@pytest.mark.parametrize("device", [H100, V5E])
@pytest.mark.parametrize("rows", [1, 3, 8, 64])
def test_a_chunk_of_an_accelerator_has_1024_rows(vocabulary, device, rows):
  work = STEP._replace(rows=rows, resident=10**9)
  chunk = chunk_of(device, work, vocab_size=vocabulary)
  assert 1024 <= chunk <= rows * 1024
  assert chunk == rows * 1024 or chunk % 128 == 0
  # Logits in float32, with their gradients.
  assert chunk == 1024 or chunk * vocabulary * 10 < device.memory / 11


def test_without_memory_for_1024_rows_a_chunk_has_fewer():
  work = STEP._replace(resident=15 * 2**30)
  assert chunk_of(V5E, work) == 640


def test_a_cpu_takes_small_chunks():
  assert chunk_of(CPU) == 512
  assert chunk_of(CPU, STEP._replace(rows=1, length=100)) == 100
  # Two of the same size, and all where a logit is nearly nothing.
  assert chunk_of(CPU, STEP._replace(rows=3, length=201)) == 302
  assert chunk_of(CPU, vocab_size=64) == 8 * 1024


def test_remat_keeps_what_fits():
  assert chosen(H100).remat == "dots"
  assert chosen(V5E, STEP._replace(resident=15 * 2**30)).remat == "full"
  assert chosen(H100, STEP._replace(rows=256)).remat == "full"
  # Above the first connection only: fewer layers keep less.
  edge = STEP._replace(rows=60)
  assert chosen(H100, edge).remat == "full"
  assert chosen(H100, edge, anchor_layer=26).remat == "dots"


def test_a_cpu_keeps_all_of_layers_that_run_in_one_loop():
  assert chosen(CPU).remat == "dots"
  assert chosen(CPU, anchor_layer=26).remat == "none"
  assert chosen(CPU, STEP._replace(model="anchor")).remat == "none"


def test_a_cpu_runs_several_small_layers_a_turn():
  small = {"width": 128, "num_heads": 4, "head_dim": 32, "mlp_width": 352}
  assert chosen(CPU, **small).unroll == 4
  assert chosen(CPU).unroll == chosen(V5E, **small).unroll == 1


def test_a_gpu_runs_small_models_without_a_loop():
  small = {"width": 384, "num_heads": 8, "head_dim": 48, "mlp_width": 1024}
  assert chosen(H100, **small, num_layers=8, anchor_layer=8).unroll == 8
  assert chosen(H100).unroll == chosen(H100, **small).unroll == 1
  few = {"num_layers": 8, "anchor_layer": 4} | small
  assert chosen(H100, asked=Asked(unroll=2), **few).unroll == 2
  # Where "dots" fits only just, the compiler may not keep more.
  edge = STEP._replace(rows=600)
  assert chosen(H100, edge, **few).remat == "dots"
  assert chosen(H100, edge, **few).unroll == 1


def test_trained_leaves_count_with_gradient_and_moments():
  device = jax.devices()[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  trained = {"a": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
  frozen = {
    "b": jax.ShapeDtypeStruct((7,), jnp.bfloat16),
    "c": jax.ShapeDtypeStruct((2, 2), jnp.int8, sharding=sharding),
  }
  assert execution.resident_bytes(trained, frozen) == 16 * 15 + 2 * 7 + 4


def test_the_line_at_the_start():
  spec = execution.for_training(composed(), AUTO, H100, STEP)
  assert execution.describe(spec, STEP) == {
    "attention": "cudnn",
    "loss": "8 x 1,024 tokens",
    "remat": "dots",
    "unroll": "1",
  }
  capped = composed(attention_cap=50.0)
  mixed = execution.for_training(capped, AUTO, T4._replace(memory=None), STEP)
  assert execution.describe(mixed, STEP)["attention"] == "pieces"
