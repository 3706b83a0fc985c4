"""Models put together with a fresh composition (§3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax

from calm_jax.composition import forward
from calm_jax.composition.connections import (
  Augmenting,
  Composition,
  Connection,
  default_connections,
)
from calm_jax.core.errors import InputError

if TYPE_CHECKING:
  from calm_jax.language_model import LanguageModel


def compose(
  anchor: LanguageModel,
  augmenting: LanguageModel | dict[str, LanguageModel],
  connections=None,
  *,
  visibility: str = "causal",
  norm: bool = True,
  positions: str = "none",
  output_init: str = "zeros",
  control: str = "none",
  control_seed: int = 0,
  seed: int = 0,
) -> LanguageModel:
  """Composes frozen models (§3.1) with a fresh, untrained composition.

  Args:
    anchor: the model that speaks.
    augmenting: the model that knows something, or several by name.
    connections: how many, or (augmenting layer, anchor layer) pairs counted
      from 1; every fourth layer of the augmenting model if None (§4).
    visibility: see `Augmenting`.
    norm: see `Augmenting`.
    positions: see `Augmenting`.
    output_init: see `Augmenting`.
    control: see `Augmenting`.
    control_seed: see `Augmenting`.
    seed: of the fresh parameters.

  Returns:
    A model whose logits are the anchor's, bit for bit, until it is trained
    (with output_init="zeros").

  Raises:
    InputError: there is no augmenting model, vocabularies differ and a model
      has no tokenizer to align them by, or a connection is impossible.
  """
  if not isinstance(augmenting, Mapping):
    augmenting = {"augmenting": augmenting}
  model = untrained(
    anchor, augmenting, connections,
    visibility=visibility, norm=norm, positions=positions,
    output_init=output_init, control=control, control_seed=control_seed,
  )  # fmt: skip
  theta = forward.init(jax.random.key(seed), model.spec)
  return dataclasses.replace(
    model, params=model.params | {"composition": theta}
  )


def untrained(
  anchor: LanguageModel,
  augmenting: dict[str, LanguageModel],
  connections=None,
  **options,
) -> LanguageModel:
  """`compose`, with shapes for parameters of the composition."""
  if not augmenting:
    raise InputError("there is no augmenting model to compose the anchor with")
  parts, tokenizers = [], {}
  for name, model in augmenting.items():
    if model.is_composed or anchor.is_composed:
      raise InputError("compose takes single models, not compositions")
    if not has_same_tokens(name, model, anchor):
      tokenizers[name] = model.tokenizer
    joined = join(model.spec.anchor, anchor.spec.anchor, connections, **options)
    parts.append((name, joined))
  spec = Composition(anchor.spec.anchor, tuple(parts))
  params = {
    "anchor": anchor.params,
    "augmenting": {name: m.params for name, m in augmenting.items()},
    "composition": jax.eval_shape(
      lambda: forward.init(jax.random.key(0), spec)
    ),
  }
  sources = dict(anchor.sources)
  for name, model in augmenting.items():
    sources |= {f"augmenting/{name}": s for s in model.sources.values()}
  return dataclasses.replace(
    anchor, spec=spec, params=params, tokenizers=tokenizers, sources=sources
  )


def join(augmenting, anchor, connections=None, **options) -> Augmenting:
  """An `Augmenting` from two configs; connections as `compose` takes them."""
  if connections is None or isinstance(connections, int):
    connections = default_connections(
      augmenting.num_layers, anchor.num_layers, connections
    )
  pairs = tuple(Connection(*pair) for pair in connections)
  return Augmenting(augmenting, pairs, **options)


def has_same_tokens(
  name: str, augmenting: LanguageModel, anchor: LanguageModel
) -> bool:
  """Whether both models read the same token ids.

  Raises:
    InputError: they do not, and cannot be aligned by the text: a model has no
      tokenizer, or the anchor's cannot tell where its tokens end.
  """
  sizes = augmenting.spec.anchor.vocab_size, anchor.spec.anchor.vocab_size
  both = augmenting.tokenizer, anchor.tokenizer
  if None in both:
    if sizes[0] == sizes[1]:
      return True
    raise InputError(
      f"augmenting model {name!r} has a vocabulary of {sizes[0]}, the anchor "
      f"one of {sizes[1]}, and different tokens are aligned by the text: both "
      "models need a tokenizer (tokenizer.json or tokenizer.model)"
    )
  if sizes[0] == sizes[1] and both[0].fingerprint == both[1].fingerprint:
    return True
  anchor.tokenizer.byte_ends("a b")
  anchor.tokenizer.spell(anchor.tokenizer.encode("a b"))
  return False
