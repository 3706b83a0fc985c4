"""Kernels against the plain path: TPU's, interpreted here, and cuDNN's.

cuDNN runs nowhere here. What is asked of it is computed by JAX's plain path;
and programs are lowered for CUDA, which is when JAX checks their shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu import splash_attention

from calm_jax.composition import cross_attention, forward
from calm_jax.core.batch import Batch, Sequence
from calm_jax.core.errors import InputError
from calm_jax.models import attention, masks
from calm_jax.models.config import ModelConfig
from calm_jax.models.masks import window_mask


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """The kernel as CPUs run it."""
  make = functools.partial(splash_attention.make_splash_mha, interpret=True)
  monkeypatch.setattr(splash_attention, "make_splash_mha", make)


@pytest.fixture
def plain_cudnn(monkeypatch):
  """JAX's plain path wherever cuDNN is asked; empty rows are NaN."""
  plain = jax.nn.dot_product_attention

  def stand_in(
    q_BLNH, k_BSKH, v_BSKH, *, scale, implementation, mask=None, **how
  ):
    assert implementation == "cudnn"
    assert q_BLNH.shape[1] % 128 == k_BSKH.shape[1] % 128 == 0
    out_BLNH = plain(
      q_BLNH, k_BSKH, v_BSKH, mask=mask, scale=scale, implementation="xla",
      **how,
    )  # fmt: skip
    if mask is None:
      return out_BLNH
    assert mask.shape[2:] == (q_BLNH.shape[1], k_BSKH.shape[1])
    sees_BLN1 = mask.any(-1).swapaxes(1, 2)[..., None]
    return jnp.where(sees_BLN1, out_BLNH, jnp.nan)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


@pytest.fixture
def hopper(monkeypatch):
  """What JAX asks of the machine for cuDNN, answered as by an H100."""
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
  monkeypatch.setattr(
    cudnn, "check_compute_capability", lambda least: float(least) <= 9
  )
  monkeypatch.setattr(
    cudnn, "is_cuda_compute_capability_equal", lambda one: one == "9.0"
  )


