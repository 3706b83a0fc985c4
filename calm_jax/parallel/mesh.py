"""The devices of a run, along named axes."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from calm_jax.core.errors import InputError

AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(
  axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh | None:
  """The mesh that a config asks for; None for one device.

  `axes` has the number of devices along each of AXES, of which one may be -1:
  what the others leave. `devices` are all of all processes by default. Numbers
  that do not fit them raise InputError.
  """
  devices = jax.devices() if devices is None else list(devices)
  if set(axes) != set(AXES):
    raise InputError(f"mesh={dict(axes)} does not have the axes {AXES}")
  sizes = {name: axes[name] for name in AXES}
  rest = [name for name, n in sizes.items() if n == -1]
  given = [n for n in sizes.values() if n != -1]
  if len(rest) > 1 or min(given) < 1:
    raise InputError(
      f"mesh={sizes}: an axis is 1 or more, and only one axis can take what is "
      "left, -1"
    )
  if rest:
    sizes[rest[0]], odd = divmod(len(devices), math.prod(given))
    if odd:
      raise InputError(
        f"mesh={dict(axes)}: {len(devices)} devices are not a multiple of "
        f"{math.prod(given)}"
      )
  total = math.prod(sizes.values())
  if total == 1 and len({d.process_index for d in devices}) == 1:
    return None
  if total != len(devices):
    raise InputError(
      f"mesh={sizes} is of {total} devices, and there are {len(devices)}; -1 "
      "on one axis takes what is left"
    )
  types = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(tuple(sizes.values()), AXES, types, devices=devices)
