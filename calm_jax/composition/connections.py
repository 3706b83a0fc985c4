"""What is joined to what: connections, and the composition as data (§3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from calm_jax.core.errors import InputError
from calm_jax.models.config import ModelConfig

VISIBILITIES = ("causal", "encoder", "unmasked")
POSITIONS = ("none", "rope")
CONTROLS = ("none", "zeroed", "shuffled", "noise")


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
    config: the model's architecture.
    connections: pairs of layers; see `default_connections`.
    visibility: which of its tokens an anchor position may attend to:
      "causal" (up to and including itself), "encoder" (the prompt only, the
      ablation of §4.4), "unmasked" (all; leaks the targets in training).
    norm: RMS norm before the query and before the projection; the paper has
      none.
    positions: what the cross-attention knows of them: "none", as in the paper,
      or "rope": queries and keys turn by how many tokens of the augmenting
      model lie between a key and the newest that the query sees (if unmasked,
      in training, the last of the text).
    output_init: W^O at the start: "zeros" (the composed model starts as the
      anchor exactly) or "normal".
    control: what is done to its states before the anchor attends to them, in
      training and after it: "none"; "zeroed", which leaves the anchor as it
      is; "shuffled", each row of a batch is given those of the row before it,
      slot by slot, whatever that row holds there (in generation its own
      continuation, and what it goes on to read after its end); "noise" of the
      same norm, which follows from control_seed, layer and position alone.
    control_seed: of the noise.
  """

  config: ModelConfig
  connections: tuple[Connection, ...]
  visibility: str = "causal"
  norm: bool = True
  positions: str = "none"
  output_init: str = "zeros"
  control: str = "none"
  control_seed: int = 0

  def __post_init__(self):
    if self.visibility not in VISIBILITIES:
      raise InputError(
        f"visibility={self.visibility!r} is none of {VISIBILITIES}"
      )
    if self.positions not in POSITIONS:
      raise InputError(f"positions={self.positions!r} is none of {POSITIONS}")
    if self.output_init not in ("zeros", "normal"):
      raise InputError(
        f"output_init={self.output_init!r} is neither 'zeros' nor 'normal'"
      )
    if self.control not in CONTROLS:
      raise InputError(f"control={self.control!r} is none of {CONTROLS}")


@dataclasses.dataclass(frozen=True)
class Composition:
  """An anchor and any number of named augmenting models; none is fine too."""

  anchor: ModelConfig
  augmenting: tuple[tuple[str, Augmenting], ...] = ()

  def __post_init__(self):
    for name, augmenting in self.augmenting:
      check_connections(name, augmenting, self.anchor)

  def connections(self) -> list[tuple[str, Connection]]:
    """All connections with their augmenting model, by the anchor's layer."""
    pairs = [(n, c) for n, a in self.augmenting for c in a.connections]
    return sorted(pairs, key=lambda pair: pair[1].anchor)

  def with_compute(self, changes: Callable[[str], dict]) -> Composition:
    """The same composition, computed in another way.

    Args:
      changes: for a model, "anchor" or "augmenting/<name>", the fields of its
        `Compute` that change.
    """
    augmenting = {
      name: dataclasses.replace(
        joined,
        config=joined.config.with_compute(**changes(f"augmenting/{name}")),
      )
      for name, joined in self.augmenting
    }
    return Composition(
      self.anchor.with_compute(**changes("anchor")), tuple(augmenting.items())
    )


def default_connections(
  num_augmenting_layers: int, num_anchor_layers: int, n: int | None = None
) -> tuple[Connection, ...]:
  """Evenly spaced connections (§3.1, §4): N_A/n = 4 unless n is given.

  The k-th joins layer round(k N_A / n) to layer round(k N_B / n), so that the
  last joins the two last layers.

  Raises:
    InputError: more connections than one of the models has layers.
  """
  n = max(1, num_augmenting_layers // 4) if n is None else n
  if not 1 <= n <= min(num_augmenting_layers, num_anchor_layers):
    raise InputError(
      f"{n} connections are impossible between {num_augmenting_layers} "
      f"augmenting and {num_anchor_layers} anchor layers: give between 1 and "
      f"{min(num_augmenting_layers, num_anchor_layers)}"
    )

  def nearest(k, layers):  # halves go up, unlike Python's round
    return (2 * k * layers + n) // (2 * n)

  return tuple(
    Connection(nearest(k, num_augmenting_layers), nearest(k, num_anchor_layers))
    for k in range(1, n + 1)
  )


def connect(
  augmenting: ModelConfig,
  anchor: ModelConfig,
  connections: int | Sequence[tuple[int, int]] | None = None,
  **options,
) -> Augmenting:
  """An `Augmenting` from two architectures.

  Args:
    augmenting: the augmenting model's.
    anchor: the anchor's.
    connections: how many evenly spaced ones, their default number if None, or
      (augmenting layer, anchor layer) pairs counted from 1.
    **options: other fields of `Augmenting`.

  Raises:
    InputError: more connections than one of the models has layers, or an
      unknown option's value.
  """
  if connections is None or isinstance(connections, int):
    connections = default_connections(
      augmenting.num_layers, anchor.num_layers, connections
    )
  pairs = tuple(Connection(*pair) for pair in connections)
  return Augmenting(augmenting, pairs, **options)


def check_connections(name: str, augmenting: Augmenting, anchor: ModelConfig):
  """Raises InputError unless every connection joins two layers that exist."""
  if augmenting.positions == "rope" and anchor.width // anchor.num_heads % 2:
    raise InputError(
      f"positions='rope' of {name!r} needs heads of an even width; the "
      f"anchor's {anchor.width} / {anchor.num_heads} heads have "
      f"{anchor.width // anchor.num_heads}"
    )
  layers = augmenting.config.num_layers, anchor.num_layers
  if not augmenting.connections:
    raise InputError(f"augmenting model {name!r} has no connection")
  for connection in augmenting.connections:
    for side, layer, count in zip(
      ("augmenting", "anchor"), connection, layers, strict=True
    ):
      if not 1 <= layer <= count:
        raise InputError(
          f"connection {tuple(connection)} of {name!r} is impossible: the "
          f"{side} model has layers 1 to {count}, not {layer}"
        )
  if len(set(augmenting.connections)) != len(augmenting.connections):
    raise InputError(f"{name!r} has the same connection twice")


def paper_count(spec: Composition) -> int:
  """Parameters added, by the formula of Appendix C.1, which forgets W^O."""
  D = spec.anchor.width
  return sum(
    len(a.connections) * (a.config.width * D + 3 * D * D)
    for _, a in spec.augmenting
  )
