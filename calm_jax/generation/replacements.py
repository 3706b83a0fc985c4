"""Replacements of m_A's states at inference, by which an audit tells what a
trained composition reads of them.

B rows of a batch.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from calm_jax.composition.connections import Composition
from calm_jax.core.batch import Control
from calm_jax.core.errors import InputError

Pair = tuple[str, str]  # an augmenting model, and a connection of it by name


@dataclasses.dataclass(frozen=True)
class Replacement:
  """A change of the states that an anchor is given; by default, there is none.

  With `draw`, each row of a batch is given another row's states, drawn by that
  seed: m_A's on the other row's prompt and on whatever the other row goes on
  with. Both prompts end at the same slot. With `noise`, a seed, it is given
  noise of the states' norms. Connections of `without` are taken out.
  """

  draw: int | None = None
  noise: int | None = None
  without: frozenset[Pair] = frozenset()

  def control(
    self,
    spec: Composition,
    rows_of_ids: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    rows: int,
  ) -> Control:
    """Makes a batch's arrays; of its `rows`, spare ones come last.

    Raises InputError if states of another row are asked for, and all rows hold
    the same text.
    """
    rows_B = np.arange(rows, dtype=np.int32)
    if self.draw is not None:
      drawn = _other_rows(self.draw, rows_of_ids, prompt_lengths)
      rows_B[: len(drawn)] = drawn
    gates = {
      name: {
        c.name: np.float32((name, c.name) not in self.without)
        for c in joined.connections
      }
      for name, joined in spec.augmenting
    }
    noise = np.bool_(self.noise is not None)
    return Control(rows_B, noise, np.uint32(self.noise or 0), gates)


def _other_rows(
  seed: int, rows_of_ids: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> list[int]:
  """Draws for each row one with another prompt; where all prompts are the same,
  as those of plain text, one with another text."""
  given = zip(rows_of_ids, prompt_lengths, strict=True)
  texts = [tuple(ids[:length]) for ids, length in given]
  if len(set(texts)) == 1:
    texts = [tuple(ids) for ids in rows_of_ids]
  if len(set(texts)) == 1:
    raise InputError(
      "states of another example are asked for, and all examples that are "
      "computed together are the same: give more of them"
    )
  rng, drawn = np.random.default_rng((seed, len(texts))), []
  for text in texts:
    drawn.append(rng.choice([i for i, t in enumerate(texts) if t != text]))
  return drawn


def all_of(spec: Composition) -> frozenset[Pair]:
  """Returns all connections of a composition."""
  return frozenset((name, c.name) for name, c in spec.connections())


def groups_of(spec: Composition) -> dict[str, frozenset[Pair]]:
  """Returns groups of connections to take out together, by a name to print.

  They are those of each augmenting model, if there are several, and each
  connection, if it is not a model's only one.
  """
  groups = {}
  for name, joined in spec.augmenting:
    own = {(name, c.name) for c in joined.connections}
    if len(spec.augmenting) > 1:
      groups[name] = frozenset(own)
    if len(own) > 1:
      for c in joined.connections:
        key = f"{name}/{c.augmenting}->{c.anchor}"
        groups[key] = frozenset({(name, c.name)})
  return groups


def controls(
  spec: Composition, draws: int, seed: int
) -> dict[str, list[Replacement]]:
  """Returns the controls of an audit by name, each with one draw or several."""
  everything = all_of(spec)
  made = {
    "correct": [Replacement()],
    "mismatched": [Replacement(draw=seed + i) for i in range(draws)],
    "zeroed": [Replacement(without=everything)],
    "noise": [Replacement(noise=seed)],
  }
  groups = groups_of(spec)
  parts = {f"without {name}": group for name, group in groups.items()}
  # Of two, one without is the other alone.
  for name, group in groups.items():
    if everything - group not in parts.values():
      parts[f"only {name}"] = everything - group
  return made | {n: [Replacement(without=group)] for n, group in parts.items()}
