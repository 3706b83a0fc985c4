"""Checks of what a user gives: types, ranges, texts and paths."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from calm_jax.core import errors
from calm_jax.core.errors import InputError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_whole_numbers(value):
  number = errors.check_int("steps", value, 1, 3)
  assert type(number) is int
  assert number == 3


@pytest.mark.parametrize(
  "value", [0, 4, 3.0, np.float32(3), "3", None, True, [3], 10**30, b"3"]
)
def test_no_such_whole_numbers(value):
  with pytest.raises(InputError, match=r"steps=.* whole number, 1 to 3"):
    errors.check_int("steps", value, 1, 3)


def test_seeds_have_32_bits():
  assert errors.check_seed("seed", np.uint32(2**32 - 1)) == 2**32 - 1
  for seed in (-1, 2**32, 2**40, 1.5, "1"):
    with pytest.raises(InputError, match=r"seed=.* 0 to 4294967295"):
      errors.check_seed("seed", seed)


@pytest.mark.parametrize("value", [1, 0.25, np.float16(1), np.array(0.5)])
def test_numbers(value):
  number = errors.check_float("p", value, 0, 1, excluded=0)
  assert type(number) is float
  assert number == value


@pytest.mark.parametrize(
  "value", [0, 1.5, float("nan"), -1, "0.5", None, False, 1j, [0.5], 10**400]
)
def test_no_such_numbers(value):
  with pytest.raises(InputError, match=r"p=.* from 0 to 1, but not 0"):
    errors.check_float("p", value, 0, 1, excluded=0)


def test_texts():
  texts = ["a", "", "\x00", "\U0001f600", np.str_("b")]
  assert errors.check_texts("prompts", texts) == texts
  assert errors.check_texts("prompts", (text for text in texts)) == texts
  assert errors.check_texts("prompts", np.array(["a", "b"])) == ["a", "b"]


@pytest.mark.parametrize(
  ("texts", "said"),
  [
    ("abc", "prompts is a str, where a list"), (b"abc", "prompts is a bytes"),
    (3, "prompts is a int"), (None, "prompts is a NoneType"),
    ({"a": 1}, "prompts is a dict"), ({"a"}, "prompts is a set"),
    (["a", 3], r"prompts\[1\] is a int, where a string"),
    (["a", None], r"prompts\[1\] is a NoneType"), ([b"a"], r"\[0\] is a bytes"),
    (["a", "b\ud800"], r"prompts\[1\] is not text that UTF-8 can hold"),
  ],
)  # fmt: skip
def test_no_texts(texts, said):
  with pytest.raises(InputError, match=said):
    errors.check_texts("prompts", texts)


def test_paths():
  assert errors.check_path("out", "a/b") == "a/b"
  assert errors.check_path("out", pathlib.Path("a", "b")) == "a/b"
  for value in ("", None, 3, b"a", ["a"], "a\udce9"):
    with pytest.raises(InputError, match="out"):
      errors.check_path("out", value)
