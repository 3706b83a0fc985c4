"""A model or composition as data, and how frozen models are composed (§3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax

from calm_jax.composition import cross_attention
from calm_jax.composition.connections import Composition, connect
from calm_jax.core import hub, trees
from calm_jax.core.errors import InputError
from calm_jax.models import quantisation
from calm_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
  """One decoder, or a composition of several.

  Attributes:
    spec: the architectures and how they are joined.
    params: {"anchor": tree}, and for a composition "augmenting" and
      "composition" too, each a tree by the augmenting models' names. A single
      model is the anchor.
    tokenizer: the anchor's; None if the checkpoint has none, and only calls
      that need text raise then.
    origin: where it was loaded from.
    tokenizers: by name, of the augmenting models whose tokens are not the
      anchor's.
    sources: the checkpoints that the models were loaded from, by part:
      "anchor" (a single model's too) and "augmenting/<name>".
  """

  spec: Composition
  params: dict[str, Any]
  tokenizer: Tokenizer | None = None
  origin: str = ""
  tokenizers: dict[str, Tokenizer] = dataclasses.field(default_factory=dict)
  sources: dict[str, hub.CheckpointRef] = dataclasses.field(
    default_factory=dict
  )

  @property
  def is_composed(self) -> bool:
    """True if there is an augmenting model."""
    return bool(self.spec.augmenting)

  @property
  def num_params(self) -> int:
    """Parameters of all models together, each counted once if quantised."""
    return trees.count(jax.eval_shape(quantisation.dequantise, self.params))

  @property
  def num_composition_params(self) -> int:
    """Trainable parameters that the composition adds; 0 for one model."""
    return trees.count(self.params["composition"]) if self.is_composed else 0

  def text(self) -> Tokenizer:
    """The anchor's tokenizer.

    Raises:
      InputError: there is none.
    """
    if self.tokenizer is None:
      raise InputError(
        f"{self.origin or 'this model'} was loaded without a tokenizer; put "
        "its tokenizer.json or tokenizer.model into the folder to use text"
      )
    return self.tokenizer


AnyModel = TypeVar("AnyModel", bound=Model)  # functions keep the subclass


def compose(
  anchor: AnyModel,
  augmenting: Model | Mapping[str, Model],
  connections: int | Sequence[tuple[int, int]] | None = None,
  *,
  seed: int = 0,
  **options,
) -> AnyModel:
  """Composes frozen models (§3.1) with a fresh, untrained composition.

  Args:
    anchor: the single model whose head predicts the tokens.
    augmenting: the single model that adds knowledge, or several by name.
    connections: how many, or (augmenting layer, anchor layer) pairs counted
      from 1; every fourth layer of the augmenting model if None (§4).
    seed: of the fresh parameters.
    **options: visibility, norm, positions, output_init, control and
      control_seed; see `connections.Augmenting`.

  Returns:
    A model whose logits are the anchor's, bit for bit, until it is trained
    (with output_init="zeros").

  Raises:
    InputError: there is no augmenting model, vocabularies differ and a model
      has no tokenizer to align them by, or a connection is impossible.
  """
  if not isinstance(augmenting, Mapping):
    augmenting = {"augmenting": augmenting}
  composed = untrained(anchor, augmenting, connections, **options)
  theta = cross_attention.init(jax.random.key(seed), composed.spec)
  return dataclasses.replace(
    composed, params=composed.params | {"composition": theta}
  )


def untrained(
  anchor: AnyModel,
  augmenting: Mapping[str, Model],
  connections: int | Sequence[tuple[int, int]] | None = None,
  **options,
) -> AnyModel:
  """`compose`, with shapes in place of the composition's parameters."""
  if not augmenting:
    raise InputError("there is no augmenting model to compose the anchor with")
  joined, tokenizers, sources = [], {}, dict(anchor.sources)
  for name, model in augmenting.items():
    if model.is_composed or anchor.is_composed:
      raise InputError("compose takes single models, not compositions")
    if not has_same_tokens(name, model, anchor):
      tokenizers[name] = model.tokenizer
    config = model.spec.anchor
    joined.append(
      (name, connect(config, anchor.spec.anchor, connections, **options))
    )
    sources |= {f"augmenting/{name}": s for s in model.sources.values()}
  spec = Composition(anchor.spec.anchor, tuple(joined))
  params = anchor.params | {
    "augmenting": {n: m.params["anchor"] for n, m in augmenting.items()},
    "composition": cross_attention.param_shapes(spec),
  }
  return dataclasses.replace(
    anchor, spec=spec, params=params, tokenizers=tokenizers, sources=sources
  )


def has_same_tokens(name: str, augmenting: Model, anchor: Model) -> bool:
  """Compares the tokens of two models; True if they read the same ids.

  Raises:
    InputError: they do not, and cannot be aligned by the text: a model has no
      tokenizer, or the anchor's cannot tell where its tokens end.
  """
  sizes = augmenting.spec.anchor.vocab_size, anchor.spec.anchor.vocab_size
  if augmenting.tokenizer is None or anchor.tokenizer is None:
    if sizes[0] == sizes[1]:
      return True
    raise InputError(
      f"augmenting model {name!r} has a vocabulary of {sizes[0]}, the anchor "
      f"one of {sizes[1]}, and different tokens are aligned by the text: both "
      "models need a tokenizer (tokenizer.json or tokenizer.model)"
    )
  prints = augmenting.tokenizer.fingerprint, anchor.tokenizer.fingerprint
  if sizes[0] == sizes[1] and prints[0] == prints[1]:
    return True
  # Both raise if the tokenizer cannot tell what its ids spell.
  anchor.tokenizer.byte_ends("a b")
  anchor.tokenizer.spell(anchor.tokenizer.encode("a b"))
  return False
