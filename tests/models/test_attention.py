"""TPU's kernel, interpreted here, against the plain path."""

from __future__ import annotations

import dataclasses
import functools
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention

from calm_jax import composition
from calm_jax.errors import InputError
from calm_jax.models import attention, decoder
from calm_jax.models.block import window_mask


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """The kernel as CPUs run it."""
  make = functools.partial(splash_attention.make_splash_mha, interpret=True)
  monkeypatch.setattr(splash_attention, "make_splash_mha", make)


def inputs(heads: int, keys: int, width: int):
  random = np.random.default_rng(0)
  shapes = [(2, 200, n, width) for n in (heads, keys, keys, heads)]
  q, k, v, weights = (random.standard_normal(s) for s in shapes)
  segments = np.repeat([1, 2, 0], [70, 101, 29])
  segments = np.stack([segments, np.repeat([1, 2, 3], [5, 190, 5])])
  return [jnp.asarray(x, jnp.float32) for x in (q, k, v, weights)], segments


@pytest.mark.parametrize(
  ("heads", "keys", "width", "window", "cap", "scale"),
  [(2, 1, 16, None, None, None), (2, 2, 24, 33, 5.0, 0.3)],
)
def test_splash_is_the_plain_path(heads, keys, width, window, cap, scale):
  """Grouped heads, odd widths, windows, caps, a length that needs padding."""
  (q, k, v, weights), segments = inputs(heads, keys, width)
  mask = decoder.self_attention_mask(segments, segments)
  if window is not None:
    mask = window_mask(mask, window)

  def plain(q, k, v):
    out = attention.dot_product_attention(q, k, v, mask[:, None], scale, cap)
    return (out * weights).sum(), out

  def kernel(q, k, v):
    both = attention.Segments(segments, segments, None)
    out = attention.splash(q, k, v, both, window, scale, cap)
    return (out * weights).sum(), out

  def run(function):
    step = jax.value_and_grad(function, (0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(step)(q, k, v)
    return out, *grads

  for ours, theirs in zip(run(kernel), run(plain), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def composed(attention_kernel: str):
  """A composition whose anchor has windows on all layers but one."""
  spec, params = helpers.compose(connections=((2, 4),), positions="rope")
  spec = helpers.retype(spec, attention=attention_kernel)
  anchor = dataclasses.replace(
    spec.anchor, window=40, full_layers=(1,), attention_cap=3.0
  )
  spec = dataclasses.replace(spec, anchor=anchor)
  segments = np.repeat([[1, 2, 0], [1, 1, 2]], [50, 70, 13], 1)
  starts = np.repeat([[0, 50, 120], [0, 0, 120]], [50, 70, 13], 1)
  tokens = np.random.default_rng(1).integers(0, 61, segments.shape)
  sequence = composition.Sequence(
    *map(jnp.asarray, (tokens, segments, np.arange(133) - starts))
  )

  def loss(theta):
    logits, _ = composition.forward(
      params | {"composition": theta}, spec, sequence
    )
    return (jnp.sin(logits) * (segments > 0)[..., None]).sum()

  return loss, params["composition"]


def test_a_composition_by_splash_is_the_plain_one():
  losses = []
  for kernel in ("splash", "xla"):
    loss, theta = composed(kernel)
    losses.append(jax.jit(jax.value_and_grad(loss))(theta))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    *losses,
  )


def test_splash_needs_no_mask_and_no_scores():
  def largest(kernel):
    loss, theta = composed(kernel)
    text = str(jax.make_jaxpr(jax.grad(loss))(theta))
    return "2,4,133,133]" in text or "2,133,133]" in text

  assert largest("xla")
  assert not largest("splash")


def test_what_is_chosen():
  model = helpers.model(1, dtype="bfloat16")[0]
  single = dataclasses.replace(model, dtype="float32")
  capped = dataclasses.replace(model, attention_cap=50.0)
  wide = dataclasses.replace(model, head_dim=256)
  cpu, tpu = (types.SimpleNamespace(platform=p) for p in ("cpu", "tpu"))
  old, new = (
    types.SimpleNamespace(platform="gpu", compute_capability=c)
    for c in ("8.0", "9.0")
  )
  assert attention.choose("auto", cpu, model) == "xla"
  assert attention.choose("auto", tpu, single) == "splash"
  for device, config, kernel in (
    (old, model, "cudnn"), (old, single, "xla"), (old, capped, "xla"),
    (old, wide, "xla"), (new, wide, "cudnn"),
  ):  # fmt: skip
    assert attention.choose("auto", device, config) == kernel
  for asked, device, config, reason in (
    ("splash", cpu, model, "TPUs only"),
    ("cudnn", tpu, model, "GPUs only"),
    ("cudnn", new, single, "not float32"),
    ("cudnn", new, capped, "soft cap"),
    ("cudnn", old, wide, "not of 256"),
    ("flash", cpu, model, "none of"),
  ):
    with pytest.raises(InputError, match=reason):
      attention.choose(asked, device, config)
