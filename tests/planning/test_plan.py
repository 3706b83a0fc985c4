"""Plans of tiny models, by the CPU's compiler and by the TPU's."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import pytest

from calm_jax import plan
from calm_jax.composition import cross_attention, execution
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.core.errors import InputError
from calm_jax.experiments.config_files import read_settings
from calm_jax.experiments.settings import Settings
from calm_jax.generation import decode
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig
from calm_jax.parallel.chips import TPUS
from calm_jax.plan import PlanOptions
from calm_jax.planning import (
  estimate,
  gpu_topology,
  hlo,
  programs,
  search,
  shapes,
  topology,
)
from calm_jax.training.stage import Stage
from configs import kv, ntl

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}


def tiny():
  config = kv.get_config("tiny")
  config.unroll = 1
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(num_layers=3, width=32, num_heads=4)
  config.composition.num_connections = 1
  return config


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
  """The plan of one device, as printed JSON."""
  file = tmp_path_factory.mktemp("plan") / "plan.json"
  options = PlanOptions(
    "cpu", json=str(file), largest_batch=False, decode_rows=4
  )
  result = plan.main(tiny(), options)
  return result, json.loads(file.read_text())


@pytest.fixture(scope="module")
def job():
  return shapes.job(read_settings(tiny()))


def test_json_is_what_was_found(planned):
  result, read = planned
  assert json.loads(json.dumps(result)) == read
  assert read["best"]["found"]["fits"]
  assert read["decode"]["memory"]["caches"] > 0
  assert 0 < read["decode"]["flops"] < read["read"]["flops"]
  assert read["decode"]["rows"] == 4


def test_memory_by_kind_adds_up_to_what_the_compiler_says(job):
  placed = programs.place(job, topology.target("cpu"), ONE)
  program = programs.training(placed, 4)
  found = estimate.estimate(placed, program)
  says = program.compiled.memory_analysis()
  given = sum(found.memory[kind] for kind in programs.KINDS)
  read = given - found.unread + found.memory["alignment"]
  assert read == says.argument_size_in_bytes
  assert found.memory["alignment"] == 0
  assert found.memory["temporaries"] == says.temp_size_in_bytes > 0
  assert found.total == sum(found.memory.values())
  # Of m_A's head nothing is read, and Adam keeps two of each trainable.
  assert found.unread > 0
  theta = found.memory["trainable"]
  assert 2 * theta <= found.memory["optimizer"] < 2 * theta + 64
  assert found.memory["frozen"] == sum(
    x.size * x.dtype.itemsize
    for part in ("anchor", "augmenting")
    for x in jax.tree.leaves(job.params[part])
  )


def decoded_by_hand(job, rows, slots):
  """(FLOPs of a token of each row, bytes of weights, of caches of a layer)."""
  a, ((_, joined),) = job.spec.anchor, job.spec.augmenting
  m, (pair,) = joined.config, joined.connections
  # The slots, and those of the tokens that are not settled yet.
  keys = slots + decode.CHUNK

  def layer(c):
    heads = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
    return c.width * (heads + 3 * c.mlp_width)

  weights = a.num_layers * layer(a) + pair.augmenting * layer(m)
  # Queries and outputs; keys and values, with the projection in them.
  weights += 2 * a.width * a.width + 2 * m.width * a.width
  weights += a.width * a.vocab_size
  queries = a.num_layers * a.num_heads * a.head_dim + a.width
  queries += pair.augmenting * m.num_heads * m.head_dim
  cached = a.num_layers * a.num_kv_heads * a.head_dim + a.width
  cached += pair.augmenting * m.num_kv_heads * m.head_dim
  flops = 2 * rows * (weights + 2 * keys * queries)
  return flops, 4 * weights, 4 * rows * 2 * keys * cached


def test_a_decoded_token_is_as_counted_by_hand():
  config = tiny()
  for side in ("anchor", "augmenting"):
    config[f"{side}_model"].update(width=128, num_heads=2, num_kv_heads=2)
  config.anchor_model.num_layers, config.augmenting_model.num_layers = 2, 1
  job = shapes.job(read_settings(config))
  target = topology.target("cpu")
  chip = target.chip._replace(flops=1e9, bandwidth=1e7, links=1.0)
  placed = programs.place(job, target._replace(chip=chip), ONE)
  found, caches = [], []
  for slots in (2048, 4096):
    prompts = programs.Prompts(4, 32, slots)
    program = programs.decoding(placed, prompts)
    one = estimate.estimate(placed, program, decode.CHUNK)
    flops, weights, cache = decoded_by_hand(job, 4, slots)
    assert one.flops == one.worked == flops
    # States, scores and the newest tokens are read and written besides.
    assert 1 <= one.moved / (weights + cache) < 1.2
    assert one.seconds["compute"] == flops / 1e9
    assert one.seconds["memory"] == one.moved / 1e7 == one.step
    found.append(one.moved)
    caches.append(cache)
  assert 1 <= (found[1] - found[0]) / (caches[1] - caches[0]) < 1.1


def test_search_prunes_compiles_and_ranks(job):
  target = topology.target("cpu")
  small = target._replace(chip=target.chip._replace(hbm=1))
  said = []
  options = {"compiles": 1, "until": float("inf"), "say": said.append}
  assert all(c.reason for c in search.search(job, small, 4, **options))
  fast = target._replace(chip=target.chip._replace(flops=1e9, bandwidth=1e9))
  fast = fast._replace(chip=fast.chip._replace(links=1e9))
  best, *rest = search.search(job, fast, 4, **options)
  assert best.found.fits and best.found.step > 0
  assert [c.found for c in rest] == [None, None]
  assert {best.remat, *(c.remat for c in rest)} == set(search.REMATS)
  assert best.arguments == sum(best.found.memory[k] for k in programs.KINDS)
  assert best.seconds <= min(c.seconds for c in rest)


def test_of_bounds_as_good_as_equal_the_least_memory_is_best():
  def case(step, total):
    found = estimate.Estimate({}, total, True, step=step)
    return search.Case(ONE, "full", 8, found=found)

  cases = [case(3.52, 9), case(3.50, 14), case(3.3, 15), case(3.53, 8)]
  ranked = sorted(cases, key=search._rank)
  assert [c.found.total for c in ranked] == [15, 8, 9, 14]


def test_the_largest_batch_is_compiled(job, monkeypatch):
  """Memory grows by a line, so that its limit is found by the third compile."""
  seen = []

  def compiled(job, target, case):
    seen.append(case.rows)
    total = 100 + 7 * case.rows
    found = estimate.Estimate({}, total, total <= target.chip.hbm)
    return dataclasses.replace(case, found=found)

  monkeypatch.setattr(search, "compiled", compiled)
  target = topology.target("cpu")
  target = target._replace(chip=target.chip._replace(hbm=500))
  axes = ONE | {"fsdp": 4}
  first = compiled(job, target, search.Case(axes, "full", 8))
  rows, _ = search.largest(job, target, first, until=float("inf"))
  assert rows == 56
  assert seen == [8, 16, 56]


def test_a_loop_moves_as_often_as_it_runs():
  x = jax.ShapeDtypeStruct((256, 256), jnp.float32)

  def run(steps):
    def body(x, _):
      return jnp.sin(x @ x), None

    function = jax.jit(lambda x: jax.lax.scan(body, x, None, length=steps)[0])
    return hlo.count(function.lower(x).compile().as_text())

  few, many = run(10), run(30)
  assert not few.unknown_loops
  assert many.memory / few.memory == pytest.approx(3, rel=0.1)
  # A product reads two matrices and writes one, the sine one of each.
  assert few.memory >= 10 * 4 * 256**2 * 3


TEXT = """
HloModule example, num_partitions=16

