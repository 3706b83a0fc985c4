"""Models as data: one decoder, or frozen models composed (§3.1) and joined.

All functions give new models with the same arrays and change none.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

import jax

from calm_jax.composition import cross_attention, forward, inference
from calm_jax.composition.connections import Composition, connect
from calm_jax.core import hub, trees
from calm_jax.core.errors import InputError, check_seed, check_text, check_type
from calm_jax.models import quantisation
from calm_jax.models.config import ModelConfig
from calm_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
  """One decoder, or a composition of several; a single model is the anchor."""

  spec: Composition
  # {"anchor": tree}, and for a composition "augmenting" and "composition" too,
  # each a tree by the augmenting models' names.
  params: dict[str, Any]
  tokenizer: Tokenizer | None = None  # the anchor's
  origin: str = ""  # where it was loaded from
  # By name, of the augmenting models whose tokens are not the anchor's.
  tokenizers: dict[str, Tokenizer] = dataclasses.field(default_factory=dict)
  # By part ("anchor" and "augmenting/<name>"), where models were loaded from.
  sources: dict[str, hub.CheckpointRef] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    # Tokenizers refuse tokens for which their model's table has no row.
    joined, others = dict(self.spec.augmenting), {}
    for name, tokenizer in self.tokenizers.items():
      others[name] = tokenizer.with_rows(joined[name].config.vocab_size)
    object.__setattr__(self, "tokenizers", others)
    if self.tokenizer is not None:
      tokenizer = self.tokenizer.with_rows(self.num_ids)
      object.__setattr__(self, "tokenizer", tokenizer)

  @property
  def num_ids(self) -> int:
    """Rows of the smallest table of the models that read the anchor's ids."""
    return min(config.vocab_size for config in self._anchor_readers())

  @property
  def max_length(self) -> int:
    """The most of the anchor's tokens that all models which read them can."""
    return min(config.max_length for config in self._anchor_readers())

  def _anchor_readers(self) -> list[ModelConfig]:
    joined, others = self.spec.augmenting, self.tokenizers
    configs = [a.config for name, a in joined if name not in others]
    return [self.spec.anchor, *configs]

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

  @functools.cached_property
  def prepared(self) -> tuple[Composition, dict[str, Any]]:
    """The spec and the parameters that decode, by `inference.prepare`."""
    return inference.prepare(self.spec, self.params)

  def text(self) -> Tokenizer:
    """The anchor's tokenizer; InputError if there is none."""
    if self.tokenizer is None:
      raise InputError(
        f"{self.origin or 'this model'} was loaded without a tokenizer; put "
        "its tokenizer.json or tokenizer.model into the folder to use text"
      )
    return self.tokenizer

  def part(self, name: str) -> Self:
    """The model "anchor" or "augmenting/<name>"; InputError if not there."""
    if check_text("the name of a part", name) == "composed":
      return self
    spec, params = forward.submodel(self.spec, self.params, name)
    source, tokenizer = self.sources.get(name), self.tokenizer
    if name != "anchor":
      key = name.removeprefix("augmenting/")
      tokenizer = self.tokenizers.get(key, tokenizer)
    origin = source.name if source else ""
    sources = {"anchor": source} if source else {}
    return type(self)(spec, params, tokenizer, origin, {}, sources)

  def add(self, name: str, model: "Model", connections=None, **options) -> Self:
    """The composition with one more augmenting model, freshly joined (§3.2).

    What was there keeps its arrays; train the new connections with
    `trainable=("composition/<name>/.*",)`. Arguments and errors are those of
    `compose`; a name that is taken is an InputError too.
    """
    new = compose(self.part("anchor"), {name: model}, connections, **options)
    return join_compositions([self, new]) if self.is_composed else new

  def drop(self, name: str) -> Self:
    """The composition without an augmenting model; without any, the anchor."""
    names = [n for n, _ in self.spec.augmenting]
    if name not in names:
      raise InputError(f"no model {name!r} to drop; there are {names}")
    if names == [name]:
      return self.part("anchor")

    def rest(by_name: Mapping, dropped: str = name) -> dict:
      return {n: x for n, x in by_name.items() if n != dropped}

    joined = tuple(rest(dict(self.spec.augmenting)).items())
    by_kind = {k: rest(self.params[k]) for k in ("augmenting", "composition")}
    return dataclasses.replace(
      self,
      spec=Composition(self.spec.anchor, joined),
      params=self.params | by_kind,
      tokenizers=rest(self.tokenizers),
      sources=rest(self.sources, f"augmenting/{name}"),
    )


