"""Compositions taken apart and put together; none is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from calm_jax.composition import composing, forward
from calm_jax.composition.connections import Composition
from calm_jax.core import trees
from calm_jax.core.errors import InputError

if TYPE_CHECKING:
  from calm_jax.language_model import LanguageModel


def part(model: LanguageModel, name: str) -> LanguageModel:
  """See `LanguageModel.part`."""
  if name == "composed":
    return model
  spec, params = forward.alone(model.spec, model.tree, name)
  source = model.sources.get(name)
  own = model.tokenizers.get(name.removeprefix("augmenting/"))
  return dataclasses.replace(
    model,
    spec=spec,
    params=params["anchor"],
    tokenizer=model.tokenizer if name == "anchor" or own is None else own,
    origin=source.name if source else "",
    tokenizers={},
    sources={"anchor": source} if source else {},
  )


def add(
  model: LanguageModel,
  name: str,
  augmenting: LanguageModel,
  connections=None,
  **options,
) -> LanguageModel:
  """See `LanguageModel.add`."""
  new = composing.compose(
    part(model, "anchor"), {name: augmenting}, connections, **options
  )
  return join_compositions([model, new]) if model.is_composed else new


def drop(model: LanguageModel, name: str) -> LanguageModel:
  """See `LanguageModel.drop`."""
  names = [n for n, _ in model.spec.augmenting]
  if name not in names:
    raise InputError(f"no augmenting model {name!r} to drop; there are {names}")
  if names == [name]:
    return part(model, "anchor")

  def without(subtree):
    return {n: x for n, x in subtree.items() if n != name}

  kept = tuple((n, a) for n, a in model.spec.augmenting if n != name)
  return dataclasses.replace(
    model,
    spec=Composition(model.spec.anchor, kept),
    params={
      "anchor": model.params["anchor"],
      "augmenting": without(model.params["augmenting"]),
      "composition": without(model.params["composition"]),
    },
    tokenizers=without(model.tokenizers),
    sources={
      n: s for n, s in model.sources.items() if n != f"augmenting/{name}"
    },
  )


def join_compositions(models: Sequence[LanguageModel]) -> LanguageModel:
  """One composition of several that were trained apart, on one anchor (§3.2).

  At a layer where several arrive, the contributions are computed from the
  same hidden state and summed. The arrays are those of the parts.

  Args:
    models: compositions with the same anchor, to the bit.

  Raises:
    InputError: not compositions, anchors that differ, or an augmenting name
      that is there twice.
  """
  models = list(models)
  if not models or not all(m.is_composed for m in models):
    raise InputError("only compositions can be joined, and at least one")
  first, *others = models
  joined = first.params
  augmenting = dict(first.spec.augmenting)
  tokenizers, sources = dict(first.tokenizers), dict(first.sources)
  for other in others:
    _check_same_anchor(first, other)
    twice = sorted(augmenting.keys() & dict(other.spec.augmenting).keys())
    if twice:
      raise InputError(
        f"two of the compositions have augmenting models named {twice}; "
        "compose them under different names"
      )
    augmenting |= dict(other.spec.augmenting)
    joined = {"anchor": joined["anchor"]} | {
      kind: joined[kind] | other.params[kind]
      for kind in ("augmenting", "composition")
    }
    tokenizers |= other.tokenizers
    sources = other.sources | sources
  return dataclasses.replace(
    first,
    spec=Composition(first.spec.anchor, tuple(augmenting.items())),
    params=joined,
    tokenizers=tokenizers,
    sources=sources,
  )


def _check_same_anchor(a: LanguageModel, b: LanguageModel) -> None:
  if a.spec.anchor != b.spec.anchor:
    raise InputError(
      f"the compositions have different anchors: {a.spec.anchor} and "
      f"{b.spec.anchor}"
    )
  both = a.tokenizer, b.tokenizer
  if None not in both and both[0].fingerprint != both[1].fingerprint:
    raise InputError("the compositions have anchors with different tokenizers")
  ours, theirs = (trees.flatten(m.params["anchor"]) for m in (a, b))
  same = ours.keys() == theirs.keys() and all(
    ours[name] is theirs[name] for name in ours
  )
  if same:
    return  # Saves hashing.
  prints = [trees.fingerprint(m.params["anchor"]) for m in (a, b)]
  if prints[0] != prints[1]:
    raise InputError(
      "the compositions have anchors with different weights "
      f"({a.origin or 'unknown'} and {b.origin or 'unknown'}, fingerprints "
      f"{prints[0][:12]} and {prints[1][:12]}): a composition works with the "
      "anchor that it was trained with only"
    )
