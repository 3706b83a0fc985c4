"""Arguments of composing, saving and looking, checked where they enter.

Those of generating and scoring are in generation/test_arguments.py, and places
of checkpoints in core/test_hub.py.
"""

from __future__ import annotations

import helpers
import numpy as np
import pytest
from test_language_model import spell

import calm_jax
from calm_jax import InputError
from calm_jax.models.hf import export


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  for i, name in enumerate("ab"):
    export.save_params(folder / name, *helpers.model(i, vocab_size=14))
    spell(folder / name, "abcdefghij")
  return [calm_jax.load_model(folder / name) for name in "ab"]


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"anchor": "org/name"}, "the anchor is a str.*load it by load_model"),
    ({"anchor": None}, "the anchor is a NoneType"),
    ({"augmenting": "org/name"}, "'augmenting' is a str.*load_model"),
    ({"augmenting": ["x"]}, "'augmenting' is a list.*a dict by name"),
    ({"augmenting": {"kv": "x"}}, "'kv' is a str"),
    ({"augmenting": {}}, "no augmenting model"),
    ({"connections": 0}, "connections=0"), ({"connections": 2.0}, "=2.0"),
    ({"connections": True}, "=True"), ({"connections": "2"}, "'2' is no pair"),
    ({"connections": (2, 2)}, "2 is no pair"), ({"connections": []}, "no conn"),
    ({"connections": [(1, 2, 3)]}, "no pair"),
    ({"connections": [(1.0, 2)]}, "augmenting layer=1.0"),
    ({"connections": [(1, 9)]}, "layers 1 to 4, not 9"),
    ({"seed": -1}, "seed=-1"), ({"seed": 2**40}, "seed=1099511627776"),
    ({"seed": "1"}, "seed='1'"), ({"norm": "no"}, "norm='no'"),
    ({"control_seed": 2**33}, "control_seed"), ({"visibility": None}, "=None"),
  ],
)  # fmt: skip
def test_what_cannot_be_composed(models, options, said):
  given = {"anchor": models[0], "augmenting": models[1]} | options
  with pytest.raises(InputError, match=said):
    calm_jax.compose(**given)


@pytest.mark.parametrize("name", ["", "a/b", "a=b", "a,b", 3, None, "a\ud800"])
def test_names_that_no_augmenting_model_has(models, name):
  with pytest.raises(InputError, match="name"):
    calm_jax.compose(models[0], {name: models[1]}, 1)


def test_numbers_of_numpy_compose(models, tmp_path):
  want = calm_jax.compose(*models, [(1, 2), (4, 4)], seed=3)
  pairs = np.array([[1, 2], [4, 4]])
  got = calm_jax.compose(*models, pairs, seed=np.uint32(3))
  assert got.spec == want.spec
  got.save(tmp_path / "c")
  assert calm_jax.load_composed(tmp_path / "c").spec == want.spec
  two = calm_jax.compose(*models, np.int64(2))
  assert two.spec == calm_jax.compose(*models, 2).spec


def test_what_cannot_be_joined_or_taken_apart(models):
  composed = calm_jax.compose(*models, 1)
  for wrong, said in (
    (composed, "models is a LanguageModel"), (None, "models is a NoneType"),
    (["org/name"], "a str.*load_composed"), ([], "only compositions"),
    ([models[0]], "only compositions"),
  ):  # fmt: skip
    with pytest.raises(InputError, match=said):
      calm_jax.join_compositions(wrong)
  for name in ("", "kv", 3, None):
    with pytest.raises(InputError):
      composed.part(name)
    with pytest.raises(InputError):
      composed.drop(name)
  with pytest.raises(InputError, match="'kv' is a str"):
    composed.add("kv", "org/name")


def test_where_nothing_can_be_written(models, tmp_path):
  path = tmp_path / "file"
  path.write_text("")
  composed = calm_jax.compose(*models, 1)
  for folder in (path, path / "below", "", None, b"x", 3):
    for write in (composed.save, models[0].export_hf):
      with pytest.raises(InputError, match="folder"):
        write(folder)
  for size in (0, -1, 1.5, "5GB", True):
    with pytest.raises(InputError, match="max_shard_size"):
      models[0].export_hf(tmp_path / "new", size)


def test_what_is_not_loaded(models, tmp_path):
  composed = calm_jax.compose(*models, 1)
  composed.save(tmp_path / "c")
  for options in (
    {"anchor": 3}, {"anchor": models[0]}, {"augmenting": models[1]},
    {"augmenting": ["b"]}, {"augmenting": {"kv": "b"}}, {"dtype": np.float32},
    {"dtype": "float16"}, {"quantise": 8}, {"revision": "main"},
    {"revision": 3},
  ):  # fmt: skip
    with pytest.raises(InputError):
      calm_jax.load_composed(tmp_path / "c", **options)
  for revision in (3, b"main", "a\ud800"):
    with pytest.raises(InputError, match="revision"):
      calm_jax.load_model("org/name", revision=revision)


@pytest.mark.parametrize(
  "tokens",
  [
    3, [1, 2], [[1.0]], [["a"]], [[]], [], None, [[1], [1, 2]], [[True]],
    np.zeros((0, 3), int), np.zeros((1, 2, 3), int), [[-1]], [[99]],
  ],
)  # fmt: skip
def test_what_has_no_logits(models, tokens):
  with pytest.raises(InputError, match="token"):
    models[0].logits(tokens)


def test_what_cannot_be_looked_at(models):
  composed = calm_jax.compose(*models, 1)
  for ids, length in (
    ([], 0), ([1, 2], 3), ([1, 2], -1), ([1, 2], 1.0), ("ab", 1), ([99], 1),
    ([[1, 2]], 1), (3, 1), (None, 0),
  ):  # fmt: skip
    with pytest.raises(InputError):
      composed.cross_attention(ids, length)
  for texts in ((b"a", "b"), ("a", None), ("a\ud800", "b"), (["a"], "b")):
    with pytest.raises(InputError, match=r"prompt|completion"):
      composed.attention(*texts)
