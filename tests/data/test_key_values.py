"""Tests of calm_jax.data.key_values."""

import numpy as np
import pytest

from calm_jax.core.errors import InputError
from calm_jax.data.key_value_text import make_examples
from calm_jax.data.key_values import (
  ExpressionOptions,
  evaluate,
  is_eval,
  make_dictionary,
  num_terms,
  sample_expressions,
)


def rng(seed=0):
  return np.random.default_rng(seed)


def as_set(expressions):
  return set(map(tuple, expressions.tolist()))


def draw(kv, n=2000, seed=0, **changes):
  options = ExpressionOptions(**{"min_terms": 2, "max_terms": 3} | changes)
  return sample_expressions(rng(seed), kv, n, options)


@pytest.mark.parametrize("num_keys", [1, 20, 25_000])
def test_key_values(num_keys):
  kv = make_dictionary(num_keys, 0.2, seed=3)
  assert len(set(kv.keys)) == len(kv.keys) == num_keys
  for key in kv.keys:
    assert 2 <= len(key) <= 6
    assert key.isascii() and key.isalpha() and key.islower()
  assert sorted(kv.values.tolist()) == list(range(1, num_keys + 1))
  assert kv.held_in.sum() == round(0.2 * num_keys)


def test_key_values_follow_the_seed():
  one, same, other = (make_dictionary(50, 0.2, seed=s) for s in (1, 1, 2))
  assert one.keys == same.keys and one.fingerprint == same.fingerprint
  np.testing.assert_array_equal(one.values, same.values)
  np.testing.assert_array_equal(one.held_in, same.held_in)
  assert one.keys != other.keys and one.fingerprint != other.fingerprint


@pytest.mark.parametrize("size, fraction", [(0, 0.2), (10**7, 0.2), (9, 1.1)])
def test_impossible_dictionary(size, fraction):
  with pytest.raises(InputError):
    make_dictionary(size, fraction, seed=0)


def test_parts_are_disjoint_for_any_seed():
  kv = make_dictionary(20, 0.5, seed=0)
  held_back = as_set(draw(kv, 300, part="eval"))
  assert len(held_back) == 300
  for seed in range(3):
    assert not held_back & as_set(draw(kv, 20_000, seed=seed))
  # The reserved part does not depend on the widest expression of the draw.
  wide = draw(kv, 5000, max_terms=6, part="any")
  short = wide[num_terms(wide) == 2]
  assert is_eval(short).any()
  np.testing.assert_array_equal(is_eval(short), is_eval(short[:, :3]))


def test_one_in_sixteen_is_reserved():
  kv = make_dictionary(1000, 0.2, seed=0)
  share = is_eval(draw(kv, 100_000, part="any")).mean()
  assert abs(share - 1 / 16) < 0.003


def test_single_keys_are_never_reserved():
  kv = make_dictionary(50, 0.2, seed=0)
  drawn = draw(kv, min_terms=1, max_terms=1)
  assert drawn.shape == (2000, 1)
  assert set(drawn[:, 0]) == set(range(50))
  with pytest.raises(InputError, match="never held back"):
    draw(kv, 1, min_terms=1, part="eval")


def test_number_of_terms_is_uniform():
  kv = make_dictionary(50, 0.2, seed=0)
  drawn = draw(kv, 30_000, min_terms=3, max_terms=6)
  counts = np.bincount(num_terms(drawn), minlength=7)[3:]
  assert (abs(counts / 30_000 - 0.25) < 0.015).all()
  for j in range(6):
    np.testing.assert_array_equal(drawn[:, 2 * j] < 0, num_terms(drawn) <= j)
  np.testing.assert_array_equal(drawn[:, 2::2] < 0, drawn[:, 1::2] < 0)


@pytest.mark.parametrize("part", ["train", "eval", "any"])
def test_key_subsets(part):
  kv = make_dictionary(100, 0.3, seed=0)

  def held_in(keys):
    drawn = draw(kv, 400, max_terms=4, keys=keys, part=part)
    key_ids = drawn[:, ::2]
    inside = kv.held_in[key_ids] & (key_ids >= 0)
    return inside.sum(axis=1), num_terms(drawn)

  count, terms = held_in("held_in")
  assert (count == terms).all()
  count, _ = held_in("held_out")
  assert (count == 0).all()
  count, terms = held_in("mixed")
  assert ((count > 0) & (count < terms)).all()