_LOAD = "load it by load_model; several augmenting models are a dict by name"
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

  With output_init="zeros" the logits are the anchor's, bit for bit, until it is
  trained.

  Args:
    anchor: the single model whose head predicts the tokens.
    augmenting: the single model that adds knowledge, or several by name.
    connections: how many, or (augmenting layer, anchor layer) pairs counted
      from 1; every fourth layer of the augmenting model if None (§4).
    seed: of the fresh parameters.
    **options: fields of `connections.Augmenting`, such as visibility.

  Raises:
    InputError: there is no augmenting model, vocabularies differ and a model
      has no tokenizer to align them by, or a connection is impossible.
  """
  if not isinstance(augmenting, Mapping):
    augmenting = {"augmenting": augmenting}
  check_type("the anchor", anchor, Model, _LOAD)
  for name, model in augmenting.items():
    check_type(f"augmenting model {name!r}", model, Model, _LOAD)
  seed = check_seed("seed", seed)
  return with_fresh(untrained(anchor, augmenting, connections, **options), seed)


def with_fresh(composed: AnyModel, seed: int) -> AnyModel:
  """A composition with fresh parameters of all its connections."""
  theta = cross_attention.init(jax.random.key(seed), composed.spec)
  return dataclasses.replace(
    composed, params=composed.params | {"composition": theta}
  )


def untrained(
  anchor: AnyModel,
  augmenting: Mapping[str, Model],
  connections: int | Sequence[tuple[int, int]] | None = None,
  *,
  same_tokens: bool | None = None,
  **options,
) -> AnyModel:
  """`compose`, with shapes in place of the composition's parameters.

  `same_tokens` says whether the models read the anchor's ids or are aligned by
  the text, as they were when the composition was trained; None to look.
  """
  if not augmenting:
    raise InputError("there is no augmenting model to compose the anchor with")
  joined, tokenizers, sources = [], {}, dict(anchor.sources)
  for name, model in augmenting.items():
    if not re.fullmatch("[^/=,]+", check_text("an augmenting name", name)):
      raise InputError(f"augmenting model {name!r}: a name has no / = or ,")
    if model.is_composed or anchor.is_composed:
      raise InputError("compose takes single models, not compositions")
    same = same_tokens
    if same is None:
      same = _has_same_tokens(name, model, anchor)
    if not same:
      tokenizers[name] = model.tokenizer
    configs = model.spec.anchor, anchor.spec.anchor
    joined.append((name, connect(*configs, connections, **options)))
    sources |= {f"augmenting/{name}": s for s in model.sources.values()}
  spec = Composition(anchor.spec.anchor, tuple(joined))
  params = anchor.params | {
    "augmenting": {n: m.params["anchor"] for n, m in augmenting.items()},
    "composition": cross_attention.param_shapes(spec),
  }
  return dataclasses.replace(
    anchor, spec=spec, params=params, tokenizers=tokenizers, sources=sources
  )


def _has_same_tokens(name: str, augmenting: Model, anchor: Model) -> bool:
  """True if two models read the same ids; InputError if these can be aligned
  neither by number nor by the text."""
  size, anchor_size = (m.spec.anchor.vocab_size for m in (augmenting, anchor))
  ours, anchors = augmenting.tokenizer, anchor.tokenizer
  if ours is None or anchors is None:
    if size == anchor_size:
      return True
    raise InputError(
      f"augmenting model {name!r} has a vocabulary of {size}, the anchor one "
      f"of {anchor_size}, and different tokens are aligned by the text: both "
      "models need a tokenizer (tokenizer.json or tokenizer.model)"
    )
  # Models of a family pad their tables differently.
  holds_all = size >= min(anchor_size, anchors.vocab_size)
  if holds_all and ours.fingerprint == anchors.fingerprint:
    return True
  anchors.spell(anchors.encode("a b"))  # Raises if nobody can tell.
  return False


def join_compositions(models: Sequence[AnyModel]) -> AnyModel:
  """One composition of several that were trained apart, on one anchor (§3.2).

  Where several connections reach one layer, their contributions come from the
  same hidden state and are summed. Raises InputError if models are single,
  anchors are not equal to the bit, or an augmenting name is there twice.
  """
  check_type("models", models, Iterable, "give a list of compositions")
  models = list(models)
  for model in models:
    check_type("one of the models", model, Model, "load it by load_composed")
  if not models or not all(m.is_composed for m in models):
    raise InputError("only compositions can be joined, and at least one")
  first = models[0]
  joined, tokenizers, sources = {}, {}, {}
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
  spec = Composition(first.spec.anchor, tuple(joined.items()))
  return dataclasses.replace(
    first, spec=spec, params=params, tokenizers=tokenizers, sources=sources
  )


def _check_same_anchor(a: Model, b: Model) -> None:
  """Raises InputError unless two compositions have equal anchors."""
  if a.spec.anchor != b.spec.anchor:
    raise InputError(
      "the compositions have different anchors: "
      f"{a.spec.anchor} and {b.spec.anchor}"
    )
  prints = {x.tokenizer.fingerprint for x in (a, b) if x.tokenizer is not None}
  if len(prints) > 1:
    raise InputError("the compositions have anchors with different tokenizers")
  anchors = [m.params["anchor"] for m in (a, b)]
  ours, theirs = map(trees.flatten, anchors)
  if ours.keys() == theirs.keys() and all(
    leaf is theirs[name] for name, leaf in ours.items()
  ):
    return  # The very same arrays need no hashing.
  prints = [trees.fingerprint(params) for params in anchors]
  if prints[0] != prints[1]:
    raise InputError(
      "the compositions have anchors with different weights "
      f"({a.origin or 'unknown'} and {b.origin or 'unknown'}, fingerprints "
      f"{prints[0][:12]} and {prints[1][:12]}): a composition works with the "
      "anchor that it was trained with only"
    )
