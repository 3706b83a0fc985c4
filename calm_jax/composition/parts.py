"""Parts of a composition: taken out, added, dropped and joined (§3.2).

All functions give new models with the same arrays and change none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from calm_jax.composition import forward
from calm_jax.composition.connections import Composition
from calm_jax.composition.model import AnyModel, Model, compose
from calm_jax.core import trees
from calm_jax.core.errors import InputError


def part(model: AnyModel, name: str) -> AnyModel:
  """One model of a composition; see `LanguageModel.part`."""
  if name == "composed":
    return model
  spec, params = forward.submodel(model.spec, model.params, name)
  source = model.sources.get(name)
  tokenizer = model.tokenizer
  if name != "anchor":
    key = name.removeprefix("augmenting/")
    tokenizer = model.tokenizers.get(key, tokenizer)
  return dataclasses.replace(
    model,
    spec=spec,
    params=params,
    tokenizer=tokenizer,
    origin=source.name if source else "",
    tokenizers={},
    sources={"anchor": source} if source else {},
  )


def add(
  model: AnyModel,
  name: str,
  augmenting: Model,
  connections: int | Sequence[tuple[int, int]] | None = None,
  **options,
) -> AnyModel:
  """The composition with one more augmenting model; see `LanguageModel.add`."""
  anchor = part(model, "anchor")
  new = compose(anchor, {name: augmenting}, connections, **options)
  return join_compositions([model, new]) if model.is_composed else new


def drop(model: AnyModel, name: str) -> AnyModel:
  """The composition without one model; see `LanguageModel.drop`."""
  names = [n for n, _ in model.spec.augmenting]
  if name not in names:
    raise InputError(f"no augmenting model {name!r} to drop; there are {names}")
  if names == [name]:
    return part(model, "anchor")

  def without(by_name: dict, dropped: str = name) -> dict:
    return {n: x for n, x in by_name.items() if n != dropped}

  params = dict(model.params)
  for kind in ("augmenting", "composition"):
    params[kind] = without(params[kind])
  kept = without(dict(model.spec.augmenting))
  return dataclasses.replace(
    model,
    spec=Composition(model.spec.anchor, tuple(kept.items())),
    params=params,
    tokenizers=without(model.tokenizers),
    sources=without(model.sources, f"augmenting/{name}"),
  )


def join_compositions(models: Sequence[AnyModel]) -> AnyModel:
  """One composition of several that were trained apart, on one anchor (§3.2).

  Where several connections reach one layer, their contributions are computed
  from the same hidden state and summed. The arrays are those of the parts.

  Args:
    models: compositions with the same anchor, to the bit.

  Raises:
    InputError: not compositions, anchors that differ, or an augmenting name
      that is there twice.
  """
  models = list(models)
  if not models or not all(m.is_composed for m in models):
    raise InputError("only compositions can be joined, and at least one")
  first = models[0]
  joined: dict[str, Any] = {}
  tokenizers, sources = {}, {}
  params = {**first.params, "augmenting": {}, "composition": {}}
  for model in models:
    _check_same_anchor(first, model)
    new = dict(model.spec.augmenting)
    if twice := sorted(joined.keys() & new.keys()):
      raise InputError(
        f"two of the compositions have augmenting models named {twice}; "
        "compose them under different names"
      )
    joined |= new
    for kind in ("augmenting", "composition"):
      params[kind] |= model.params[kind]
    tokenizers |= model.tokenizers
    sources = model.sources | sources
  return dataclasses.replace(
    first,
    spec=Composition(first.spec.anchor, tuple(joined.items())),
    params=params,
    tokenizers=tokenizers,
    sources=sources,
  )


def _check_same_anchor(a: Model, b: Model) -> None:
  """Raises InputError unless two compositions have equal anchors."""
  specs = a.spec.anchor, b.spec.anchor
  if specs[0] != specs[1]:
    raise InputError(
      "the compositions have different anchors: {} and {}".format(*specs)
    )
  both = a.tokenizer, b.tokenizer
  if None not in both and both[0].fingerprint != both[1].fingerprint:
    raise InputError("the compositions have anchors with different tokenizers")
  ours, theirs = (trees.flatten(m.params["anchor"]) for m in (a, b))
  if ours.keys() == theirs.keys() and all(
    leaf is theirs[name] for name, leaf in ours.items()
  ):
    return  # The very same arrays need no hashing.
  prints = [trees.fingerprint(m.params["anchor"]) for m in (a, b)]
  if prints[0] != prints[1]:
    raise InputError(
      "the compositions have anchors with different weights "
      f"({a.origin or 'unknown'} and {b.origin or 'unknown'}, fingerprints "
      f"{prints[0][:12]} and {prints[1][:12]}): a composition works with the "
      "anchor that it was trained with only"
    )
