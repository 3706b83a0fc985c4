"""Arguments of what continues and scores texts, checked where they enter."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
from test_language_model import spell

import calm_jax
from calm_jax import InputError
from calm_jax.models.hf import export


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("model")
  export.save_params(folder, *helpers.model(0, vocab_size=14))
  spell(folder, "abcdefghij")
  return calm_jax.load_model(folder)


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ({"max_new_tokens": 4.0}, "max_new_tokens=4.0"),
    ({"max_new_tokens": "4"}, "max_new_tokens='4'"),
    ({"max_new_tokens": None}, "max_new_tokens=None"),
    ({"max_new_tokens": 10**9}, "length limit"),
    ({"batch_size": 0}, "batch_size=0"), ({"batch_size": 2.0}, "batch_size=2"),
    ({"seed": -1}, "seed=-1"), ({"seed": 2**32}, "seed=4294967296"),
    ({"seed": 1.0}, "seed=1.0"), ({"seed": "1"}, "1 seeds for 2 prompts"),
    ({"seed": [1]}, "1 seeds for 2"), ({"seed": [1, -2]}, "prompt 1=-2"),
    ({"seed": 2**32 - 1}, "prompt 1=4294967296"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_p": 2}, "top_p=2"), ({"top_k": -1}, "top_k=-1"),
    ({"stop": 3}, "stop is a int"), ({"stop": ["a", b"b"]}, "stop"),
    ({"stop": "a\ud800"}, "stop"), ({"stop": None}, "stop is a NoneType"),
    ({"stop": ""}, "stop='': a text of no"), ({"stop": ("a", "")}, "no char"),
    ({"stop": [["a"]]}, r"stop\[0\] is a list"),
    ({"prompts": b"ab"}, "prompts is a bytes"), ({"prompts": 3}, "prompts"),
    ({"prompts": ["a", None]}, r"prompts\[1\] is a NoneType"),
    ({"prompts": ["a", "\udce9"]}, r"prompts\[1\] is not text"),
    ({"prompts": {"prompt": "a"}}, "prompts is a dict"),
  ],
)  # fmt: skip
def test_what_cannot_be_generated(model, options, said):
  with pytest.raises(InputError, match=said):
    model.generate(**{"prompts": ["ab", "c"], "max_new_tokens": 2} | options)


def test_a_stream_raises_at_once(model):
  for options in (
    {"prompt": ["ab"]}, {"prompt": "a\ud800"}, {"max_new_tokens": -2},
    {"seed": [1]}, {"temperature": -1}, {"stop": None},
    {"stop": ["a", ""]},
  ):  # fmt: skip
    with pytest.raises(InputError):
      model.stream(**{"prompt": "ab", "max_new_tokens": 2} | options)


def test_what_cannot_be_scored(model):
  with pytest.raises(InputError, match="prompts is a str"):
    model.score("abcd", "efgh")
  with pytest.raises(InputError, match="completions is a str"):
    model.score(["a"], "b")
  with pytest.raises(InputError, match=r"completions\[1\] is a int"):
    model.score(["a", "b"], ["c", 4])
  with pytest.raises(InputError, match="batch_size=-1"):
    model.score(["a"], ["b"], batch_size=-1)
  with pytest.raises(InputError, match="2 prompts and 1 completions"):
    model.score(["a", "b"], ["c"])


def test_what_no_tokenizer_encodes(model):
  for text in (b"ab", None, ["ab"], "a\ud800"):
    with pytest.raises(InputError, match="a text is"):
      model.tokenizer.encode(text)


def test_numbers_and_lists_of_others(model):
  want = model.generate(["ab", "c"], 3, seed=5, temperature=2.0)
  numpy = {"seed": np.int64(5), "temperature": np.float32(2)}
  prompts = np.array(["ab", "c"])
  assert model.generate(prompts, np.int32(3), **numpy) == want
  seeds = np.array([5, 6])
  assert model.generate(("ab", "c"), 3, seed=seeds, temperature=2) == want
  assert len(model.generate("ab", 3, seed=2**32 - 1, temperature=2)) <= 3
  assert model.generate([], 3) == []
  assert model.generate("ab", 0) == ""
  assert model.score(np.array(["a"]), ("b",)) == model.score(["a"], ["b"])
