"""The composition: what it may see, what it starts as, what it learns."""

from __future__ import annotations

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import composed

from calm_jax.composition import forward
from calm_jax.composition.connections import (
  Augmenting,
  Composition,
  Connection,
  default_connections,
  paper_count,
)
from calm_jax.composition.cross_attention import CrossAttention
from calm_jax.core.batch import Batch, plain_batch, plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.models import attention

L = 8
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, 61, (2, L)).astype(np.int32)


def scramble(tokens, after: int):
  """The same rows with every token after slot `after` replaced."""
  changed = tokens.copy()
  changed[:, after + 1 :] = (changed[:, after + 1 :] + 7) % 61
  return changed


# Which layers are joined.


@pytest.mark.parametrize(
  ("layers", "n", "expected"),
  [
    ((12, 24), None, [(4, 8), (8, 16), (12, 24)]),
    ((5, 5), None, [(5, 5)]),
    ((2, 7), None, [(2, 7)]),
    ((16, 48), None, [(4, 12), (8, 24), (12, 36), (16, 48)]),
    ((5, 5), 2, [(3, 3), (5, 5)]),
    ((3, 8), 3, [(1, 3), (2, 5), (3, 8)]),
    ((4, 4), 4, [(1, 1), (2, 2), (3, 3), (4, 4)]),
  ],
)
def test_default_connections(layers, n, expected):
  assert list(default_connections(*layers, n)) == expected


@pytest.mark.parametrize(
  ("layers", "n"),
  [((4, 4), 5), ((8, 3), 4), ((4, 4), 0), ((4, 4), -1), ((12, 2), None)],
)
def test_default_connections_that_cannot_be(layers, n):
  with pytest.raises(InputError, match="connections are impossible"):
    default_connections(*layers, n)


@pytest.mark.parametrize(
  ("connections", "message"),
  [
    ((), "'kv' has no connection"),
    (((0, 2),), "augmenting model has layers 1 to 3, not 0"),
    (((4, 2),), "augmenting model has layers 1 to 3, not 4"),
    (((3, 0),), "anchor model has layers 1 to 4, not 0"),
    (((3, 5),), "anchor model has layers 1 to 4, not 5"),
    (((2, 2), (2, 2)), "same connection twice"),
  ],
)
def test_impossible_connections(connections, message):
  with pytest.raises(InputError, match=message):
    helpers.compose(connections=connections)


def test_unknown_options():
  config, _ = helpers.model(0)
  one = (Connection(1, 1),)
  with pytest.raises(InputError, match="visibility='causel'"):
    Augmenting(config, one, visibility="causel")
  with pytest.raises(InputError, match="output_init='ones'"):
    Augmenting(config, one, output_init="ones")


# What it starts as.


@pytest.mark.parametrize("names", [("kv",), ("kv", "code")])
def test_fresh_composition_is_the_anchor_bit_for_bit(names):
  spec, params = helpers.compose(names)
  sequence = helpers.rows(
    [TOKENS[0]], [2, TOKENS[1, :4], TOKENS[1, 4:6]], length=L
  )
  fresh = helpers.fresh(spec, params)
  anchor = composed(params, Composition(spec.anchor), sequence)
  np.testing.assert_array_equal(composed(fresh, spec, sequence), anchor)
  assert not np.array_equal(composed(params, spec, sequence), anchor)


def test_output_init_normal_is_not_the_anchor():
  spec, params = helpers.compose(output_init="normal")
  fresh = helpers.fresh(spec, params)["composition"]["kv"]
  for leaves in fresh.values():
    assert np.std(leaves["output"]["kernel"]) == pytest.approx(0.02, rel=0.2)


def test_the_output_is_in_units_of_the_state():
  config = helpers.model(1)[0]
  rng = np.random.default_rng(0)
  x_BLD = rng.normal(size=(2, 5, 32)) * 10.0 ** rng.uniform(-2, 3, (2, 5, 1))
  h_BME = rng.normal(size=(2, 7, 24))
  mask_BLM = np.ones((2, 5, 7), bool)
  outputs = {}
  for scale in ("none", "state"):
    joined = Augmenting(config, (), output_init="normal", output_scale=scale)
    cross = CrossAttention(config, joined)
    args = [jnp.asarray(x, jnp.float32) for x in (x_BLD, h_BME)]
    params = cross.init(jax.random.key(3), *args, mask_BLM)
    outputs[scale] = np.asarray(cross.apply(params, *args, mask_BLM))
  size_BL1 = np.abs(x_BLD).mean(-1, keepdims=True)
  np.testing.assert_allclose(
    outputs["state"], outputs["none"] * size_BL1, rtol=1e-5
  )


def test_norms_are_optional():
  with_norm = helpers.theta_shapes(helpers.compose()[0])
  without = helpers.theta_shapes(helpers.compose(norm=False)[0])
  names = {"projection", "query", "key", "value", "output"}
  assert set(without["kv"]["layer_2_to_2"]) == names
  norms = {"projection_norm", "query_norm"}
  assert set(with_norm["kv"]["layer_2_to_2"]) == names | norms


