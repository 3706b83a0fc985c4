"""Reads rotary positions from a Hugging Face config.json."""

import math
import sys
import warnings
from typing import Any

from calm_jax.core import errors
from calm_jax.core.errors import InputError
from calm_jax.models.rope import KINDS, Rope

Json = dict[str, Any]
_LENGTH = "original_max_position_embeddings"
_LONGEST = "max_position_embeddings"
# Options with several names, among the rotary options or beside them.
_KIND = ("rope_type", "type")
THETA = ("rope_theta", "rotary_emb_base")
FRACTION = ("partial_rotary_factor", "rotary_pct")
_COMMON = {*_KIND, *THETA, *FRACTION}
_LISTS = ("short_factor", "long_factor")
_FREQUENCIES = ("low_freq_factor", "high_freq_factor")
_MSCALES = ("mscale", "mscale_all_dim")
_YARN = ("attention_factor", "beta_fast", "beta_slow", "truncate")
# The options that each kind needs, and those that it may have besides.
_OPTIONS = {
  "default": ((), ()),
  "linear": (("factor",), ()),
  "dynamic": (("factor",), ()),
  "llama3": (("factor", *_FREQUENCIES), (_LENGTH,)),
  "yarn": (("factor",), (_LENGTH, *_MSCALES, *_YARN)),
  "longrope": (_LISTS, (_LENGTH, "factor", "attention_factor")),
}

# The keys of a config.json that are read here, and GPT-NeoX's own besides.
_DICTS = ("rope_parameters", "rope_scaling")
KEYS = frozenset({*_DICTS, THETA[0], FRACTION[0], _LENGTH, _LONGEST})
NEOX_KEYS = (THETA[1], FRACTION[1])


def read_rope(
  hf: Json,
  head_dim: int,
  theta: float = 10_000.0,
  fraction: float | None = None,
) -> Rope:
  """Reads the rotary positions of a config.json of transformers 4 or 5.

  The family's defaults are the base `theta` and the `fraction` of a head that
  is rotated, None if it must be all of it. Options that the kind does not have
  are named in a warning.

  Raises:
    InputError: the kind is unknown; an option of it is missing, of the wrong
      type, or given twice with different values.
  """
  given = [key for key in _DICTS if hf.get(key)]
  ropes = [
    _read_rope(hf, read_options(hf, key), head_dim, theta, fraction)
    for key in given or _DICTS[:1]
  ]
  if ropes[0] != ropes[-1]:
    both = " and ".join(f"{key}={hf[key]!r}" for key in given)
    raise InputError(
      f"config.json has {both}, which differ; leave one out, by ignore="
    )
  return ropes[0]


def _read_rope(
  hf: Json, options: Json, head_dim: int, theta: float, fraction: float | None
) -> Rope:
  """Reads rotary positions from one mapping, and from what is beside it."""
  kind = _value(hf, options, _KIND, "default")
  fields = _option_fields(kind, options)
  share = _value(hf, options, FRACTION, fraction or 1.0)
  if fraction is None and share != 1:
    raise InputError(
      f"config.json asks for {' / '.join(FRACTION)}={share}, but this family "
      "rotates whole heads; if that key means nothing, leave it out, by ignore="
    )
  fields["rotary_dim"] = int(head_dim * _number(FRACTION[0], share))
  fields["theta"] = _number(THETA[0], _value(hf, options, THETA, theta))
  if kind not in ("default", "linear"):
    # As transformers takes it: what is beside the options counts more.
    original = hf.get(_LENGTH) or options.get(_LENGTH)
    if kind == "dynamic" or (kind in ("llama3", "yarn") and not original):
      original = hf.get(_LONGEST)
    fields["original_length"] = int(_number(_LENGTH, original))
    if kind == "longrope" and "factor" not in fields:
      fields["factor"] = (
        _number(_LONGEST, hf.get(_LONGEST)) / fields["original_length"]
      )
  if kind in ("yarn", "longrope") and "attention_factor" not in fields:
    fields["attention_factor"] = _attention_factor(fields, options)
  return Rope(**fields)


