"""Augmenting models added, dropped and joined (§3.2)."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calm_jax
from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Composition
from calm_jax.core import trees
from calm_jax.core.batch import plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.models import decoder, masks
from calm_jax.text import tokenizer

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 7))


def single(seed: int, **changes) -> calm_jax.LanguageModel:
  config, params = helpers.model(seed, **changes)
  return calm_jax.LanguageModel(
    Composition(config), {"anchor": params}, origin=f"m{seed}"
  )


ANCHOR = single(1)
KV = single(2, width=24, num_layers=3, num_heads=3, num_kv_heads=1)
CODE = single(3, width=16, num_layers=2)


def trained(name, model, connections, anchor=ANCHOR, **options):
  """A composition with a random Θ_C."""
  made = calm_jax.compose(anchor, {name: model}, connections, **options)
  theta = helpers.random_params(made.params["composition"], len(name))
  return dataclasses.replace(made, params=made.params | {"composition": theta})


@pytest.fixture(scope="module")
def parts():
  a = trained("kv", KV, [(2, 2), (3, 4)])
  b = trained("code", CODE, [(1, 2), (2, 3)], norm=False)
  return SimpleNamespace(a=a, b=b, joined=calm_jax.join_compositions([a, b]))


def assert_same_arrays(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert all(
    x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_joined_is_the_parts(parts):
  assert (
    parts.joined.spec.augmenting
    == parts.a.spec.augmenting + parts.b.spec.augmenting
  )
  assert_same_arrays(parts.joined.params["anchor"], ANCHOR.params["anchor"])
  for part, name in ((parts.a, "kv"), (parts.b, "code")):
    for kind in ("augmenting", "composition"):
      assert_same_arrays(
        parts.joined.params[kind][name], part.params[kind][name]
      )
  assert parts.joined.num_composition_params == (
    parts.a.num_composition_params + parts.b.num_composition_params
  )


def hidden(model: calm_jax.LanguageModel, layers: int):
  """Hidden states of a single model after so many layers."""
  config, params = model.spec.anchor, model.params["anchor"]
  sequence = plain_sequence(jnp.asarray(TOKENS))
  mask = masks.self_attention_mask(sequence.segments, sequence.segments)
  context = masks.make_context(config, sequence.positions, mask)
  x = decoder.embed(params, config, sequence.tokens, sequence.positions)
  return decoder.run_layers(params, config, x, context, 0, layers)[0], context


def test_contributions_are_summed_from_one_hidden_state(parts):
  config, params = ANCHOR.spec.anchor, ANCHOR.params["anchor"]
  causal = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (2, 7, 7))

  def given(part, model, name, pair, x):
    joined = dict(part.spec.augmenting)[name]
    cross = cross_attention.CrossAttention(config, joined)
    theta = part.params["composition"][name]["layer_{}_to_{}".format(*pair)]
    return cross.apply({"params": theta}, x, hidden(model, pair[0])[0], causal)

  @jax.jit
  def spelled_out():
    # At layer 2 both arrive, from the same H_B2.
    x, context = hidden(ANCHOR, 2)
    first = given(parts.a, KV, "kv", (2, 2), x)
    x = x + (first + given(parts.b, CODE, "code", (1, 2), x))
    x, _ = decoder.run_layers(params, config, x, context, 2, 3)
    x = x + given(parts.b, CODE, "code", (2, 3), x)
    x, _ = decoder.run_layers(params, config, x, context, 3, 4)
    x = x + given(parts.a, KV, "kv", (3, 4), x)
    return decoder.logits(params, config, x)

  want = spelled_out()
  np.testing.assert_allclose(parts.joined.logits(TOKENS), want, atol=1e-4)
  for part in (parts.a, parts.b):
    assert np.abs(part.logits(TOKENS) - want).max() > 0.1


def test_dropping_undoes_joining(parts):
  for name, rest in (("code", parts.a), ("kv", parts.b)):
    left = parts.joined.drop(name)
    assert left.spec == rest.spec
    assert_same_arrays(left.params, rest.params)
    np.testing.assert_array_equal(left.logits(TOKENS), rest.logits(TOKENS))
  alone = parts.a.drop("kv")
  assert not alone.is_composed
  assert_same_arrays(alone.params, ANCHOR.params)
  np.testing.assert_array_equal(alone.logits(TOKENS), ANCHOR.logits(TOKENS))
  with pytest.raises(InputError, match=r"'x' to drop; there are \['kv', 'co"):
    parts.joined.drop("x")


def test_what_is_added_is_fresh_and_changes_nothing_yet(parts):
  more = parts.a.add("code", CODE, [(1, 2)], norm=False, seed=5)
  assert [name for name, _ in more.spec.augmenting] == ["kv", "code"]
  assert not dict(more.spec.augmenting)["code"].norm
  assert dict(more.spec.augmenting)["kv"].norm
  for kind in ("augmenting", "composition"):
    assert_same_arrays(more.params[kind]["kv"], parts.a.params[kind]["kv"])
  # W^O of what is new is zero, so the old composition is what one hears.
  np.testing.assert_array_equal(more.logits(TOKENS), parts.a.logits(TOKENS))
  first = ANCHOR.add("kv", KV, [(2, 2)])
  assert first.spec == calm_jax.compose(ANCHOR, {"kv": KV}, [(2, 2)]).spec
  with pytest.raises(InputError, match=r"named \['kv'\]"):
    parts.a.add("kv", CODE)
  with pytest.raises(InputError, match="single models"):
    parts.a.add("more", parts.b)


def test_only_the_new_one_is_trained(parts):
  more = parts.a.add("code", CODE, [(1, 2), (2, 4)])
  chosen = trees.flatten(trees.mask(more.params, ("composition/code/.*",)))
  new = {
    f"composition/code/{name}"
    for name in trees.flatten(more.params["composition"]["code"])
  }
  assert {name for name, is_chosen in chosen.items() if is_chosen} == new
  assert new


def test_parts(parts):
  assert_same_arrays(parts.joined.part("anchor").params, ANCHOR.params)
  code = parts.joined.part("augmenting/code")
  assert_same_arrays(code.params, CODE.params)
  assert code.spec == CODE.spec
  assert parts.joined.part("composed") is parts.joined
  with pytest.raises(InputError, match="no model 'code'"):
    parts.joined.part("code")


def test_anchors_that_spell_differently(parts, tmp_path):
  both = [
    dataclasses.replace(part, tokenizer=tokenizer.train_sentencepiece(
      [text], tmp_path / text, vocab_size=14
    ))
    for part, text in ((parts.a, "abcdefghij"), (parts.b, "klmnopqrst"))
  ]  # fmt: skip
  with pytest.raises(InputError, match="anchors with different tokenizers"):
    calm_jax.join_compositions(both)


def test_what_cannot_be_joined(parts):
  with pytest.raises(InputError, match="only compositions"):
    calm_jax.join_compositions([parts.a, ANCHOR])
  with pytest.raises(InputError, match="at least one"):
    calm_jax.join_compositions([])
  with pytest.raises(InputError, match=r"augmenting models named \['kv'\]"):
    calm_jax.join_compositions([parts.joined, parts.a])
  equal = jax.tree.map(jnp.copy, ANCHOR.params)
  same = dataclasses.replace(ANCHOR, params=equal)
  other = trained("code", CODE, 1, same)
  assert calm_jax.join_compositions([parts.a, other]).is_composed
  changed = trees.flatten(equal)
  changed["anchor/final_norm/scale"] += 1
  unlike = dataclasses.replace(ANCHOR, params=trees.unflatten(changed))
  with pytest.raises(InputError, match="anchors with different weights"):
    calm_jax.join_compositions([parts.a, trained("code", CODE, 1, unlike)])
  with pytest.raises(InputError, match="different anchors"):
    calm_jax.join_compositions(
      [parts.a, trained("code", CODE, 1, single(1, width=48))]
    )