def test_paper_count_forgets_the_output():
  spec, _ = helpers.compose(norm=False)
  D = spec.anchor.width
  count = sum(x.size for x in jax.tree.leaves(helpers.theta_shapes(spec)))
  assert paper_count(spec) == count - 2 * D * D


# What it may see.


@pytest.mark.parametrize("names", [("kv",), ("kv", "code")])
def test_no_position_reads_the_future(names):
  spec, params = helpers.compose(names)
  before = composed(params, spec, plain_sequence(TOKENS))
  for t in range(L - 1):
    sequence = plain_sequence(scramble(TOKENS, t))
    after = composed(params, spec, sequence)
    np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
    changed = (after != before).any(-1)[:, t + 1 :]
    assert changed.all(), f"nothing after {t} noticed"


def augmenting_only(params, spec, theirs, **kw):
  """Logits when only the augmenting model reads `theirs`."""
  return composed(
    params,
    spec,
    plain_sequence(TOKENS),
    augmenting={"kv": plain_sequence(theirs)},
    **kw,
  )


def moved(a, b) -> list[bool]:
  """Per position, whether any logit of any row differs."""
  return list((np.asarray(a) != np.asarray(b)).any((0, 2)))


def test_causal_is_inclusive():
  # Position t reads the augmenting model's token t itself.
  spec, params = helpers.compose()
  theirs = TOKENS.copy()
  theirs[:, 5] = (theirs[:, 5] + 1) % 61
  difference = moved(
    augmenting_only(params, spec, theirs), augmenting_only(params, spec, TOKENS)
  )
  assert difference == [False] * 5 + [True] * 3


def test_unmasked_leaks_the_future():
  spec, params = helpers.compose(visibility="unmasked")
  difference = moved(
    augmenting_only(params, spec, scramble(TOKENS, 5)),
    augmenting_only(params, spec, TOKENS),
  )
  assert difference == [True] * L


def test_encoder_sees_the_prompt_only():
  spec, params = helpers.compose(visibility="encoder")
  ends = jnp.full(TOKENS.shape, 3)
  same = augmenting_only(params, spec, TOKENS, prompt_ends=ends)
  past_prompt = augmenting_only(
    params, spec, scramble(TOKENS, 2), prompt_ends=ends
  )
  np.testing.assert_array_equal(past_prompt, same)
  theirs = scramble(TOKENS, 1)
  difference = moved(
    augmenting_only(params, spec, theirs, prompt_ends=ends), same
  )
  assert difference == [False] * 2 + [True] * 6


def test_encoder_needs_to_know_the_prompt():
  spec, params = helpers.compose(visibility="encoder")
  with pytest.raises(InputError, match="where prompts end"):
    augmenting_only(params, spec, TOKENS)


def test_a_position_that_sees_nothing_gets_exactly_nothing():
  spec, params = helpers.compose()
  sequence = plain_sequence(TOKENS)
  blind_until_3 = jnp.tile(jnp.where(jnp.arange(L) < 3, 0, L), (2, 1))
  logits = composed(params, spec, sequence, visible={"kv": blind_until_3})
  anchor = composed(params, Composition(spec.anchor), sequence)
  np.testing.assert_array_equal(logits[:, :3], anchor[:, :3])
  assert moved(logits, anchor)[3:] == [True] * 5


def test_gradient_where_nothing_is_seen_is_zero():
  spec, params = helpers.compose()
  sequence = plain_sequence(TOKENS)
  blind = {"kv": jnp.zeros(TOKENS.shape, jnp.int32)}

  @jax.jit
  def gradient(theta):
    def total(theta):
      tree = params | {"composition": theta}
      return composed(tree, spec, sequence, visible=blind).sum()

    return jax.grad(total)(theta)

  for leaf in jax.tree.leaves(gradient(params["composition"])):
    np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("kernel", ["xla", "pieces"])
@pytest.mark.parametrize("names", [("kv",), ("kv", "code")])
def test_padding_and_packing_change_no_real_position(
  names, kernel, monkeypatch
):
  monkeypatch.setattr(attention, "_PIECE", 3)
  spec, params = helpers.compose(names)
  spec = helpers.retype(spec, attention=kernel)
  a, b = TOKENS[0, :5], TOKENS[1, :3]
  alone = {
    len(x): composed(params, spec, helpers.rows([x], [x], length=L))[0]
    for x in (a, b)
  }
  # Garbage under the padding must not matter either.
  for name, (sequence, places) in helpers.layouts(a, b, L).items():
    garbage = np.where(sequence.segments == 0, 17, sequence.tokens)
    logits = composed(params, spec, sequence._replace(tokens=garbage))
    assert np.isfinite(logits).all(), name
    for (row, slot), x in places.items():
      np.testing.assert_allclose(
        logits[row, slot : slot + len(x)],
        alone[len(x)][: len(x)],
        rtol=0,
        atol=1e-5,
        err_msg=f"{name}, row {row}",
      )