%limit (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%q), index=1
  %g = f32[32]{0:T(128)} all-gather(%x), replica_groups=mesh['a'=4,'b'=4] {'a'}
  %r = f32[8]{0} all-reduce(%x), replica_groups=[2,8]<=[16], to_apply=%add
  %s = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}
  %chip = f32[8]{0:S(1)} copy(%x)
  %moved = f32[8]{0} copy(%x)
  %p-start = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), channel_id=1
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %moved)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%a), condition=%limit, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_collectives_send_their_share_of_each_turn():
  found = hlo.count(TEXT)
  assert found.sent == {
    "all-gather": 5 * 128 * 3 / 4,
    "all-reduce": 5 * 32 * 2 * 7 / 8,
    "reduce-scatter": 5 * 8 * 4 * 3 / 4,
    "collective-permute": 5 * 32,
  }
  assert found.launches == 5 * 6
  unknown = TEXT.replace("constant(5)", "negate(%i)")
  assert hlo.count(unknown, 7).sent["collective-permute"] == 7 * 32
  assert hlo.count(unknown, 7).unknown_loops == 1


NESTED = """
HloModule example

%slice (p: f32[9,64], i: s32[]) -> f32[1,64] {
  %p = f32[9,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,64}
}

%outer (j: s32[], q: f32[9,64]) -> f32[1,64] {
  %j = s32[] parameter(0)
  %q = f32[9,64]{1,0} parameter(1)
  %layer = f32[1,64]{1,0} fusion(%q, %j), kind=kLoop, calls=%slice
  ROOT %sine = f32[1,64]{1,0} sine(%layer)
}

ENTRY %main (a: f32[9,64], n: s32[]) -> f32[1,64] {
  %a = f32[9,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %out = f32[1,64]{1,0} fusion(%n, %a), kind=kOutput, calls=%outer
}
"""


