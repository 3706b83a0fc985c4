import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from calm_jax.core import trees
from calm_jax.core.errors import InputError, StorageError
from calm_jax.training import checkpoint
from calm_jax.training.checkpoint import Checkpoints


def example_params():
  a, b, c = jax.random.split(jax.random.key(0), 3)
  return {
    "anchor": {"w": jax.random.normal(a, (4, 3))},
    "composition": {
      "proj": jax.random.normal(b, (3, 5), jnp.bfloat16),
      "scale": jax.random.normal(c, (5,)),
    },
  }


def example_state(patterns=("composition/.*",)):
  """Trainables and masked adamw after one step, as a run has them."""
  params = example_params()
  selection = trees.mask(params, patterns)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), selection)
  )
  opt_state = optimizer.init(params)
  _, opt_state = optimizer.update(params, opt_state, params)
  trainable, _ = trees.partition(params, selection)
  return {"trainable": trainable, "opt_state": opt_state, "step": jnp.int32(1)}


def small_state(value=0):
  w = jnp.full((3,), value, jnp.float32)
  return {"trainable": {"w": w}, "step": jnp.int32(value)}


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def steps(directory) -> set[int]:
  return {int(p.name) for p in directory.iterdir() if p.name.isdigit()}


def assert_bit_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert g.dtype == w.dtype
    assert g.shape == w.shape
    assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


def test_restores_bit_equal_into_the_same_structure(tmp_path):
  state = example_state()
  data, meta = {"position": [3, {"epoch": 1}]}, {"sha256": "abc"}
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.save(1, state, data, meta)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 1
    found = []
    restored, restored_data = checkpoints.restore(abstract(state), found.append)
  assert found == [meta]
  assert_bit_equal(restored, state)
  assert restored_data == data


def test_what_a_killed_process_left_is_gone_once_a_folder_is_open(tmp_path):
  left = tmp_path / f"4{ocp.utils.TMP_DIR_SUFFIX}-1764000000" / "state"
  left.mkdir(parents=True)
  with Checkpoints(tmp_path) as checkpoints:
    assert not left.parent.exists()
    assert checkpoints.latest() is None


def test_restores_with_the_shardings_asked_for(tmp_path):
  mesh = jax.make_mesh((1,), ("data",))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = example_state()
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
  )
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, None, {})
    restored, _ = checkpoints.restore(target)
  assert_bit_equal(restored, state)
  for leaf in jax.tree.leaves(restored):
    assert leaf.sharding.is_equivalent_to(replicated, leaf.ndim)


def test_leaves_without_shardings_are_numpy(tmp_path):
  state = {"w": jnp.arange(3.0), "position": np.arange(2)}
  target = {
    "w": jax.ShapeDtypeStruct((3,), jnp.float32),
    "position": np.zeros(2, np.int64),
  }
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, None, None)
    restored, data = checkpoints.restore(target)
  assert all(type(leaf) is np.ndarray for leaf in restored.values())
  assert_bit_equal(restored, state)
  assert data is None


def test_what_was_passed_may_change_while_the_save_runs(tmp_path):
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  state = {"w": jnp.zeros((500, 500)), "host": np.zeros((500, 500))}
  data = {"position": 1}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, data, {})
    jax.block_until_ready(step(state["w"]))
    state["host"][:] = 1
    data["position"] = 2
    target = {
      "w": jax.ShapeDtypeStruct((500, 500), jnp.float32),
      "host": np.zeros((500, 500)),
    }
    restored, data = checkpoints.restore(target)
  assert not np.any(restored["w"]) and not np.any(restored["host"])
  assert data == {"position": 1}


def test_keeps_the_best_and_the_last(tmp_path):
  losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 3.0, 5: 4.0, 6: None}
  with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
    for step, loss in losses.items():
      checkpoints.save(step, small_state(step), {}, {"step": step}, loss)
    checkpoints.wait()
    assert steps(tmp_path) == {2, 5, 6}
  with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
    assert checkpoints.latest() == 6
    checkpoints.save(7, small_state(7), {}, {"step": 7}, 0.5)
    checkpoints.wait()
    assert steps(tmp_path) == {6, 7}
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"6", "7"}


def test_keeps_the_last_only_without_a_metric(tmp_path):
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, small_state(step), {}, {})
    checkpoints.wait()
    assert steps(tmp_path) == {3}
    state, _ = checkpoints.restore(abstract(small_state()))
  assert_bit_equal(state, small_state(3))


def test_saving_a_step_again_or_out_of_order(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, small_state(5), {}, {})
    for step in (4, 5):
      with pytest.raises(InputError, match=f"has step 5, and step {step} is"):
        checkpoints.save(step, small_state(step), {}, {})


def test_refuses_bad_arguments(tmp_path):
  with pytest.raises(InputError, match="keep_last"):
    Checkpoints(tmp_path, keep_last=0)
  with Checkpoints(tmp_path, keep_best=1) as checkpoints:
    with pytest.raises(TypeError, match="JSON"):
      checkpoints.save(1, small_state(), {"rng": object()}, {})
    assert checkpoints.restore(abstract(small_state())) is None
    checkpoints.save(1, small_state(), {}, {})
  with pytest.raises(InputError, match="of step 2 in"):
    checkpoint.restore_trainable(tmp_path, 2)