def test_packed_segments_do_not_read_each_other():
  spec, params = helpers.compose()
  first, second = TOKENS[0, :4], TOKENS[1, :4]
  other = (first + 1) % 61
  sequence = helpers.rows([first, second], [other, second], length=L)
  logits = np.asarray(composed(params, spec, sequence))
  np.testing.assert_array_equal(logits[0, 4:], logits[1, 4:])
  assert (logits[0, :4] != logits[1, :4]).any(-1).all()


def test_contributions_at_one_layer_add_up():
  # Both read the same H_B, so at the last layer they are linear in W^O.
  spec, params = helpers.compose(("kv", "code"), connections=((3, 4),))
  batch = plain_batch(TOKENS)
  run = jax.jit(lambda params: forward.states(params, spec, batch)[0])

  def without(name):
    theta = dict(params["composition"])
    theta[name] = jax.tree.map(jnp.zeros_like, theta[name])
    return params | {"composition": theta}

  neither = run(
    params
    | {"composition": jax.tree.map(jnp.zeros_like, params["composition"])}
  )
  both = run(without("kv")) + run(without("code")) - neither
  np.testing.assert_allclose(run(params), both, rtol=0, atol=1e-5)


# Decoding with a cache.


@functools.partial(jax.jit, static_argnums=1)
def step(params, spec, sequence, cache, index):
  batch = Batch(sequence, {}, {})
  return forward.forward(params, spec, batch, cache=cache, index=index)


@pytest.mark.parametrize("names", [(), ("kv", "code")])
def test_cached_decoding_equals_the_full_pass(names):
  spec, params = helpers.compose(names)
  length, prompt = 12, 6
  tokens = np.random.default_rng(1).integers(0, 61, (3, length))
  parts = [[p, tokens[i, p:]] for i, p in enumerate((0, 3, 5))]
  whole = helpers.rows(*parts, length=length)
  full = composed(params, spec, whole)
  cache = forward.empty_cache(spec, 3, length)
  got = []
  for start, stop in [
    (0, prompt),
    *((t, t + 1) for t in range(prompt, length)),
  ]:
    part = jax.tree.map(lambda x: x[:, start:stop], whole)  # noqa: B023
    logits, cache = step(params, spec, part, cache, jnp.int32(start))
    got.append(logits)
  real = whole.segments > 0
  np.testing.assert_allclose(
    np.concatenate(got, axis=1)[real], full[real], rtol=0, atol=1e-5
  )


# What it learns.


def cross_entropy(theta, frozen, spec, tokens):
  """Mean over all positions, each predicting its own token."""
  logits, _ = forward.forward(
    frozen | {"composition": theta}, spec, plain_batch(tokens)
  )
  picked = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def test_gradients_equal_finite_differences(x64):
  spec, params = helpers.compose()
  both = jax.jit(jax.value_and_grad(cross_entropy), static_argnums=2)
  spec64 = helpers.retype(spec, dtype="float64")
  params64 = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  theta = params64.pop("composition")
  loss, got = both(theta, params64, spec64, TOKENS)
  assert loss.dtype == np.float64

  random, step = np.random.default_rng(2), 1e-5
  leaves, treedef = jax.tree.flatten(theta)
  for i, slope in enumerate(jax.tree.leaves(got)):
    direction = random.standard_normal(slope.shape)
    sides = []
    for sign in (1, -1):
      moved = [*leaves]
      moved[i] = leaves[i] + sign * step * direction
      tree = treedef.unflatten(moved)
      sides.append(both(tree, params64, spec64, TOKENS)[0])
    measured = (float(sides[0]) - float(sides[1])) / (2 * step)
    np.testing.assert_allclose(
      np.sum(np.asarray(slope) * direction), measured, rtol=1e-6, atol=1e-9
    )

  # The float32 path, which training runs, has the same gradients.
  theta32 = params.pop("composition")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
    both(theta32, params, spec, TOKENS)[1],
    got,
  )


# Its parts.


def test_submodels():
  spec, params = helpers.compose()
  assert forward.submodel(spec, params, "composed") == (spec, params)
  part, tree = forward.submodel(spec, params, "augmenting/kv")
  assert part == Composition(spec.augmenting[0][1].config)
  assert tree == {"anchor": params["augmenting"]["kv"]}
  for name in ("kv", "augmenting/code", "augmenting", ""):
    with pytest.raises(InputError, match="augmenting/kv"):
      forward.submodel(spec, params, name)


def test_attention_weights_show_where_heads_look():
  spec, params = helpers.compose()
  run = jax.jit(forward.attention_weights, static_argnums=1)
  found = run(params, spec, plain_batch(TOKENS))
  names = [f"{name}/{c.name}" for name, c in spec.connections()]
  assert names == ["kv/layer_2_to_2", "kv/layer_3_to_4"]
  assert len(found) == 2
  for weights in found:
    assert weights.shape == (2, 4, L, L)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert not np.triu(np.asarray(weights), 1).any()