def for_cuda(function, *args) -> str:
  traced = jax.jit(function).trace(*args)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def attend(q_BLNH, k_BSKH, v_BSKH, mask, **how):
  keys_values = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  return attention.attend(q_BLNH, [(*keys_values, mask)], **how)


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
  mask = masks.self_attention_mask(segments, segments)
  if window is not None:
    mask = window_mask(mask, window)

  def plain(q, k, v):
    out = attend(q, k, v, mask[:, None], scale=scale, cap=cap)
    return (out * weights).sum(), out

  def kernel(q, k, v):
    both = attention.SegmentMask(segments, segments, None)
    out = attend(
      q, k, v, both, window=window, scale=scale, cap=cap, kernel="splash"
    )
    return (out * weights).sum(), out

  def run(function):
    step = jax.value_and_grad(function, (0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(step)(q, k, v)
    return out, *grads

  for ours, theirs in zip(run(kernel), run(plain), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("by_segments", [True, False])
@pytest.mark.parametrize(
  ("heads", "keys", "window", "cap"),
  [(3, 1, None, None), (6, 2, 300, 5.0), (2, 2, 40, None), (1, 1, None, 50.0)],
)
def test_pieces_are_the_plain_path(heads, keys, window, cap, by_segments):
  """Of packed rows with padding; the last of three pieces is shorter."""
  random = np.random.default_rng(0)
  shapes = [(2, 700, n, 8) for n in (heads, keys, keys, heads)]
  q, k, v, weights = (
    jnp.asarray(random.standard_normal(s), jnp.float32) for s in shapes
  )
  q *= 3  # The caps bend some scores.
  rows = [
    np.repeat([1, 2, 3, 0], n) for n in ([90, 401, 9, 200], [1, 0, 699, 0])
  ]
  segments = np.stack(rows)
  mask = masks.self_attention_mask(segments, segments)
  if window is not None:
    mask = window_mask(mask, window)
  mask = mask[:, None]
  weights *= (segments > 0)[..., None, None]

  def run(mask, **how):
    def loss(q, k, v):
      out = attend(q, k, v, mask, scale=0.3, cap=cap, **how)
      return (out * weights).sum(), out * (weights != 0)

    step = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(step)(q, k, v)
    return out, *grads

  read = (
    attention.SegmentMask(segments, segments, None) if by_segments else mask
  )
  pieces = run(read, kernel="pieces", window=window)
  for ours, theirs in zip(pieces, run(mask), strict=True):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-6)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_pieces_keep_no_scores(remat, monkeypatch):
  """No piece keeps them either, whatever else the backward pass finds."""
  monkeypatch.setattr(attention, "_PIECE", 50)
  # Keys of the three pieces, with and without a window of 40.
  keys = {50, 100, 133, 89, 72}

  def keeps_scores(kernel):
    loss, theta = composed(kernel, at=2, cap=50.0, remat=remat)
    shapes = [kept.shape for kept, _ in saved_residuals(loss, theta)]
    return any(len(s) > 3 and s[-1] in keys for s in shapes)

  assert keeps_scores("xla")
  assert not keeps_scores("pieces")


def test_a_composition_by_pieces_is_the_plain_one(monkeypatch):
  monkeypatch.setattr(attention, "_PIECE", 50)
  losses = []
  for kernel in ("pieces", "xla"):
    loss, theta = composed(kernel, at=2)
    losses.append(jax.jit(jax.value_and_grad(loss))(theta))
  for a, b in zip(*map(jax.tree.leaves, losses), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6 * abs(b).max())


def both(length: int, heads: int, keys: int, width: int, dtype: str):
  """What "cudnn" and the plain path make of packed rows and a window."""
  (q, k, v, weights), segments = inputs(heads, keys, width)
  q, k, v = (x[:, :length].astype(dtype) for x in (q, k, v))
  weights, segments = weights[:, :length], segments[:, :length]
  mask = masks.self_attention_mask(segments, segments)
  mask = window_mask(mask, 33)[:, None]
  if length > 1:  # A query that sees nothing disturbs no other.
    mask, weights = mask.at[0, :, 5].set(False), weights.at[0, 5].set(0)
  sees = mask.any(-1).swapaxes(1, 2)[..., None]

  def run(kernel):
    def loss(q, k, v):
      out = attend(q, k, v, mask, scale=0.3, kernel=kernel)
      # What it gets is finite.
      return (out * weights).sum(), jnp.where(sees, out, 0 * out)

    step = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(step)(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *grads)]

  return zip(run("cudnn"), run("xla"), strict=True)


LENGTHS = pytest.mark.parametrize(
  ("length", "heads", "keys"), [(1, 3, 1), (127, 4, 2), (200, 2, 2)]
)


@LENGTHS
def test_cudnn_of_any_length_is_the_plain_path(
  length, heads, keys, plain_cudnn
):
  for ours, theirs in both(length, heads, keys, 8, "float32"):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def unpacked(
  length: int, heads: int, keys: int, width: int, dtype: str, window
):
  """What "cudnn" and the plain path make of one segment a row."""
  (q, k, v, weights), _ = inputs(heads, keys, width)
  q, k, v = (x[:, :length].astype(dtype) for x in (q, k, v))
  real = np.arange(length) < np.array([[length], [-(-length * 2 // 3)]])
  segments = real.astype(np.int32)
  weights = weights[:, :length] * real[..., None, None]
  mask = masks.self_attention_mask(segments, segments)
  if window is not None:
    mask = window_mask(mask, window)
  by_segments = attention.SegmentMask(segments, segments, None)

  def run(mask, **how):
    def loss(q, k, v):
      out = attend(q, k, v, mask, scale=0.3, **how)
      # What padding gets is finite, and has no part in gradients.
      return (out * weights).sum(), jnp.where(weights == 0, 0 * out, out)

    step = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(step)(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *grads)]

  kernel = run(by_segments, kernel="cudnn", window=window)
  return zip(kernel, run(mask[:, None]), strict=True)


WINDOWS = pytest.mark.parametrize("window", [None, 33])


@LENGTHS
@WINDOWS
def test_cudnn_of_unpacked_rows_is_the_plain_path(
  length, heads, keys, window, plain_cudnn
):
  for ours, theirs in unpacked(length, heads, keys, 8, "float32", window):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def skip_without_cudnn():
  device = jax.devices()[0]
  model = helpers.model(1, dtype="bfloat16", head_dim=64)[0]
  if attention.choose("auto", device, model) != "cudnn":
    pytest.skip(f"cuDNN's attention does not run on {device.device_kind}")


def close_in_half(ours, theirs):
  # The gradient of a softmax over a single key is zero but for rounding.
  atol = 0.03 * max(1, np.abs(theirs).max())
  np.testing.assert_allclose(ours, theirs, atol=atol)


@LENGTHS
def test_cudnn_itself_is_the_plain_path(length, heads, keys):
  skip_without_cudnn()
  for ours, theirs in both(length, heads, keys, 64, "bfloat16"):
    close_in_half(ours, theirs)


@LENGTHS
@WINDOWS
def test_cudnn_itself_of_unpacked_rows_is_the_plain_path(
  length, heads, keys, window
):
  skip_without_cudnn()
  for ours, theirs in unpacked(length, heads, keys, 64, "bfloat16", window):
    close_in_half(ours, theirs)


@pytest.mark.parametrize(
  ("dtype", "length", "heads", "keys", "width"),
  [
    ("bfloat16", 1, 3, 1, 64), ("bfloat16", 129, 4, 2, 256),
    ("float16", 256, 2, 2, 72),
  ],
)  # fmt: skip
def test_jax_lets_cudnn_have_any_length(
  dtype, length, heads, keys, width, hopper
):
  """Odd lengths too, of which without padding it refuses the gradient."""
  q = jnp.zeros((2, length, heads, width), dtype)
  k = jnp.zeros((2, length, keys, width), dtype)
  mask = jnp.ones((2, 1, length, length), bool)

  def out(q, k, v):
    return attend(q, k, v, mask, kernel="cudnn")

  def loss(*qkv):
    return out(*qkv).astype(jnp.float32).sum()

  whole = -(-length // 128) * 128
  text = for_cuda(out, q, k, k)
  assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == 1
  assert f"tensor<2x{whole}x{keys}x{width}x" in text
  text = for_cuda(jax.grad(loss, (0, 1, 2)), q, k, k)
  assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == 1
  assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
  if length % 2:
    with pytest.raises(NotImplementedError, match="sequence length"):
      jax.grad(
        lambda q: jax.nn.dot_product_attention(
          q, k, k, mask=mask, implementation="cudnn"
        ).astype(jnp.float32).sum()
      )(q)  # fmt: skip


def composed(attention_kernel: str, at=4, cap: float | None = 3.0, **changes):
  """A composition whose anchor has windows on all layers but one.

  Rows are packed, unless `packed=False` is among the changes.
  """
  spec, params = helpers.compose(connections=((2, at),), positions="rope")
  spec = helpers.retype(spec, attention=attention_kernel, **changes)
  anchor = dataclasses.replace(
    spec.anchor, window=40, full_layers=(1,), attention_cap=cap
  )
  spec = dataclasses.replace(spec, anchor=anchor)
  segments = np.repeat([[1, 2, 0], [1, 1, 2]], [50, 70, 13], 1)
  starts = np.repeat([[0, 50, 120], [0, 0, 120]], [50, 70, 13], 1)
  if not changes.get("packed", True):
    segments = np.repeat([[1, 1, 0], [1, 0, 0]], [50, 70, 13], 1)
    starts = np.zeros_like(segments)
  tokens = np.random.default_rng(1).integers(0, 61, segments.shape)
  sequence = Sequence(
    *map(jnp.asarray, (tokens, segments, np.arange(133) - starts))
  )

  def loss(theta):
    batch = Batch(sequence, {}, {})
    logits, _ = forward.forward(params | {"composition": theta}, spec, batch)
    return (jnp.sin(logits) * (segments > 0)[..., None]).sum()

  return loss, params["composition"]


def test_a_composition_by_splash_is_the_plain_one():
  losses = []
  for kernel in ("splash", "xla"):
    loss, theta = composed(kernel)
    losses.append(jax.jit(jax.value_and_grad(loss))(theta))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *losses
  )


def test_splash_needs_no_mask_and_no_scores():
  def largest(kernel):
    loss, theta = composed(kernel)
    text = str(jax.make_jaxpr(jax.grad(loss))(theta))
    return "2,4,133,133]" in text or "2,133,133]" in text

  assert largest("xla")
  assert not largest("splash")


def test_a_composition_by_cudnn_keeps_no_scores_of_its_models(hopper):
  def has(kernel, *shapes):
    loss, theta = composed(kernel, at=2, cap=None, dtype="bfloat16")
    text = for_cuda(jax.grad(loss), theta)
    called = "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    return called, *(f"tensor<{shape}x" in text for shape in shapes)

  # Of the anchor, and of m_A, whose heads are grouped.
  scores = "2x2x266x133", "2x1x399x133"
  assert has("xla", *scores) == (False, True, True)
  assert has("cudnn", *scores) == (True, False, False)


def test_unpacked_rows_have_no_mask_and_no_scores(hopper):
  """Of the anchor, of m_A, and of the cross-attention: all are causal."""

  def pairs(packed):
    loss, theta = composed(
      "cudnn", at=2, cap=None, dtype="bfloat16", packed=packed
    )
    text = for_cuda(jax.grad(loss), theta)
    assert "@__cudnn$fmhaSoftmaxBackward(" in text or packed
    return any(f"x{n}x{n}x" in text for n in (133, 256))

  assert pairs(packed=True)
  assert not pairs(packed=False)


def test_a_composition_of_unpacked_rows_is_the_plain_one(plain_cudnn):
  losses = []
  for kernel in ("cudnn", "xla"):
    loss, theta = composed(kernel, cap=None, packed=False)
    losses.append(jax.jit(jax.value_and_grad(loss))(theta))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *losses
  )


@pytest.mark.parametrize("rows", [[[1, 2, 0]], [[0, 1, 1]]])
def test_rows_that_are_packed_are_refused_where_none_are(rows):
  spec, _ = helpers.compose(connections=((2, 2),))
  rows = np.array(rows, np.int32)
  batch = Batch(Sequence(0 * rows, rows, 0 * rows), {}, {})
  forward.check(spec, batch)
  spec = helpers.retype(spec, packed=False)
  with pytest.raises(InputError, match="several segments"):
    forward.check(spec, batch)


@pytest.mark.parametrize(("remat", "calls"), [("dots", 1), ("full", 2)])
def test_remat_keeps_what_cudnn_computed(remat, calls, hopper):
  """Its output and statistics are dear to make again, and small."""
  loss, theta = composed("cudnn", at=2, cap=None, dtype="bfloat16", remat=remat)
  text = str(jax.make_jaxpr(jax.grad(loss))(theta))
  # The anchor up to the connection and m_A have no gradient: one call each; and
  # nothing of the cross-attention is computed again.
  kernel = "dot_product_attention_fwd_wrapper["
  assert text.count(kernel) == 3 + calls


@pytest.mark.parametrize(("width", "kernel"), [(384, "cudnn"), (864, "pieces")])
def test_heads_of_cross_attention_too_wide_for_cudnn_are_cut(width, kernel):
  wide = ModelConfig(
    vocab_size=61, width=width, num_layers=4, num_heads=3, num_kv_heads=3,
    head_dim=256, mlp_width=40,
  )  # fmt: skip
  anchor = wide.with_compute(attention="cudnn", dtype="bfloat16")
  assert cross_attention.kernel_of(anchor) == kernel
  # "pieces" reads segments also where rows are packed.
  assert cross_attention.reads_segments(anchor) == (kernel == "pieces")
  assert cross_attention.reads_segments(anchor.with_compute(packed=False))
  other = anchor.with_compute(attention="splash")
  assert cross_attention.kernel_of(other) == "splash"


def test_what_is_chosen():
  model = helpers.model(1, dtype="bfloat16")[0]
  single = model.with_compute(dtype="float32")
  capped = dataclasses.replace(model, attention_cap=50.0)
  wide = dataclasses.replace(model, head_dim=256)
  cpu, tpu = (types.SimpleNamespace(platform=p) for p in ("cpu", "tpu"))
  older, old, new, newer, newest, amd = (
    types.SimpleNamespace(platform="gpu", compute_capability=c)
    for c in ("7.5", "8.9", "9.0", "10.3", "12.0", "gfx942")
  )
  assert attention.choose("auto", cpu, capped) == "xla"
  assert attention.choose("pieces", cpu, capped) == "pieces"
  assert attention.choose("auto", tpu, single) == "splash"
  for device, config, kernel in (
    (old, model, "cudnn"), (old, single, "pieces"), (old, capped, "pieces"),
    (old, wide, "pieces"), (new, wide, "cudnn"), (newer, wide, "pieces"),
    (newer, model, "cudnn"), (newest, wide, "pieces"), (newest, model, "cudnn"),
    (older, model, "pieces"), (amd, model, "pieces"),
  ):  # fmt: skip
    assert attention.choose("auto", device, config) == kernel
  for asked, device, config, reason in (
    ("splash", cpu, model, "TPUs only"),
    ("cudnn", tpu, model, "GPUs only"),
    ("cudnn", new, single, "not float32"),
    ("cudnn", new, capped, "soft cap"),
    ("cudnn", old, wide, "not of 256"),
    ("cudnn", newer, wide, "128 there, not of 256"),
    ("cudnn", older, model, "8.0 or more, not on 7.5"),
    ("cudnn", amd, model, "not on gfx942"),
    ("flash", cpu, model, "none of"),
  ):
    with pytest.raises(InputError, match=reason):
      attention.choose(asked, device, config)
