"""Rotary positions: every scaling of them, their reading, their rotation.

B batch, L length, N heads, H head width, R = rotary_dim features rotated, of
which feature i < R/2 turns together with feature i + R/2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.core.errors import InputError

Array = jax.Array

# Options of each kind in a Hugging Face config: needed, allowed. The lengths
# and the base are needed by all and looked up on their own.
_LENGTH = "original_max_position_embeddings"
_OPTIONS = {
  "default": ((), ()),
  "linear": (("factor",), ()),
  "dynamic": (("factor",), ()),
  "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (_LENGTH,)),
  "yarn": (
    ("factor",),
    (
      _LENGTH, "attention_factor", "mscale", "mscale_all_dim", "beta_fast",
      "beta_slow", "truncate",
    ),
  ),
  "longrope": (
    ("short_factor", "long_factor"), (_LENGTH, "factor", "attention_factor"),
  ),
}  # fmt: skip
_THETA = ("rope_theta", "rotary_emb_base")
_FRACTION = ("partial_rotary_factor", "rotary_pct")

# What `from_hf` reads in a config.json; GPT-NeoX has names of its own besides.
KEYS = frozenset({
  "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor",
  _LENGTH, "max_position_embeddings",
})  # fmt: skip
NEOX_KEYS = KEYS | {"rotary_emb_base", "rotary_pct"}
GEMMA3_KEYS = KEYS | {"rope_local_base_freq"}


@dataclasses.dataclass(frozen=True)
class Rope:
  """How positions turn the first features of queries and keys.

  Attributes:
    rotary_dim: R, features rotated; even, at most the head's width.
    theta: base of the frequencies, theta^(-2i/R).
    kind: "default", or a scaling of the frequencies: "linear", "dynamic"
      (NTK), "llama3", "yarn" (arXiv 2309.00071), "longrope" (2402.13753).
    factor: by which the length was extended.
    original_length: what the model was first trained for, in tokens.
    attention_factor: cosines and sines are multiplied by it.
    low_freq_factor: llama3; longer waves than original_length / it are scaled.
    high_freq_factor: llama3; shorter waves than original_length / it are not.
    beta_fast: yarn; features that turn more often than this in
      original_length are not scaled.
    beta_slow: yarn; features that turn less often are scaled wholly.
    truncate: yarn; whether that range ends at whole features.
    short_factors: longrope; R/2 divisors up to original_length.
    long_factors: longrope; R/2 divisors beyond it.
  """

  rotary_dim: int
  theta: float = 10_000.0
  kind: str = "default"
  factor: float = 1.0
  original_length: int = 0
  attention_factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()

  def __post_init__(self):
    if self.kind not in _OPTIONS:
      raise InputError(
        f"rope_type={self.kind!r} is not computed here; known: "
        f"{sorted(_OPTIONS)}"
      )
    if self.rotary_dim < 2 or self.rotary_dim % 2:
      raise InputError(
        f"rotary positions need pairs of features, not {self.rotary_dim} of "
        "them: check head_dim and the fraction of it that is rotated"
      )
    if self.kind == "dynamic" and self.rotary_dim == 2:
      raise InputError("rope_type='dynamic' is not defined for one pair")
    if self.kind not in ("default", "linear") and self.original_length < 1:
      raise InputError(f"rope_type={self.kind!r} needs an original length")
    if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
      raise InputError(
        f"llama3 has high_freq_factor={self.high_freq_factor}, which does not "
        f"exceed low_freq_factor={self.low_freq_factor}"
      )
    if self.kind == "longrope":
      for name in ("short_factors", "long_factors"):
        if len(getattr(self, name)) != self.rotary_dim // 2:
          raise InputError(
            f"longrope has {len(getattr(self, name))} {name}, but "
            f"rotary_dim={self.rotary_dim} needs half as many"
          )


def _frequencies(rope: Rope) -> np.ndarray:
  """Radians per position, float64 [R/2], apart from what lengths change."""
  R = rope.rotary_dim
  plain = rope.theta ** (-np.arange(0, R, 2) / R)
  if rope.kind == "linear":
    return plain / rope.factor
  if rope.kind == "llama3":
    turns = rope.original_length * plain / (2 * np.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / rope.factor)
  if rope.kind == "yarn":

    def feature(turns):  # that turns so often in the original length
      waves = rope.original_length / (turns * 2 * math.pi)
      return R * math.log(waves) / (2 * math.log(rope.theta))

    low, high = feature(rope.beta_fast), feature(rope.beta_slow)
    if rope.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    high += 0.001 * (low == high)
    scaled = np.clip((np.arange(R // 2) - low) / (high - low), 0, 1)
    return plain * (1 - scaled + scaled / rope.factor)
  return plain


def tables(
  rope: Rope, positions_BL: Array, dtype, lengths: Array | None = None
) -> tuple[Array, Array]:
  """Cosines and sines of the rotary angles.

  "dynamic" and "longrope" turn differently in longer sequences. transformers
  asks the longest row of a batch; here batch-mates change nothing, so every
  row, or every token, has a length of its own. To decode with a cache, give
  the length that the sequence will end with at every step: all steps then
  agree with one forward pass over the whole.

  Args:
    rope: the kind.
    positions_BL: of each token in its sequence, from 0.
    dtype: of the angles and the result; float32 at least.
    lengths: [B] or, for rows of several packed sequences, [B, L]: tokens in
      the sequence as a whole. Default: each row's largest position + 1.

  Returns:
    (cos, sin), each [B, L, 1, R/2], times the attention factor.
  """
  dtype = jnp.promote_types(dtype, jnp.float32)
  frequencies = jnp.asarray(_frequencies(rope), dtype)
  if rope.kind in ("dynamic", "longrope"):
    if lengths is None:
      lengths = positions_BL.max(axis=-1) + 1
    lengths = jnp.reshape(lengths, (positions_BL.shape[0], -1, 1, 1))
  if rope.kind == "dynamic":
    # theta grows by g^(R/(R-2)); its power -2i/R is g^(-2i/(R-2)).
    ratio = jnp.maximum(lengths / rope.original_length, 1).astype(dtype)
    growth = rope.factor * ratio - (rope.factor - 1)
    i2 = jnp.arange(0, rope.rotary_dim, 2, dtype=dtype)
    frequencies = frequencies * growth ** (-i2 / (rope.rotary_dim - 2))
  if rope.kind == "longrope":
    frequencies = frequencies / jnp.where(
      lengths > rope.original_length,
      jnp.asarray(rope.long_factors, dtype),
      jnp.asarray(rope.short_factors, dtype),
    )
  angles = positions_BL[..., None, None].astype(dtype) * frequencies
  scale = jnp.asarray(rope.attention_factor, dtype)
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x_BLNH: Array, rope: tuple[Array, Array]) -> Array:
  """Rotates pairs (i, i + R/2) by the angle of their position.

  Args:
    x_BLNH: queries or keys.
    rope: (cos, sin) from `tables`; features from R on pass through.
  """
  cos, sin = rope
  half = cos.shape[-1]
  a, b, rest = jnp.split(x_BLNH.astype(cos.dtype), (half, 2 * half), axis=-1)
  y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
  return y.astype(x_BLNH.dtype)


def from_hf(
  hf: dict[str, Any],
  head_dim: int,
  theta: float = 10_000.0,
  fraction: float | None = None,
) -> Rope:
  """Reads a Hugging Face config.json, as of transformers 4 or 5.

  Args:
    hf: the parsed config.json; what is not in NEOX_KEYS is not looked at.
    head_dim: H.
    theta: the family's default base.
    fraction: the family's default share of H that is rotated; None if the
      family rotates whole heads only.

  Raises:
    InputError: the kind is unknown; an option of it is unknown, missing, of
      the wrong type, or given twice with different values.
  """
  if hf.get("rope_parameters") and hf.get("rope_scaling"):
    raise InputError("config.json has both rope_parameters and rope_scaling")
  options = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  if not isinstance(options, dict):
    raise InputError(f"config.json has rotary options={options!r}, no mapping")
  options = {k: v for k, v in options.items() if v is not None}
  if options.get("type") == "su":  # longrope's name in older Phi-3
    options["type"] = "longrope"

  def one(*names, default):
    """An option that has several names and places."""
    values = [source.get(n) for source in (options, hf) for n in names]
    values = [v for v in values if v is not None]
    if any(v != values[0] for v in values):
      raise InputError(
        f"config.json gives {' / '.join(names)} several values: {values}"
      )
    return values[0] if values else default

  kind = one("rope_type", "type", default="default")
  if kind not in _OPTIONS:
    raise InputError(
      f"rope_type={kind!r} is not computed here; known: {sorted(_OPTIONS)}"
    )
  needed, allowed = _OPTIONS[kind]
  everywhere = {"rope_type", "type", *_THETA, *_FRACTION}
  unknown = set(options) - everywhere - {*needed, *allowed}
  missing = set(needed) - set(options)
  if unknown or missing:
    raise InputError(
      f"rope_type={kind!r} in config.json lacks {sorted(missing)}, and has "
      f"options that we do not know: {sorted(unknown)}"
    )
  share = one(*_FRACTION, default=1.0 if fraction is None else fraction)
  if fraction is None and share != 1:
    raise InputError(
      f"config.json asks for {' / '.join(_FRACTION)}={share}, but this family "
      "rotates whole heads"
    )
  fields: dict[str, Any] = {
    "rotary_dim": int(head_dim * _number(_FRACTION[0], share)),
    "theta": _number(_THETA[0], one(*_THETA, default=theta)),
    "kind": kind,
  }
  for name in set(options) - everywhere - {_LENGTH, "mscale", "mscale_all_dim"}:
    field, read = _READ.get(name, (name, _number))
    fields[field] = read(name, options[name])
  longest = hf.get("max_position_embeddings")
  # Beside the other options, where Phi-3 has it, it counts more than among
  # them.
  original = hf.get(_LENGTH) or options.get(_LENGTH)
  if kind == "dynamic" or (kind in ("llama3", "yarn") and not original):
    original = longest
  if kind not in ("default", "linear"):
    fields["original_length"] = int(_number(_LENGTH, original))
  if kind == "longrope" and "factor" not in fields:
    fields["factor"] = _number("max_position_embeddings", longest) / original
  if kind in ("yarn", "longrope") and "attention_factor" not in fields:
    fields["attention_factor"] = _attention_factor(fields, options)
  return Rope(**fields)


def _attention_factor(fields: dict, options: dict) -> float:
  """What transformers multiplies by where the config does not say."""
  growth = math.log(max(fields["factor"], 1))
  if fields["kind"] == "longrope":
    return math.sqrt(1 + growth / math.log(fields["original_length"]))
  if options.get("mscale") and options.get("mscale_all_dim"):
    above, below = (
      1 + 0.1 * _number(n, options[n]) * growth
      for n in ("mscale", "mscale_all_dim")
    )
    return above / below
  return 1 + 0.1 * growth


def by_layer_type_from_hf(
  hf: dict[str, Any], head_dim: int, thetas: dict[str, float]
) -> dict[str, Rope]:
  """Reads a config.json with rotary positions per layer type, as Gemma 3's.

  In the older form the layers of "sliding_attention" have rope_local_base_freq
  and no scaling, the others what a config without layer types has.

  Args:
    hf: the parsed config.json; what is not in GEMMA3_KEYS is not looked at.
    head_dim: H.
    thetas: the family's default base of each layer type.

  Returns:
    {layer type: Rope}, for the layer types of `thetas`.

  Raises:
    InputError: as `from_hf`, and for layer types not in `thetas`.
  """
  nested = hf.get("rope_parameters")
  if nested is None:
    old = {k: hf.get(k) for k in KEYS}
    local = old | {
      "rope_scaling": None, "rope_theta": hf.get("rope_local_base_freq")
    }  # fmt: skip
    each = {n: local if n == "sliding_attention" else old for n in thetas}
  else:
    if set(nested) - set(thetas) or hf.get("rope_scaling"):
      raise InputError(
        f"config.json has rope_parameters for {sorted(nested)} and "
        f"rope_scaling={hf.get('rope_scaling')!r}; known are parameters for "
        f"{sorted(thetas)} alone"
      )
    lengths = {k: hf.get(k) for k in (_LENGTH, "max_position_embeddings")}
    each = {n: lengths | {"rope_parameters": nested.get(n)} for n in thetas}
  return {n: from_hf(each[n], head_dim, thetas[n]) for n in thetas}


def _number(name: str, value: Any) -> float:
  real = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not real or not 0 < value < math.inf:
    raise InputError(
      f"config.json has {name}={value!r}, which is no number above 0"
    )
  return float(value)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
  if not isinstance(values, (list, tuple)):
    raise InputError(f"config.json has {name}={values!r}, which is no list")
  return tuple(_number(name, v) for v in values)


def _bool(name: str, value: Any) -> bool:
  if not isinstance(value, bool):
    raise InputError(f"config.json has {name}={value!r}, which is no bool")
  return value


_READ = {
  "short_factor": ("short_factors", _numbers),
  "long_factor": ("long_factors", _numbers),
  "truncate": ("truncate", _bool),
}