def read_ropes(
  hf: Json, head_dim: int, thetas: dict[str, float]
) -> dict[str, Rope]:
  """Reads rotary positions that differ between layer types, as in Gemma 3.

  In the older form the layers of "sliding_attention" have rope_local_base_freq
  and no scaling, the others what a config without layer types has.

  Args:
    thetas: the default base of each layer type that is known.
  """
  nested = read_options(hf, "rope_parameters")
  if set(nested) - set(thetas):
    raise InputError(
      f"config.json has rope_parameters for {sorted(nested)}, known are "
      f"{sorted(thetas)}"
    )
  lengths = {key: hf.get(key) for key in (_LENGTH, _LONGEST)}
  ropes = {}
  for name, theta in thetas.items():
    each = lengths | {"rope_parameters": nested.get(name)}
    if name == "sliding_attention":
      each["rope_theta"] = hf.get("rope_local_base_freq")
    else:
      each |= {key: hf.get(key) for key in ("rope_theta", "rope_scaling")}
    ropes[name] = read_rope(each, head_dim, theta)
  return ropes


def read_options(hf: Json, key: str) -> Json:
  """Returns a mapping of rotary options, without those that are null."""
  options = hf.get(key) or {}
  if not isinstance(options, dict):
    raise InputError(f"{key}={options!r} is no mapping")
  options = {k: v for k, v in options.items() if v is not None}
  older = {k: "longrope" for k in _KIND if options.get(k) == "su"}
  return options | older  # longrope's name in older Phi-3


def _value(hf: Json, options: Json, names: tuple[str, ...], default: Any):
  """The value of an option, under whichever names and in whichever place."""
  values = [source.get(n) for source in (options, hf) for n in names]
  values = [v for v in values if v is not None]
  if any(v != values[0] for v in values):
    raise InputError(
      f"config.json gives {' / '.join(names)} several values: {values}; "
      "leave the wrong key out, by ignore="
    )
  return values[0] if values else default


def _option_fields(kind: str, options: Json) -> Json:
  """Checks the options of a kind; returns those that are fields of Rope."""
  errors.check_choice("rope_type", kind, KINDS)
  needed, allowed = _OPTIONS[kind]
  if missing := set(needed) - set(options):
    raise InputError(
      f"rope_type={kind!r} in config.json lacks {sorted(missing)}"
    )
  passed = sorted(set(options) - _COMMON - {*needed, *allowed})
  if nested := [name for name in passed if isinstance(options[name], dict)]:
    raise InputError(
      f"config.json has rotary options for each of {nested}, but this family "
      "has the same ones in all layers"
    )
  if passed:
    warnings.warn(
      f"rope_type={kind!r} in config.json does not read these options, and "
      f"they are passed over: {', '.join(passed)}",
      stacklevel=2,
    )
  fields: Json = {"kind": kind}
  for name in (n for n in options if n in {*needed, *allowed} - {_LENGTH}):
    value = options[name]
    if name in _LISTS:
      numbers = value if isinstance(value, list | tuple) else [value]
      fields[f"{name}s"] = tuple(_number(name, n) for n in numbers)
    elif name == "truncate":
      errors.check_choice(name, value, (True, False))
      fields[name] = bool(value)
    elif name not in _MSCALES:
      fields[name] = _number(name, value)
  return fields


def _attention_factor(fields: Json, options: Json) -> float:
  """The factor that transformers takes where the config gives none."""
  growth = math.log(max(fields["factor"], 1))
  if fields["kind"] == "longrope":
    return math.sqrt(1 + growth / math.log(fields["original_length"]))
  if all(options.get(name) for name in _MSCALES):
    mscale, all_dim = (_number(name, options[name]) for name in _MSCALES)
    return (1 + 0.1 * mscale * growth) / (1 + 0.1 * all_dim * growth)
  return 1 + 0.1 * growth


def _number(name: str, value: Any) -> float:
  return errors.check_float(name, value, 0, sys.float_info.max, excluded=0)