def test_a_fusion_within_a_fusion_reads_its_layer_only():
  layer, index = 4 * 64, 4
  assert hlo.count(NESTED).memory == 2 * layer + index
  assert hlo.count(NESTED).launches == 1


PRODUCTS = """
HloModule example

ENTRY %main (a: f32[8,2,3,64], b: f32[8,2,16,64]) -> f32[7,5] {
  %a = f32[8,2,3,64]{3,2,1,0} parameter(0)
  %b = f32[8,2,16,64]{3,2,1,0} parameter(1)
  %scores = f32[8,2,3,16]{3,2,1,0} convolution(%a, %b), window={size=8x2 stride=7x1 lhs_dilate=8x2}, dim_labels=01bf_01oi->01bf
  %x = f32[7,6]{1,0} constant({...})
  %w = f32[6,5]{1,0} constant({...})
  %y = f32[7,5]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %z = f32[7,5]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501


def test_a_tpus_products_are_written_as_convolutions():
  scores = (8 * 2) * 3 * 16 * 64
  assert hlo.count(PRODUCTS).flops == 2 * (scores + 2 * 7 * 6 * 5)


@pytest.mark.parametrize(
  ("name", "reason"),
  [
    ("v9:2x2", "none of the forms"),
    ("v5e", "none of the forms"),
    ("v5e:0x4", "none of the forms"),
    ("cpu:0", "none of the forms"),
    ("gpu:0xH100", "none of the forms"),
    ("gpu:8xB9000", "chips are"),
    ("gpu:8xH100", "8 devices to stand in"),
  ],
)
def test_what_is_no_topology(name, reason, monkeypatch):
  monkeypatch.setattr(gpu_topology, "cuda_version", lambda: 0)
  with pytest.raises(InputError, match=reason):
    topology.target(name)


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"calm_jax\[tpu\]"):
    topology.target("v5e:2x2")


def test_shapes_of_published_models_and_their_errors(tmp_path):
  settings = dataclasses.replace(
    read_settings(tiny()),
    anchor="configs/shapes/gemma2-27b.json",
    augmenting="configs/shapes/gemma2-2b.json",
  )
  found = shapes.job(settings)
  counts = [
    sum(x.size for x in jax.tree.leaves(found.params[part]))
    for part in ("anchor", "augmenting")
  ]
  assert counts == [27_227_128_320, 2_614_341_888]
  with pytest.raises(InputError, match="is none of"):
    shapes.job(settings, "nothing")
  with pytest.raises(InputError, match="no such file"):
    shapes.job(dataclasses.replace(settings, anchor=str(tmp_path / "no.json")))
  with pytest.raises(InputError, match="vocabulary is not known"):
    shapes.job(
      dataclasses.replace(settings, anchor="", augmenting="", experiment="text")
    )


def test_the_languages_recipe_has_an_anchor_and_three_goldfish():
  config, fish = ntl.get_config(), "configs/shapes/goldfish-full.json"
  config.anchor = "configs/shapes/qwen3-0.6b.json"
  config.augmenting = dict.fromkeys(config.augmenting, fish)
  found = shapes.job(read_settings(config))
  counts = {
    part: sum(x.size for x in jax.tree.leaves(tree))
    for part, tree in found.params["augmenting"].items()
  }
  # The number that the cards of these models give.
  assert counts == dict.fromkeys(("lij", "fur", "vec"), 124_770_816)
  # Its evaluations answer 256 tokens to 2,048, GSM8K's; a chunk comes on top.
  assert programs.longest_prompts(found, 32) == (32, 2048, 3072)
  # Each reads rows of its own tokens, and has three connections of its own.
  assert found.own == dict.fromkeys(counts, 512)
  one = 3 * (768 * 1024 + 4 * 1024**2)
  theta = found.params["composition"].values()
  for tree in theta:
    kernels = [x.size for x in jax.tree.leaves(tree) if x.ndim > 1]
    assert sum(kernels) == one


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install 'calm_jax[tpu]'",
)
def test_a_tpu_step_runs_the_splash_kernel(job):
  effort = jax.config.jax_exec_time_optimization_effort
  topology.prepare("v5e:2x2", -1.0)
  try:
    target = topology.target("v5e:2x2")
    settings = dataclasses.replace(
      job.settings, attention="auto", dtype="bfloat16"
    )
    job = job._replace(settings=settings)
    placed = programs.place(job, target, ONE | {"fsdp": 2, "tensor": 2})
    program = programs.training(placed, 4)
  finally:
    jax.config.update("jax_exec_time_optimization_effort", effort)
  found = estimate.estimate(placed, program)
  parts = {name.split("_")[2] for name in found.kernels}
  assert parts == {"fwd", "dq", "dkv"}
  assert all(name.startswith("splash_mha_") for name in found.kernels)
  assert found.fits and target.chip == TPUS["v5e"]
  assert found.worked == pytest.approx(found.flops / 4, rel=0.02)
  assert found.sent["all-gather"] > 0 and not found.unknown_loops
  assert found.bound in found.seconds


@pytest.mark.skipif(
  not gpu_topology.cuda_version(),
  reason="no compiler for GPUs is installed: pip install 'calm_jax[gpu]'",
)
def test_a_gpu_step_is_compiled_for_that_gpu():
  config = tiny()
  config.update(attention="auto", dtype="bfloat16")
  config.composition.connections = ((1, 1),)
  target = topology.target("gpu:2xH100")
  assert target.exact and len(target.devices) == 2
  assert target.devices[0].compute_capability == "9.0"
  job = shapes.job(read_settings(config))
  placed = programs.place(job, target, ONE | {"fsdp": 2})
  found = estimate.estimate(placed, programs.training(placed, 4))
  backward = {name.endswith("Backward") for name in found.kernels}
  assert backward == {False, True}
  assert found.fits and found.sent["all-gather"] > 0


@pytest.mark.skipif(
  not gpu_topology.cuda_version(),
  reason="no compiler for GPUs is installed: pip install 'calm_jax[gpu]'",
)
def test_attention_of_unpacked_rows_is_kernels_alone_on_a_gpu():
  """No array of pairs; each forward kernel once, but for remat="full".

  Nor is there one with a soft cap, of packed rows too, which no kernel takes.
  """
  plain = ModelConfig(
    vocab_size=512, width=256, num_layers=4, num_heads=2, num_kv_heads=1,
    head_dim=128, mlp_width=512, window=512,
  ).with_compute(dtype="bfloat16")  # fmt: skip
  target = topology.target("gpu:1xH100")
  stage = Stage(steps=4, warmup=1, batch_size=2, length=2048)

  def compiled(remat, packed, cap=None, kernel="auto"):
    anchor = dataclasses.replace(plain, attention_cap=cap)
    other = dataclasses.replace(anchor, width=128, num_layers=2, num_heads=1)
    pair = Augmenting(other, (Connection(2, 2),))
    spec = Composition(anchor, (("kv", pair),))
    work = execution.Work("composed", 2, 2048, packed=packed)
    asked = execution.Asked(kernel, remat, unroll=1)
    spec = execution.for_training(spec, asked, target.kind, work)
    params = jax.eval_shape(
      lambda key: {
        "anchor": decoder.init(key, anchor),
        "augmenting": {"kv": decoder.init(key, other)},
        "composition": cross_attention.init(key, spec),
      },
      jax.random.key(0),
    )
    job = shapes.Job(Settings("text", None), stage, spec, params, {})
    placed = programs.Placed(job, None, target)
    text = programs.training(placed, 2).compiled.as_text()
    # The scores of two heads lie in one matrix.
    return hlo.kernels(text), bool(re.search(r"(2048|4096),2048\]", text))

  # Of m_A, of the anchor below and above the connection, and of the connection.
  kernels = {"fmhaSoftmax": 4, "fmhaSoftmaxBackward": 2}
  assert compiled("auto", packed=False) == (kernels, False)
  kernels["fmhaSoftmax"] = 5
  assert compiled("full", packed=False) == (kernels, False)
  assert compiled("auto", packed=True)[1]
  assert compiled("auto", packed=True, cap=50.0) == ({}, False)
  assert compiled("auto", packed=True, cap=50.0, kernel="xla") == ({}, True)


@pytest.mark.skipif(
  not gpu_topology.cuda_version(),
  reason="no compiler for GPUs is installed: pip install 'calm_jax[gpu]'",
)
def test_a_gpu_makes_two_arrays_of_logits():
  """They are the logits and their gradients, of an odd vocabulary, in half.

  One kernel reads the logits for both maximum and sum of the softmax.
  """
  config = ModelConfig(
    vocab_size=25_021, width=128, num_layers=1, num_heads=2, num_kv_heads=2,
    head_dim=64, mlp_width=256,
  ).with_compute(dtype="bfloat16")  # fmt: skip
  target = topology.target("gpu:1xH100")
  trained = {"model": "anchor", "trainable": ("anchor/.*",)}
  stage = Stage(steps=4, warmup=1, batch_size=8, length=256, **trained)
  work = execution.Work("anchor", 8, 256)
  spec = execution.for_training(
    Composition(config), execution.Asked(), target.kind, work
  )
  assert spec.anchor.compute.loss_chunk == 1024
  params = {"anchor": decoder.param_shapes(config)}
  job = shapes.Job(Settings("text", None), stage, spec, params, {})
  placed = programs.Placed(job, None, target)
  text = programs.training(placed, 8).compiled.as_text()
  made = r" = (\w+)\[(?:1,1,)?1024,(25\d+)\]\S* [\w-]+\(.*, calls="
  assert re.findall(made, text) == [("bf16", "25088")] * 2
  pairs = r" = \(f32\[1024,\d+\]\S+ f32\[1024,\d+\]\S+ fusion\("
  assert len(re.findall(pairs, text)) == 1


def test_kernels_are_counted_by_name():
  call = '%{}.1 = f32[2] custom-call(%x), custom_call_target="{}"\n'
  text = "".join(
    call.format(*names)
    for names in [
      ("splash_mha_fwd", "tpu_custom_call"),
      ("splash_mha_fwd", "tpu_custom_call"),
      ("dot_product_attention_fwd", "__cudnn$fmhaSoftmax"),
      ("sort", "Sharding"),
    ]
  )
  assert hlo.kernels(text) == {"splash_mha_fwd": 2, "fmhaSoftmax": 1}


def test_frozen_models_are_planned_in_their_bits(job):
  config = tiny()
  config.quantise.anchor = "int4"
  made = shapes.job(read_settings(config))

  def size(of):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(of))

  assert size(made.params["anchor"]) < 0.3 * size(job.params["anchor"])
  assert made.params["augmenting"] == job.params["augmenting"]
  # Before the last stage it is trained, and whole.
  whole = shapes.job(read_settings(config), "anchor")
  assert size(whole.params["anchor"]) == size(job.params["anchor"])
  placed = programs.place(made, topology.target("cpu"), ONE)
  found = estimate.estimate(placed, programs.training(placed, 4))
  assert found.memory["frozen"] == size(
    [made.params["anchor"], made.params["augmenting"]]
  )