def test_levelled_keys_have_short_values_more_often():
  kv = make_dictionary(250, 0.3, seed=0)
  drawn = draw(kv, 4000, max_terms=3, levelling=5, part="any")
  key_ids = drawn[:, ::2][drawn[:, ::2] >= 0]
  lengths = np.char.str_len(kv.values[key_ids].astype(str))
  # A key of one digit weighs 25, of two 5, of three 1.
  shares = np.bincount(lengths, minlength=4)[1:] / len(key_ids)
  np.testing.assert_allclose(shares * 826, [225, 450, 151], rtol=0.1)
  assert len(np.unique(key_ids)) > 200


def test_operators_are_those_asked_for():
  kv = make_dictionary(20, 0.2, seed=0)
  drawn = draw(kv, 500, operators="-*")
  assert set(drawn[:, 1::2].ravel().tolist()) == {-1, 1, 2}


@pytest.mark.parametrize("part", ["train", "eval"])
def test_products_are_limited(part):
  kv = make_dictionary(1000, 0.2, seed=0)
  drawn = draw(kv, 3000, min_terms=3, max_terms=6, max_products=1, part=part)
  products = drawn[:, 1::2] == 2
  assert set(products.sum(axis=1)) == {0, 1}
  # As often as before there is at least one: 1 - (2/3)^n of n operators.
  for terms in range(3, 7):
    of_these = products[num_terms(drawn) == terms]
    share = of_these.any(axis=1).mean()
    assert abs(share - (1 - (2 / 3) ** (terms - 1))) < 0.07
    # It may stand anywhere.
    places = of_these[:, : terms - 1].sum(axis=0) / of_these.sum()
    assert (abs(places - 1 / (terms - 1)) < 0.08).all()
  # Sums and differences took the others' places in equal parts.
  plus, minus = (int((drawn[:, 1::2] == code).sum()) for code in (0, 1))
  assert abs(plus / (plus + minus) - 0.5) < 0.03
  assert not (draw(kv, max_terms=6, max_products=0)[:, 1::2] == 2).any()


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"operators": "*", "max_products": 1}, "no operator but"),
    ({"operators": "+/"}, "operators"),
    ({"operators": "++"}, "repeated"),
    ({"keys": "some"}, "held_in.*held_out.*mixed"),
    ({"part": "test"}, "part='test' is none of"),
    ({"min_terms": 4}, "min_terms"),
    ({"min_terms": 1, "keys": "mixed"}, "at least 2"),
    ({"part": "eval", "n": 10_000}, "only .* reserved for evaluation"),
  ],
)
def test_impossible_samples(changes, message):
  kv = make_dictionary(5, 0.5, seed=0)
  with pytest.raises(InputError, match=message):
    draw(kv, **changes)


def test_no_keys_of_the_kind():
  kv = make_dictionary(5, 1.0, seed=0)
  with pytest.raises(InputError, match="0 held out"):
    draw(kv, keys="held_out")


def test_a_space_that_is_all_reserved():
  kv = make_dictionary(1, 1.0, seed=0)
  reserved = [
    (terms, operator)
    for terms in range(2, 20)
    for operator in "+-*"
    if is_eval(
      draw(
        kv, 1, min_terms=terms, max_terms=terms, operators=operator, part="any"
      )
    )
  ]
  terms, operator = reserved[0]
  with pytest.raises(InputError, match="all expressions"):
    draw(kv, 3, min_terms=terms, max_terms=terms, operators=operator)


@pytest.mark.parametrize("num_keys, max_terms", [(30, 3), (25_000, 6)])
def test_results_equal_python(num_keys, max_terms):
  kv = make_dictionary(num_keys, 0.2, seed=1)
  drawn = draw(kv, 3000, min_terms=1, max_terms=max_terms)
  results = evaluate(kv, drawn)
  texts = [e.completion for e in make_examples(kv, drawn, "kv_subs")]
  assert [int(r) for r in results] == [eval(text) for text in texts]
  assert (results < 0).any()
  assert results.dtype == (np.int64 if num_keys == 30 else object)


def test_the_largest_result():
  kv = make_dictionary(25_000, 0.2, seed=1)
  top = int(np.argmax(kv.values))
  product = np.full((2, 11), top)
  product[:, 1::2] = [[2] * 5, [1, 2, 2, 2, 2]]
  assert list(evaluate(kv, product)) == [25_000**6, 25_000 - 25_000**5]
