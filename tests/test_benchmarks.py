"""What the benchmarks count and how they reckon; not how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import compiler
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spelled

import calm_jax
from benchmarks import (
  decode_program,
  generate,
  gpu,
  machine,
  pairs,
  probe,
  steps,
  traffic,
)
from calm_jax.core import files, flops, trees
from calm_jax.models import decoder
from calm_jax.planning import flops as formulas
from calm_jax.planning import gpu_topology, topology

GENERATE = [
  "--pair=tiny", "--dtype=bfloat16", "--rows=2", "--prompt=20", "--new=48",
  "--bandwidth", "--copy_megabytes=1", "--repeats=1", "--no-torch",
]  # fmt: skip
# One process for both, in which programs compile in half the time.
PROBE = """
import json, sys
from benchmarks import devices, generate, pairs
from calm_jax.planning import topology
topology.prepare("cpu:2")
job = devices.job(pairs.pair("tiny"), 4, 8)
_, found = devices.table(job, counts=(1, 2), along=("fsdp",))
measured = generate.main(sys.argv[1:])
print(json.dumps([found["", 1], found["fsdp", 2], measured[2]]))
"""


@pytest.fixture(scope="module")
def probed():
  """What a process with two simulated devices prints, in lines."""
  run = subprocess.run(
    [sys.executable, "-c", PROBE, *GENERATE],
    env=os.environ
    | {
      "PYTHONPATH": str(helpers.ROOT),
      "XLA_FLAGS": f"--xla_backend_optimization_level=0 {compiler.FLAGS}",
      "JAX_PLATFORMS": "cpu",
    },
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr[-2000:]
  return run.stdout.splitlines()


def shapes(spec, dtype="float32"):
  return jax.eval_shape(lambda: pairs.parameters(spec, dtype))


def test_the_gemma_pair_has_the_published_sizes():
  spec = pairs.pair("gemma")
  params = shapes(spec)
  assert trees.count(params["anchor"]) == 2_614_341_888
  # Of m_A's own vocabulary of 262,144 tokens there are the anchor's.
  missing = (262_144 - 256_000) * 640
  assert trees.count(params["augmenting"]) == 268_098_176 - missing
  assert trees.count(params["composition"]) == 4 * (
    640 * 2304 + 4 * 2304**2 + 640 + 2304
  )


def test_bytes_of_a_decoded_token_by_hand():
  spec = pairs.pair("tiny")
  D, E, KH, F = 64, 32, 2 * 16, 96
  anchor_layer = 2 * D * D + 2 * D * KH + 3 * D * F + 4 * D
  small_layer = 2 * E * E + 2 * E * 16 + 3 * E * F + 4 * E + 2 * 16
  connection = 2 * E * D + 2 * D * D + E + D
  rows = 3
  weights = 2 * anchor_layer + D + 320 * D  # its head is the embedding
  weights += 2 * small_layer + rows * E + 2 * connection
  assert traffic.weights(shapes(spec), spec, rows) == 4 * weights
  # One layer sees the 7 before a token, the other all 20.
  slots = 7 + 20
  cached = slots * 2 * KH + slots * 2 * 16 + 20 * 2 * (2 * D)
  assert traffic.caches(spec, rows, 20) == 4 * rows * cached
  both = traffic.bytes_per_token(shapes(spec), spec, rows, [20, 20])
  assert both == 4 * (weights + rows * cached)


def test_m_a_counts_up_to_its_last_tapped_layer_and_without_a_head():
  spec, params = helpers.compose(connections=((1, 2),))
  whole = traffic.weights(params, spec, 2)
  layers = traffic.nbytes(params["augmenting"]["kv"]["layers"])
  longer, theirs = helpers.compose(connections=((3, 2),))
  assert traffic.weights(theirs, longer, 2) - whole == layers * 2 // 3
  # An untied embedding counts as the rows that are read.
  row = spec.anchor.width + dict(spec.augmenting)["kv"].config.width
  assert traffic.weights(params, spec, 3) - whole == 4 * row


def test_the_least_flops_are_those_of_the_step():
  spec = pairs.computed(pairs.pair("tiny"), loss_chunk=0)
  step, make = steps.parts(spec)
  batch = steps.batch_of(2, 16, spec.anchor.vocab_size)
  least = formulas.training_step(spec, 2, 16)
  assert flops.count(step, *jax.eval_shape(make), batch) == least
  none, half = (formulas.training_step(spec, 2, 16, s) for s in (0.0, 0.5))
  assert half - none == least - half > 0


def test_positions_without_a_loss_cost_no_logits():
  models = pairs.model(256, 2, 512), pairs.model(128, 2, 256)
  spec = pairs.join(*models, connections=1)
  least, counted = (
    [function(spec, 2, 40, weighted=share) for share in (0.2, 1.0)]
    for function in (formulas.training_step, steps.unrolled_flops)
  )
  assert least[0] < 0.6 * least[1]  # half is the head's
  ratios = [c / a for c, a in zip(counted, least, strict=True)]
  print(f"{ratios} of the least")
  assert all(1 <= ratio <= 1.05 for ratio in ratios)


def test_the_share_is_of_the_matmuls_around_a_step():
  rates = iter([10.0, 30.0, 10.0])
  got = steps.measure(
    {"a": lambda clock: 2.0, "b": lambda clock: 4.0}, 15, lambda: next(rates),
    repeats=1, clock=None,
  )  # fmt: skip
  # As many products at 10 as at 30 a second are done at 15.
  assert got["a"] == {"seconds": 2.0, "rate": 15.0, "share": 0.5}
  assert got["b"] == {"seconds": 4.0, "rate": 15.0, "share": 0.25}


def test_continuations_differ_by_whole_chunks_in_caches_of_one_size():
  assert generate.shorter(32, 64) == 32
  assert generate.shorter(20, 208) == 96
  with pytest.raises(ValueError, match="--new=20"):
    generate.shorter(32, 20)


def test_generation_is_measured(probed):
  found = json.loads(probed[-1])[2]
  assert found.keys() == {generate.ALONE, generate.COMPOSED}
  for got in found.values():
    assert got.keys() == {"whole", "token", "share"}
    assert got["whole"] > 0
  params = shapes(pairs.pair("tiny"))
  for part in (params["anchor"], params):
    assert f"{trees.count(part):,}" in "\n".join(probed)


def test_decoding_is_the_difference_of_two_continuations(monkeypatch):
  now = [0.0]

  def run(new):
    now[0] += 5 + 0.5 * new  # a prompt, and tokens

  monkeypatch.setattr(generate.time, "perf_counter", lambda: now[0])
  runs = {"a": generate.Run(run, 1, 100.0)}
  got = generate.measure(runs, (64, 32), 3, lambda: 400.0)["a"]
  assert got == {"whole": 37.0, "token": 0.5, "share": 0.5}


def test_without_decoding_alone_no_bytes_are_counted():
  spec = pairs.pair("tiny")
  prompts = generate.prompts_of(2, 20, spec.anchor.vocab_size)
  assert generate.ours(shapes(spec), spec, prompts, 48, 48).bytes is None
  assert generate.ours(shapes(spec), spec, prompts, 48, 16).bytes > 0


def test_a_copy_is_one():
  x = jnp.ones((8, 8), jnp.uint8)
  y = jax.jit(jnp.copy)(x)
  assert x.unsafe_buffer_pointer() != y.unsafe_buffer_pointer()
  assert machine.make_copy(1)() > 0
  assert machine.make_matmul(64, "bfloat16")() > 0


def test_one_of_two_devices_has_half_of_everything(probed):
  one, half, _ = json.loads(probed[-1])
  counted, arguments, _, sent = range(4)
  for what in (counted, arguments):
    assert 0.5 <= half[what] / one[what] < 0.52
  # Each sends its half of the weights at least once.
  assert one[sent] == 0
  assert half[sent] > half[arguments]


def test_a_row_of_the_gpu_table_that_fails_says_why(monkeypatch, tmp_path):
  def run(command, **_):
    if "--row=kernels" in command:
      raise subprocess.TimeoutExpired(command, 7)
    if "--row=train" in command:
      return subprocess.CompletedProcess(command, 1, "", "a\nNo memory.\n")
    return subprocess.CompletedProcess(command, 0, 'a line\n{"share": 0.5}\n')

  monkeypatch.setattr(subprocess, "run", run)
  file = tmp_path / "gpu.json"
  found = gpu.main([f"--json={file}", "--pair=tiny"])
  assert json.loads(file.read_text()) == found
  assert list(found) == list(gpu.ROWS)
  assert found["kernels"] == {"failed": "not done after 120 s"}
  assert found["train"] == {"failed": "No memory."}
  assert found["decode 8"] == {"share": 0.5}
  late = gpu.main([f"--json={file}", "--minutes=0", "--only=decode"])
  assert set(late) == {name for name in gpu.ROWS if "decode" in name}
  assert all("no time left" in row["failed"] for row in late.values())


def test_ratios_of_the_gpu_table_by_hand():
  found = {
    "train": {"share": 0.6, "seconds": 0.25},
    "train, PyTorch": {"seconds": 0.5},
    "decode 1": {"anchor alone token": 3.0, "composed token": 3.3},
    "decode 1 int8": {"failed": "No memory."},
  }
  assert gpu.ratios(found) == {
    "training, of a matmul": (0.6, ">= 0.55"),
    "training, PyTorch's time over ours": (2.0, ">= 1.5"),
    "composed over the anchor alone, 1 row": (pytest.approx(1.1), "<= 1.15"),
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  "row, number",
  [
    ("speeds", "copy_bytes"),
    ("train", "share"),
    ("decode 1 int8", "composed share"),
    ("key-value m_A", "utilisation"),
  ],
)
def test_a_row_of_the_gpu_table_measures_what_it_says(row, number, capsys):
  found = gpu.main([f"--row={row}", "--pair=tiny"])[row]
  assert found[number] > 0
  assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


@pytest.mark.skipif(
  not gpu_topology.cuda_version(),
  reason="no compiler for GPUs is installed: pip install 'calm_jax[gpu]'",
)
@pytest.mark.parametrize("kind", ["", "int8"])
def test_a_gpu_decodes_a_layer_by_few_kernels_that_read_its_bytes(kind):
  target = topology.target("gpu:1xH100")
  more, fewer = (
    decode_program.token(target, n, "joined", kind) for n in (4, 3)
  )
  assert more.launches - fewer.launches <= (17 if kind else 15)
  config = pairs.pair("gemma").anchor
  width, inner = config.width, config.mlp_width
  heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
  weights = width * (heads + 3 * inner) * (2 if kind == "" else 1 + 2 / 64)
  assert more.megabytes - fewer.megabytes < 1.1 * weights / 1e6


@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_a_probe_reads_what_is_linear_and_nothing_else(shift):
  random = np.random.default_rng(0)
  answers = np.array(["red", "blue", "grey"])[random.integers(0, 3, 400)]
  x_NE = random.normal(size=(400, 7)) * 10.0 ** np.arange(-3, 4) + shift
  x_NE[:, 0] += (answers == "red") * 0.02
  x_NE[:, 6] -= (answers == "grey") * 2e4
  said = probe.classify(x_NE[:300], answers[:300], x_NE[300:])
  assert np.mean(said == answers[300:]) > 0.95
  said = probe.classify(x_NE[:300], random.permutation(answers)[:300], x_NE)
  assert np.mean(said == answers) < 0.5


def test_a_probe_of_a_folder_and_questions(tmp_path):
  """The state of prompts of many lengths is that of each prompt alone."""
  spelled.save(tmp_path / "model", 3, num_layers=2)
  values = ["12", "34", "bad", "jab"]
  lines = [
    {"prompt": "a bad cab"[: 3 + i % 7], "completion": f" {values[i % 4]}"}
    | {"attribute": "code" if i % 4 < 2 else "word"}
    for i in range(80)
  ]
  files.write_json_lines(tmp_path / "q.jsonl", lines)
  rows = probe.main([str(tmp_path / "model"), str(tmp_path / "q.jsonl")])
  assert [*rows] == ["code, digit 1", "code, digit 2", "word"]
  assert {len(row) for row in rows.values()} == {3}
  model = calm_jax.load_model(str(tmp_path / "model"))
  prompts = [line["prompt"] for line in lines]
  x_SNE = probe.states(model, prompts)
  for i in (0, 6, 71):
    alone_SE = probe.states(model, prompts[i : i + 1])[:, 0]
    np.testing.assert_allclose(x_SNE[:, i], alone_SE, atol=1e-5)
  # The last ones make the model's logits.
  last_1LE = jnp.asarray(x_SNE[-1, :1, None])
  ids = model.text().encode_prompt(prompts[0])
  logits = decoder.logits(model.params["anchor"], model.spec.anchor, last_1LE)
  np.testing.assert_allclose(
    logits[0, 0], np.asarray(model.logits([ids]))[0, -1], atol=1e-4
  )
