"""A composition as data: its models and the connections between them (§3.1)."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Self

from calm_jax.composition.visibility import VISIBILITIES
from calm_jax.core.errors import InputError, check_choice, check_int, check_seed
from calm_jax.models.config import ModelConfig

CONTROLS = ("none", "zeroed", "shuffled", "noise")
_KNOWN = {
  "visibility": VISIBILITIES,
  "positions": ("none", "rope"),
  "output_init": ("zeros", "normal"),
  "output_scale": ("none", "state"),
  "control": CONTROLS,
  "norm": (True, False),
}


class Connection(NamedTuple):
  """A pair of layers, counted from 1, each tapped after its block."""

  augmenting: int
  anchor: int

  @property
  def name(self) -> str:
    return f"layer_{self.augmenting}_to_{self.anchor}"


@dataclasses.dataclass(frozen=True)
class Augmenting:
  """One augmenting model and how it is joined to the anchor.

  Attributes:
    visibility: which of its tokens an anchor position may attend to:
      "causal" (up to and including itself), "encoder" (the prompt only, the
      ablation of §4.4), "unmasked" (all; leaks the targets in training).
    norm: RMS norm before the query and before the projection; the paper has
      none.
    positions: the positions of the cross-attention: "none", as in the paper,
      or "rope", which rotates a key by its position and a query by that of the
      newest key it may attend to (if unmasked, in training, the text's last).
    output_init: W^O at the start: "zeros" (the composed model starts as the
      anchor exactly) or "normal".
    output_scale: what the output is multiplied by: "none", as in the paper, or
      "state", the mean magnitude of the anchor's state that it is added to.
      States of pretrained models grow to hundreds from layer to layer, which
      W^O alone takes long to reach. (Their root mean square says little: a few
      dimensions are far larger than all others.)
    control: replaces the model's states before the anchor attends to them, in
      training and after it: "none" does not; "zeroed" by zeros, which leaves
      the anchor as it is; "shuffled" by those of the batch row before, slot by
      slot, whatever that row holds there (in generation its own continuation,
      even after its end); "noise" by noise of the same norm, which depends on
      control_seed, layer and position only.
  """

  config: ModelConfig
  connections: tuple[Connection, ...]
  visibility: str = "causal"
  norm: bool = True
  positions: str = "none"
  output_init: str = "zeros"
  output_scale: str = "none"
  control: str = "none"
  control_seed: int = 0

  def __post_init__(self):
    for option, known in _KNOWN.items():
      check_choice(option, getattr(self, option), known)
    check_seed("control_seed", self.control_seed)


@dataclasses.dataclass(frozen=True)
class Composition:
  """An anchor and any number of named augmenting models; none is fine too."""

  anchor: ModelConfig
  augmenting: tuple[tuple[str, Augmenting], ...] = ()

  def __post_init__(self):
    for name, augmenting in self.augmenting:
      _check_connections(name, augmenting, self.anchor)

  def connections(self) -> list[tuple[str, Connection]]:
    """All connections with their augmenting model, by the anchor's layer."""
    pairs = [(n, c) for n, a in self.augmenting for c in a.connections]
    return sorted(pairs, key=lambda pair: pair[1].anchor)

  def with_compute(self, changes: Callable[[str], dict]) -> Self:
    """The composition with changed `Compute` fields in its models, which
    `changes` gives for "anchor" and "augmenting/<name>"."""
    augmenting = []
    for name, joined in self.augmenting:
      config = joined.config.with_compute(**changes(f"augmenting/{name}"))
      augmenting.append((name, dataclasses.replace(joined, config=config)))
    anchor = self.anchor.with_compute(**changes("anchor"))
    return dataclasses.replace(
      self, anchor=anchor, augmenting=tuple(augmenting)
    )


def default_connections(
  num_augmenting_layers: int, num_anchor_layers: int, n: int | None = None
) -> tuple[Connection, ...]:
  """Evenly spaced connections (§3.1, §4): N_A/n = 4 unless n is given.

  The k-th joins layer round(k N_A / n) to layer round(k N_B / n), so that the
  last joins the two last layers. Raises InputError without that many layers.
  """
  layers = num_augmenting_layers, num_anchor_layers
  n = max(1, num_augmenting_layers // 4) if n is None else n
  if not 1 <= n <= min(layers):
    raise InputError(
      f"{n} connections are impossible between {layers[0]} augmenting and "
      f"{layers[1]} anchor layers: give between 1 and {min(layers)}"
    )
  # Halves go up, unlike Python's round.
  return tuple(
    Connection(*((2 * k * count + n) // (2 * n) for count in layers))
    for k in range(1, n + 1)
  )


def connect(
  augmenting: ModelConfig,
  anchor: ModelConfig,
  connections: int | Sequence[tuple[int, int]] | None = None,
  **options,
) -> Augmenting:
  """An `Augmenting` of a number of `default_connections`, or of (augmenting
  layer, anchor layer) pairs counted from 1; `options` are its other fields."""
  if not isinstance(connections, Iterable):
    if connections is not None:
      connections = check_int("connections", connections, 1)
    connections = default_connections(
      augmenting.num_layers, anchor.num_layers, connections
    )
  pairs = tuple(map(_connection, connections))
  return Augmenting(augmenting, pairs, **options)


def _connection(pair: tuple[int, int]) -> Connection:
  try:
    augmenting, anchor = pair
  except (TypeError, ValueError) as error:
    raise InputError(
      f"connections: {pair!r} is no pair (augmenting layer, anchor layer)"
    ) from error
  layers = {"augmenting": augmenting, "anchor": anchor}
  return Connection(
    *(check_int(f"connections: {side} layer", n) for side, n in layers.items())
  )


def _check_connections(name: str, augmenting: Augmenting, anchor: ModelConfig):
  """Raises InputError unless every connection joins two layers that exist."""
  head_width = anchor.width // anchor.num_heads
  if augmenting.positions == "rope" and head_width % 2:
    raise InputError(
      f"positions='rope' of {name!r} needs heads of an even width; the "
      f"anchor's {anchor.width} / {anchor.num_heads} heads have {head_width}"
    )
  pairs = augmenting.connections
  if not pairs:
    raise InputError(f"augmenting model {name!r} has no connection")
  if len(set(pairs)) != len(pairs):
    raise InputError(f"{name!r} has the same connection twice")
  counts = {
    "augmenting": augmenting.config.num_layers,
    "anchor": anchor.num_layers,
  }
  for pair in pairs:
    for (side, count), layer in zip(counts.items(), pair, strict=True):
      if not 1 <= layer <= count:
        raise InputError(
          f"connection {tuple(pair)} of {name!r} is impossible: the {side} "
          f"model has layers 1 to {count}, not {layer}"
        )


def paper_count(spec: Composition) -> int:
  """Parameters added, by the formula of Appendix C.1, which forgets W^O."""
  D = spec.anchor.width
  return sum(
    len(a.connections) * (a.config.width * D + 3 * D * D)
    for _, a in spec.augmenting
  )
