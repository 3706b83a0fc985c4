"""Training on cached states: the numbers of training with m_A, for less."""

from __future__ import annotations

import shutil
from pathlib import Path

import cached_runs
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from calm_jax.composition import forward
from calm_jax.composition.connections import Augmenting, Composition, Connection
from calm_jax.core import trees
from calm_jax.core.errors import InputError
from calm_jax.data.arithmetic import ArithmeticSource
from calm_jax.planning import flops
from calm_jax.training import checkpoint, optimizer, state_cache
from calm_jax.training import step as step_lib


@pytest.fixture(scope="module", autouse=True)
def cached_programs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("programs")
  with tiny.compilation_cache(folder):
    yield folder


def theta(params) -> dict:
  leaves = trees.flatten(params["composition"])
  return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def assert_bit_equal(got: dict, want: dict):
  assert got.keys() == want.keys()
  for name, leaf in want.items():
    assert got[name].tobytes() == leaf.tobytes(), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(folder, {what is cached: Θ_C after more than two epochs})."""
  folder = tmp_path_factory.mktemp("runs")
  found = {"fresh": theta(tiny.compose()[1])}
  for kind in ("", "int8"):
    found[kind] = theta(cached_runs.run(folder / (kind or "none"), kind))
  return folder, found


# The numbers.


def distance(got, want, start) -> float:
  """How far apart two Θ_C are, by how far training moved the second."""

  def norm(a, b):
    return np.sqrt(sum(np.square(a[n] - b[n]).sum() for n in b))

  return norm(got, want) / norm(start, want)


def test_int8_leads_to_about_the_same_theta(runs):
  found = runs[1]
  off = distance(found["int8"], found[""], found["fresh"])
  print(f"{off:.1e} of the way that training went")
  assert 0 < off <= 2e-2


@pytest.mark.parametrize(
  ("kind", "most"), [("float32", 0), ("bfloat16", 2**-8), ("int8", 1.01 / 254)]
)
def test_what_is_lost_of_a_state(kind, most):
  h_BME = np.random.default_rng(0).normal(size=(3, 5, 192)).astype(np.float32)
  h_BME[0, 0, :64] = 0
  h_BME[1, 2, 70] = 1e4  # as trained models have them
  back = state_cache.decode(state_cache.encode(kind, h_BME), "float32")
  shape = (3, 5, -1, 64 if kind == "int8" else 1)
  off = np.abs(back - h_BME).reshape(shape)
  largest = np.abs(h_BME).reshape(shape).max(-1, keepdims=True)
  assert (off <= most * largest).all()


def composed(names, **options):
  """A composition of the smallest models, Θ_C as if trained."""
  anchor, params = helpers.model(1, **tiny.SHAPE)
  parts, subtrees = [], {}
  for i, name in enumerate(names):
    config, subtrees[name] = helpers.model(2 + i, **tiny.SHAPE)
    pairs = tuple(Connection(*c) for c in ((1, 1), (2, 1), (2, 2))[i:])
    parts.append((name, Augmenting(config, pairs, **options)))
  spec = Composition(anchor, tuple(parts))
  theta = helpers.random_params(helpers.theta_shapes(spec), 5)
  return spec, {
    "anchor": params, "augmenting": subtrees, "composition": theta
  }  # fmt: skip


@pytest.mark.parametrize(
  ("names", "others", "options"),
  [
    (("kv", "two"), ("two",), {"visibility": "encoder"}),
    # Some rows are given the padding of others.
    (("kv",), (), {"control": "shuffled"}),
  ],
)
def test_losses_are_those_with_m_a(names, others, options, tmp_path):
  spec, params = composed(names, **options)
  source = cached_runs.source(names=others, examples=20)
  stage = tiny.stage(cache_states="float32", accumulate=2)
  frozen = {f"augmenting/{name}": {"sha256": name} for name in names}
  cached = state_cache.cached(
    "compose", stage, spec, params, source, tmp_path, frozen, None
  )
  score = jax.jit(step_lib.row_losses, static_argnums=1)
  # The rest are weights of nothing: they are not looked at.
  without = params | {
    "augmenting": jax.tree.map(jnp.zeros_like, params["augmenting"])
  }
  for index in range(2):
    want = score(params, spec, source[index])[0]
    got = score(without, spec, cached[index])[0]
    np.testing.assert_allclose(got, want, rtol=2e-6)
    assert np.abs(score(without, spec, source[index])[0] - want).max() > 1e-3


# The cost.


def step_flops(spec, params, batch) -> int:
  """Of a training step, from its trace."""
  mask = trees.mask(params, ["composition/.*"])
  trainable, frozen = trees.partition(params, mask)
  rate = optimizer.schedule("constant", 1e-2, 10, 0, 0.0)
  tx = optimizer.optimizer(
    mask, rate, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.0, decay="kernel",
    clip=1.0,
  )  # fmt: skip
  state = {
    "trainable": trainable,
    "opt_state": tx.init(params),
    "step": jnp.int32(0),
    "rng": jax.random.key(0),
  }
  step = step_lib.make_step(spec, "composed", tx, rate, 1)
  return flops.count(step, state, frozen, batch)


def test_a_step_costs_what_it_did_less_m_a(tmp_path):
  spec, params = composed(("kv", "two"))
  source = cached_runs.source(names=("two",))
  stage = tiny.stage(cache_states="int8")
  frozen = {f"augmenting/{name}": {"sha256": name} for name in ("kv", "two")}
  cached = state_cache.cached(
    "compose", stage, spec, params, source, tmp_path, frozen, None
  )
  batch, shapes = source[3], {"kv": "", "two": "augmenting/two/"}
  m_A = sum(
    flops.count(
      lambda p, s, joined=joined: forward.tap(p, joined, s)[0],
      params["augmenting"][name],
      forward.Sequence(
        *(batch[shapes[name] + f] for f in forward.Sequence._fields)
      ),
    )
    for name, joined in spec.augmenting
  )
  whole, less = (step_flops(spec, params, b) for b in (batch, cached[3]))
  assert m_A > 0.1 * whole
  assert less == whole - m_A


# Going on.


def test_a_resumed_run_ends_bit_equal(runs, tmp_path):
  # Between two checkpoints, in the second epoch.
  stopping = cached_runs.Stopping(cached_runs.source(), 8)
  with pytest.raises(OSError, match="no batch 8"):
    cached_runs.run(tmp_path, "int8", stopping)
  before = {p.name: p.stat().st_mtime_ns for p in states_of(tmp_path)}
  assert before
  assert_bit_equal(theta(cached_runs.run(tmp_path, "int8")), runs[1]["int8"])
  # Nothing was computed again.
  assert {p.name: p.stat().st_mtime_ns for p in states_of(tmp_path)} == before


def states_of(directory) -> list[Path]:
  return sorted((directory / "states" / "kv").glob("0*"))


def test_float32_gives_the_same_theta_after_kill_9_too(
  runs, cached_programs, tmp_path
):
  source = cached_runs.source()
  assert cached_runs.STEPS * source.batch_size > 2 * source.num_rows
  lives = helpers.lives(cached_runs.__file__, tmp_path, cached_programs, 3, 9)
  # Killed while states were written, which the next one went on with.
  assert [life["exit"] for life in lives] == [-9, -9, 0]
  assert all(life["after"] > life["before"] for life in lives)
  assert lives[2]["half"] == 0
  got, _ = checkpoint.restore_trainable(tmp_path / "checkpoints")
  for name, leaf in runs[1][""].items():
    np.testing.assert_allclose(theta(got)[name], leaf, rtol=0, atol=1e-6)


def test_a_damaged_file_stops_the_run_by_name(runs, tmp_path):
  shutil.copytree(runs[0] / "int8" / "states", tmp_path / "states")
  path = tmp_path / "states" / "kv" / "00000.states"
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 1
  path.write_bytes(data)
  with pytest.raises(InputError, match=r"00000\.states is missing or not as"):
    cached_runs.run(tmp_path, "int8")


def test_runs_share_a_folder(runs, tmp_path, capsys):
  folder = str(runs[0] / "int8" / "states")
  got = cached_runs.run(tmp_path, "int8", cache_folder=folder)
  assert_bit_equal(theta(got), runs[1]["int8"])
  assert "0 tokens of 0 examples to compute" in capsys.readouterr().out
  assert not (tmp_path / "states").exists()
  with pytest.raises(InputError, match="fields: was"):
    cached_runs.run(tmp_path / "other", "bfloat16", cache_folder=folder)
  run = tiny.Run(
    tmp_path / "another",
    tiny.stage(cache_states="int8", cache_folder=folder),
    cached_runs.source(),
  )
  scale = run.params["augmenting"]["kv"]["final_norm"]["scale"]
  run.params["augmenting"]["kv"]["final_norm"]["scale"] = scale + 1e-3
  with pytest.raises(InputError, match="model: was"):
    run()


def test_a_run_goes_on_as_it_began(runs, tmp_path):
  shutil.copytree(runs[0] / "int8", tmp_path, dirs_exist_ok=True)
  (tmp_path / "complete.json").unlink()
  with pytest.raises(InputError, match=r"cache_states: was int8, is None"):
    cached_runs.run(tmp_path, "")


# What cannot be.


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"cache_states": "int4"}, "'int4' is none of"),
    ({"model": "anchor", "trainable": ("anchor/.*",)}, "it trains 'anchor'"),
    ({"trainable": (".*",)}, "for frozen augmenting models"),
  ],
)
def test_a_stage_that_cannot_have_a_cache(changes, said, tmp_path):
  stage = tiny.stage(**{"cache_states": "int8"} | changes)
  with pytest.raises(InputError, match=said):
    tiny.Run(tmp_path, stage, cached_runs.source())()


def test_endless_data_are_refused():
  stage, endless = tiny.stage(cache_states="int8"), tiny.Source()
  with pytest.raises(InputError, match="made afresh for every batch"):
    state_cache.check("compose", stage, endless)
  state_cache.check("compose", tiny.stage(), endless)
  assert not hasattr(ArithmeticSource, "once")
