"""What a step computes, and how much of what its device could."""

from __future__ import annotations

import shutil
import types

import jax
import pytest
import tiny

from calm_jax.core import flops, trees
from calm_jax.training import optimizer, run_identity, utilisation
from calm_jax.training import step as step_lib
from calm_jax.training.metrics import read_metrics
from calm_jax.training.utilisation import Meter, Peak


def parts(stage=None, **compute):
  """The arguments of `model_flops` for the tiny composition."""
  run = tiny.Run(None, stage or tiny.stage())
  spec = run.spec.with_compute(lambda part: compute)
  mask = trees.mask(run.params, run.stage.trainable)
  trainable, frozen = trees.partition(run.params, mask)
  made = optimizer.make_optimizer(run.stage, mask)
  state = step_lib.initial_state(made, trainable)
  step = step_lib.make_step(spec, run.stage, made)
  return spec, run.stage, made, step, (state, frozen, run.source[0])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_flops_of_training_a_model_by_hand(accumulate):
  stage = tiny.stage(
    model="anchor", trainable=("anchor/.*",), accumulate=accumulate
  )
  tokens, layers = 8 * tiny.LENGTH, 2
  targets = int((tiny.Source()[0].weights > 0).sum())
  assert 0 < targets < tokens
  projections = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 8  # q o, k v of one head, MLP
  attention = layers * 2 * 2 * tokens * tiny.LENGTH * 8
  # A product has two gradients.
  products = tokens * layers * projections + targets * 8 * 17
  want = 3 * (2 * products + attention)
  assert utilisation.model_flops(*parts(stage)) == want


def least_flops(*parts):
  """The count of a step that runs, with the head where there is a weight."""
  *_, step, arguments = parts
  weights = arguments[-1].weights
  # A frozen head is multiplied with forward, and for the gradient of states.
  head = 2 * 2 * 8 * 17
  return flops.count(step, *arguments) - head * int((weights == 0).sum())


def test_what_is_recomputed_does_not_count():
  least = least_flops(*parts(remat="none"))
  for remat, chunk in ("none", 5 * 17), ("none", 0), ("dots", 0), ("full", 0):
    compute = {"remat": remat, "loss_chunk": chunk}
    assert utilisation.model_flops(*parts(**compute)) == least
  assert least_flops(*parts(remat="full")) > least


def test_a_step_that_ran_is_not_traced_again(monkeypatch):
  spec, stage, made, step, (state, frozen, batch) = parts()
  state, _ = step(state, frozen, batch)

  def never(*_):
    raise AssertionError("the loss was traced")

  monkeypatch.setattr(step_lib, "summed_loss", never)
  arguments = state, frozen, batch
  assert utilisation.model_flops(spec, stage, made, step, arguments) > 0
  # The jitted function is what keeps the trace.
  other = step_lib.make_step(spec, stage, made)
  with pytest.raises(AssertionError, match="was traced"):
    utilisation.model_flops(spec, stage, made, other, arguments)


@pytest.mark.parametrize(
  ("kind", "dtype", "devices", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 1, 989e12),
    ("NVIDIA H100 80GB HBM3", "float32", 8, 8 * 494e12),
    ("TPU v5 lite", "float32", 4, 4 * 197e12),
  ],
)
def test_the_peak_of_known_chips(kind, dtype, devices, peak, monkeypatch):
  device = types.SimpleNamespace(device_kind=kind, platform="gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  layout = types.SimpleNamespace(mesh=types.SimpleNamespace(size=devices))
  found = utilisation.find_peak(dtype, layout if devices > 1 else None)
  assert found.flops == peak
  assert found.source.startswith(f"{devices} x ")


def test_the_peak_of_a_cpu_is_measured_once(monkeypatch):
  layout = types.SimpleNamespace(mesh=types.SimpleNamespace(size=8))
  found = utilisation.find_peak("float32")
  assert 1e8 < found.flops < 1e15
  assert found.source == "a matrix product in float32"
  # The simulated devices of a CPU are no further cores.
  assert utilisation.find_peak("float32", layout) == found


def test_rates_by_a_clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(utilisation.time, "monotonic", lambda: now[0])
  meter = Meter(Peak(1000.0, "a test"), steps=10, flops=5000)

  def step(seconds):
    now[0] += seconds
    meter.add(tokens=60)

  step(30.0)  # compiles
  step(2.0)
  step(4.0)
  # 500 FLOPs a step in 3 seconds, of 3000 that there could be.
  want = {"tokens_per_second": 20, "step_seconds": 3, "utilisation": 1 / 6}
  assert meter.rates() == pytest.approx(want)
  step(1.0)
  now[0] += 50
  meter.skip(50)
  step(1.0)
  want = {"tokens_per_second": 60, "step_seconds": 1, "utilisation": 1 / 2}
  assert meter.rates() == pytest.approx(want)
  assert "5000 model FLOPs in 10 steps" in str(meter)
  assert "1e+03 FLOP/s (a test)" in str(meter)


def test_a_first_step_alone_has_its_time(monkeypatch):
  now = iter([100.0, 103.0])
  monkeypatch.setattr(utilisation.time, "monotonic", lambda: next(now))
  meter = Meter(Peak(1000.0, "a test"), steps=1, flops=300)
  meter.add(tokens=60)
  assert meter.rates()["step_seconds"] == 3


def test_a_stage_writes_its_rates_and_keeps_its_flops(tmp_path, monkeypatch):
  stage = tiny.stage(steps=4, checkpoint_every=2)
  tiny.Run(tmp_path, stage)()
  for line in read_metrics(tmp_path):
    tokens = line["tokens_per_second"] * line["step_seconds"]
    assert 2 * 8 <= round(tokens) <= tiny.LENGTH * 8
    assert 0 < line["utilisation"] < 1
  want = 4 * least_flops(*parts(stage))
  assert run_identity.completion(tmp_path)["flops"] == want
  # They are counted neither when the stage goes on nor when it is complete.
  monkeypatch.setattr(utilisation, "model_flops", lambda *_: 1)
  run_identity.remove_mark(tmp_path)
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  for _ in range(2):
    assert tiny.Run(tmp_path, stage).result()[1].flops == want
