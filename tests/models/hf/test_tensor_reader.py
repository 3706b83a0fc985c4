"""Tensors read into place: any part, transposed or not, in pieces."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tracemalloc

import helpers
import jax
import ml_dtypes
import numpy as np
import pytest
from golden import options
from safetensors.numpy import load_file, save_file

from calm_jax.core import files, hub, trees
from calm_jax.core.errors import InputError
from calm_jax.models import decoder
from calm_jax.models.hf import (
  export,
  families,
  loading,
  tensor_reader,
  weight_files,
)

DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


def stored(path: pathlib.Path, array: np.ndarray) -> weight_files.Tensor:
  save_file({"other": np.ones(3, np.float32), "x": array}, path)
  return weight_files.read_header(path)["x"]


def read_tensor(tensor: weight_files.Tensor) -> np.ndarray:
  """A whole tensor in its own dtype."""
  array = tensor_reader.empty(tensor.shape, weight_files.FLOATS[tensor.dtype])
  region = tuple(slice(0, n) for n in tensor.shape)
  tensor_reader.read_all([tensor_reader.Read(tensor, region, array)])
  return array


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [16, 1000, 4 << 20])
def test_any_part_in_any_dtype(transposed, dtype, piece, tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_reader, "_PIECE", piece)
  random = np.random.default_rng(piece)
  array = random.standard_normal((20, 13)).astype(DTYPES[dtype])
  tensor = stored(tmp_path / "x", array)
  for target_dtype in ("float32", "bfloat16"):
    for region in (
      (slice(0, 20), slice(0, 13)),
      (slice(1, 19), slice(1, 12)),
      (slice(0, 2), slice(0, 13)),
      (slice(7, 8), slice(3, 4)),
    ):
      want = array[region].astype(target_dtype)
      # As in a stack of layers, part of a larger array.
      shape = want.shape[::-1] if transposed else want.shape
      stack = np.zeros((3, *shape), target_dtype)
      target = stack[1].T if transposed else stack[1]
      tensor_reader.read_all([tensor_reader.Read(tensor, region, target)])
      np.testing.assert_array_equal(target, want)
      assert not stack[::2].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_every_bit_of_bfloat16_is_kept(transposed, tmp_path):
  bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
  tensor = stored(tmp_path / "x", bits.view(ml_dtypes.bfloat16))
  got = tensor_reader.empty((256, 256), "bfloat16")
  target = got.T if transposed else got
  everything = (slice(0, 256), slice(0, 256))
  tensor_reader.read_all([tensor_reader.Read(tensor, everything, target)])
  np.testing.assert_array_equal(target.view(np.uint16), bits)
  whole = read_tensor(tensor)
  np.testing.assert_array_equal(whole.view(np.uint16), bits)


def test_only_what_is_wanted_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_reader, "_PIECE", 1024)
  tensor = stored(tmp_path / "x", np.ones((64, 96), np.float32))

  def size(rows, columns):
    region = (slice(*rows), slice(*columns))
    target = np.empty((64, 96), np.float32)[region]
    found = tensor_reader.pieces(tensor_reader.Read(tensor, region, target))
    return sum(piece.stop - piece.start for piece in found)

  whole = 64 * 96 * 4
  assert size((0, 64), (0, 96)) == whole
  assert size((16, 32), (0, 96)) == whole / 4
  assert size((8, 9), (90, 94)) == 16
  assert size((8, 8), (0, 96)) == 0


def test_memory_is_taken_over_without_a_copy():
  for shape, dtype in {(3, 5): "bfloat16", (7,): "float32"}.items():
    array = tensor_reader.empty(shape, dtype)
    assert array.shape == shape
    assert array.dtype == dtype
    taken = jax.device_put(array)
    assert taken.unsafe_buffer_pointer() == array.ctypes.data


def test_files_that_end(tmp_path):
  array = np.ones((4, 6), np.float32)
  tensor = stored(tmp_path / "x", array)
  later = tensor._replace(start=tensor.start + 8)
  with pytest.raises(InputError, match="8 more are needed"):
    read_tensor(later)
  with pytest.raises(InputError, match=r"cannot read .*gone"):
    read_tensor(tensor._replace(path=tmp_path / "gone"))


def test_same_bits(tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_reader, "_PIECE", 64)
  array = np.arange(100, dtype=np.float32)
  one = stored(tmp_path / "a", array)
  assert tensor_reader.same(one, stored(tmp_path / "b", array))
  array[-1] += 1
  assert not tensor_reader.same(one, stored(tmp_path / "c", array))
  assert not tensor_reader.same(one, stored(tmp_path / "d", array[:50]))


def test_shards_are_not_larger_than_asked(tmp_path):
  config, params = helpers.model(0)
  export.save_params(tmp_path, config, params, max_shard_size=20_000)
  shards = weight_files.weight_files(tmp_path)
  assert len(shards) > 2
  assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
  for file in shards:
    named = load_file(file)
    assert len(named) == 1 or sum(x.nbytes for x in named.values()) <= 20_000
  total = files.read_json(tmp_path / hub.INDEX)["metadata"]["total_size"]
  assert total == 4 * trees.count(params)
  jax.tree.map(
    np.testing.assert_array_equal, loading.load_params(tmp_path, config), params
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_copy_of_the_model_is_held(dtype, tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_reader, "_PIECE", 1 << 16)
  monkeypatch.setattr(tensor_reader, "_THREADS", 2)
  config, params = helpers.model(0, width=256, mlp_width=512)
  export.save_params(tmp_path, config, params)
  decoder.param_shapes(config)  # what tracing allocates is no weight
  tracemalloc.start()
  try:
    loaded = loading.load_params(tmp_path, config, dtype)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
  assert peak <= 1.25 * size


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from calm_jax.core import trees as tree
from calm_jax.core.errors import InputError
from calm_jax.models import decoder
from calm_jax.models.hf import loading

jax.config.update("jax_num_cpu_devices", 4)
config = loading.load_config(sys.argv[1])
whole = tree.flatten(loading.load_params(sys.argv[1], config))
mesh = jax.make_mesh((2, 2), ("data", "model"))
for dtype in ("float32", "bfloat16"):
  for spec in (P(None, "model"), P(None, None, "model"), P("data", "model")):
    shardings = {
      name: NamedSharding(mesh, P(*spec[:leaf.ndim]) if leaf.ndim > 1 else P())
      for name, leaf in whole.items()
    }
    got = loading.load_params(
      sys.argv[1], config, dtype, tree.unflatten(shardings))
    for name, leaf in tree.flatten(got).items():
      assert leaf.sharding == shardings[name], name
      np.testing.assert_array_equal(leaf, whole[name].astype(dtype), name)
del shardings["final_norm/scale"]
for options, said in (
  (("float32", tree.unflatten(shardings)), "differ in ['final_norm/scale']"),
  (("float64", jax.tree.map(lambda x: x.sharding, got)), "jax_enable_x64"),
):
  try:
    loading.load_params(sys.argv[1], config, *options)
  except InputError as error:
    assert said in str(error), error
  else:
    raise AssertionError(said)
"""


# GPT-NeoX has queries, keys and values of one head side by side.
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_sharded_over_four_devices(family, tmp_path):
  config_json = options.config_json(family) | {"vocab_size": 62}
  config = families.from_hf(config_json)
  params = helpers.random_params(decoder.param_shapes(config), 0)
  export.save_params(tmp_path, config, params, config_json)
  run = subprocess.run(
    [sys.executable, "-c", SHARDED, str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[3],
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr[-3000:]