def test_a_mismatch_lists_both_sides(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, example_state(), {}, {})
    target = abstract(example_state(("composition/proj", "anchor/.*")))
    proj = target["trainable"]["composition"]["proj"]
    target["trainable"]["composition"]["proj"] = jax.ShapeDtypeStruct(
      proj.shape, jnp.float32
    )
    with pytest.raises(InputError) as error:
      checkpoints.restore(target)
  message = str(error.value)
  assert "missing" in message and "trainable/anchor/w: float32[4,3]" in message
  assert "unexpected" in message
  assert "trainable/composition/scale: float32[5]" in message
  assert "found bfloat16[3,5], wanted float32[3,5]" in message


def test_restore_trainable_reads_nothing_else(tmp_path):
  state = example_state()
  with Checkpoints(tmp_path, keep_last=3, keep_best=1) as checkpoints:
    for step, loss in ((1, 1.0), (2, 2.0)):
      state["trainable"]["composition"]["scale"] += 1
      checkpoints.save(step, state, {}, {"step": step}, loss)
    checkpoints.wait()
    # While the run that writes is still open.
    trainable, meta = checkpoint.restore_trainable(tmp_path)
    _, first_meta = checkpoint.restore_trainable(tmp_path, 1)
  assert all(type(x) is np.ndarray for x in jax.tree.leaves(trainable))
  assert_bit_equal(trainable, state["trainable"])
  assert (meta, first_meta) == ({"step": 2}, {"step": 1})


def test_restore_trainable_into_shardings(tmp_path):
  state = example_state()
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {}, {})
  target = abstract(state["trainable"])
  trainable, _ = checkpoint.restore_trainable(tmp_path, abstract=target)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(trainable))
  assert_bit_equal(trainable, state["trainable"])
  del target["composition"]["scale"]
  with pytest.raises(InputError, match="composition/scale"):
    checkpoint.restore_trainable(tmp_path, abstract=target)


def test_restore_trainable_of_nothing(tmp_path):
  for directory in (tmp_path, tmp_path / "absent"):
    with pytest.raises(InputError, match="no complete checkpoint"):
      checkpoint.restore_trainable(directory)


def test_a_failure_in_the_background_is_raised(tmp_path, monkeypatch):
  async def fail(*_):
    raise OSError("disk full")

  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, small_state(1), {}, {})
  checkpoints.wait()
  with monkeypatch.context() as patch:
    patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", fail)
    checkpoints.save(2, small_state(2), {}, {})
    with pytest.raises(StorageError) as error:
      checkpoints.wait()
  assert "step 2 was not saved" in str(error.value)
  assert "disk full\nthe last good checkpoint there is step 1" in str(
    error.value
  )
  with Checkpoints(tmp_path) as reopened:
    assert reopened.latest() == 1


# Each kills the process with SIGKILL while step 2 is being written: before
# the rename that commits it, with its arrays still in flight, and after the
# commit while step 1 is being deleted.
KILLS = {
  "before the commit": """
    from orbax.checkpoint._src.path import atomicity
    async def rename(*_):
      die()
    atomicity.AtomicRenameTemporaryPath.finalize = rename
    save(2)
    checkpoints.wait()
  """,
  "in flight": """
    save(2)
    die()
  """,
  "deleting": """
    import shutil
    save(2)
    checkpoints.wait()
    shutil.rmtree = lambda *_, **__: die()
    checkpoints.close()
  """,
}

SAVER = """
import os, signal, sys
import jax.numpy as jnp
from calm_jax.training.checkpoint import Checkpoints

def die():
  os.kill(os.getpid(), signal.SIGKILL)

def save(step):
  state = {"trainable": {"w": jnp.full((2048, 1024), step, jnp.float32)}}
  checkpoints.save(step, state, {"position": step}, {})

checkpoints = Checkpoints(sys.argv[1], keep_last=1)
save(1)
checkpoints.wait()
"""


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_in_a_save_leaves_a_complete_checkpoint(tmp_path, moment):
  script = SAVER + textwrap.dedent(KILLS[moment])
  run = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert run.returncode == -9, run.stderr
  left = {path.name for path in tmp_path.iterdir()}
  if moment == "before the commit":
    assert any("tmp" in name for name in left)
  if moment == "deleting":
    assert left == {"2", ".deleted"}

  target = {"trainable": {"w": jax.ShapeDtypeStruct((2048, 1024), jnp.float32)}}
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    step = checkpoints.latest()
    expected = {"before the commit": {1}, "in flight": {1, 2}, "deleting": {2}}
    assert step in expected[moment]
    state, data = checkpoints.restore(target)
    assert np.all(np.asarray(state["trainable"]["w"]) == step)
    assert data == {"position": step}
    checkpoints.save(3, state, {"position": 3}, {})
  assert {path.name for path in tmp_path.iterdir()} == {"3"}
