"""A model as a user holds it: architecture, parameters, tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import beside, composition, decode, tree
from calm_jax.connections import (
  Augmenting,
  Composition,
  Connection,
  default_connections,
)
from calm_jax.errors import InputError
from calm_jax.models import folders, loading
from calm_jax.tokenizer import Tokenizer, load_tokenizer

Array = jax.Array


@functools.partial(jax.jit, static_argnames="spec")
def _logits(params, spec, *inputs):
  return composition.forward(params, spec, *inputs)[0]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """One decoder, or a composition of several.

  Attributes:
    spec: the architectures and how they are joined.
    params: for one decoder its own tree, for a composition {"anchor",
      "augmenting", "composition"} (design: one tree).
    tokenizer: None if the checkpoint has none; only calls that need text
      raise then.
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
  sources: dict[str, folders.Source] = dataclasses.field(default_factory=dict)

  @property
  def is_composed(self) -> bool:
    return bool(self.spec.augmenting)

  @property
  def tree(self) -> dict[str, Any]:
    """The parameters as `composition.forward` takes them."""
    return self.params if self.is_composed else {"anchor": self.params}

  @property
  def num_params(self) -> int:
    """Parameters of all models together."""
    return tree.count(self.params)

  @property
  def num_composition_params(self) -> int:
    """Trainable parameters that the composition adds; 0 for one model."""
    return tree.count(self.params["composition"]) if self.is_composed else 0

  def logits(self, tokens_BL) -> Array:
    """Next-token logits of full rows.

    Args:
      tokens_BL: integers [B, L].

    Returns:
      float32 [B, L, V].

    Raises:
      InputError: not two axes, not integers, an id outside the vocabulary, or
        rows longer than the models' length limit.
    """
    tokens_BL = np.asarray(tokens_BL)
    if tokens_BL.ndim != 2 or tokens_BL.dtype.kind not in "iu":
      raise InputError(
        "tokens must be integers [B, L], got "
        f"{tokens_BL.dtype} {list(tokens_BL.shape)}"
      )
    V = self.spec.anchor.vocab_size
    if tokens_BL.size and not 0 <= tokens_BL.min() <= tokens_BL.max() < V:
      raise InputError(
        f"token ids run from {tokens_BL.min()} to {tokens_BL.max()}; the "
        f"vocabulary has ids 0 to {V - 1}"
      )
    limit = decode.max_length(self.spec)
    if tokens_BL.shape[1] > limit:
      raise InputError(
        f"rows of {tokens_BL.shape[1]} tokens exceed the models' length "
        f"limit of {limit}"
      )
    sequence = composition.plain_sequence(jnp.asarray(tokens_BL, jnp.int32))
    if any(a.visibility == "encoder" for _, a in self.spec.augmenting):
      raise InputError(
        "logits(tokens) cannot tell where the prompts end, which "
        "visibility='encoder' needs; call composition.forward with `visible`"
      )
    return _logits(self.tree, self.spec, sequence, *self.beside(tokens_BL))

  def beside(self, tokens_BL, prompt_length: int = 0):
    """What the augmenting models read: `augmenting` and `visible` of `forward`.

    Args:
      tokens_BL: full rows of the anchor's ids.
      prompt_length: how many ids of each row are its prompt, if known.

    Returns:
      By name the rows and what is visible of them; (None, None) if all models
      read the same tokens.

    Raises:
      InputError: the anchor's tokenizer cannot tell what its ids spell.
    """
    if not self.tokenizers:
      return None, None
    rows, visible = beside.from_ids(
      self.text(), self.tokenizers, np.asarray(tokens_BL), prompt_length
    )
    sequence = composition.plain_sequence(jnp.asarray(tokens_BL, jnp.int32))
    ends_BL = jnp.full(sequence.tokens.shape, prompt_length)
    for name, joined in self.spec.augmenting:
      if name in self.tokenizers:
        visible[name] = composition.limit_visible(
          joined.visibility, visible[name], ends_BL
        )
      else:
        rows[name] = sequence
        visible[name] = composition.visible_tokens(
          joined.visibility, ends_BL.shape, ends_BL
        )
    return rows, visible

  def generate(
    self,
    prompts: list[str],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
  ) -> list[str]:
    """Continues texts, greedily unless a temperature is given.

    Args:
      prompts: texts; a BOS token is put before each if the tokenizer has one.
      max_new_tokens: longest continuation, which ends early at EOS.
      temperature: 0 for the likeliest token at each step.
      seed: of the sampling.
      batch_size: rows that decode together.

    Returns:
      The continuations without their prompts.

    Raises:
      InputError: the model has no tokenizer, prompts is a single string, or a
        prompt is too long.
    """
    tokenizer = self.text()
    if self.tokenizers:
      raise InputError(
        "generation of a composition of models with different tokenizers is"
        " not there yet"
      )
    if isinstance(prompts, str):
      raise InputError("prompts must be a list of texts, got one str")
    ids = [with_bos(tokenizer, tokenizer.encode(p)) for p in prompts]
    new = decode.generate(
      self.tree,
      self.spec,
      ids,
      max_new_tokens=max_new_tokens,
      stop=tokenizer.eos_id,
      sampler=decode.Sampler(temperature),
      seed=seed,
      batch_size=batch_size,
    )
    return [
      tokenizer.decode_continuation(p, n) for p, n in zip(ids, new, strict=True)
    ]

  def cross_attention(
    self, ids: list[int], prompt_length: int
  ) -> dict[str, np.ndarray]:
    """Where each connection's heads look, for one sequence of token ids.

    Args:
      ids: the sequence.
      prompt_length: how many of them are the prompt; visibility="encoder"
        shows no others.

    Returns:
      "weights" float32 [C, N, L, M], "tokens" [L] their pieces (ids without a
      tokenizer), "connections" [C] their names, and "augmenting_tokens" [M]
      where the augmenting model's are others.

    Raises:
      InputError: this is not a composition, or one of several augmenting models
        with different tokenizers.
    """
    if not self.is_composed:
      raise InputError("a single model has no cross-attention to look at")
    sequence = composition.plain_sequence(jnp.array([ids], jnp.int32))
    rows, visible = self.beside(sequence.tokens, prompt_length)
    own = {}
    if rows is None:
      ends = jnp.full(sequence.tokens.shape, prompt_length)
      visible = {
        name: composition.visible_tokens(joined.visibility, ends.shape, ends)
        for name, joined in self.spec.augmenting
      }
    elif len(rows) > 1:
      raise InputError(
        "several augmenting models with different tokenizers cannot be looked"
        " at together: their keys are different tokens"
      )
    else:
      [(name, row)] = rows.items()
      pieces = self.tokenizers[name].pieces
      own["augmenting_tokens"] = np.array([pieces[i] for i in row.tokens[0]])
    look: dict = {}
    composition.states(self.tree, self.spec, sequence, rows, visible, look=look)
    pieces = self.tokenizer.pieces if self.tokenizer else range(max(ids) + 1)
    return own | {
      "weights": np.stack([np.asarray(w)[0] for w in look.values()]),
      "tokens": np.array([str(pieces[i]) for i in ids]),
      "connections": np.array([f"{n}/{c.name}" for n, c in look]),
    }

  # Loaded within the methods below: the modules import this one.

  def export_hf(
    self,
    folder: str | os.PathLike,
    max_shard_size: int = loading.MAX_SHARD_SIZE,
  ) -> None:
    """Writes a single model as safetensors that transformers loads.

    With the config.json and tokenizer files that it was loaded with; a model
    that was not loaded from a checkpoint is written as a Llama.

    Args:
      folder: is created; must not hold a model yet.
      max_shard_size: bytes of tensors in one file.

    Raises:
      InputError: a composition, a folder that holds a model, or parameters
        that are not those of the config.json.
    """
    from calm_jax import artefact

    artefact.export_hf(self, folder, max_shard_size)

  def save(self, folder: str | os.PathLike, dtype: str | None = None) -> None:
    """Saves a composition: Θ_C, and what it was trained with.

    Writes composition.safetensors, calm_config.json and a model card; of the
    frozen models only where they are and their hashes. `load_composed` reads
    it.

    Args:
      folder: is created; must not hold a composition yet.
      dtype: of Θ_C in the file; as it is if None.

    Raises:
      InputError: a single model; a model that was not loaded from a
        checkpoint or is no longer what the checkpoint holds.
    """
    from calm_jax import artefact

    artefact.save(self, folder, dtype)

  def push_to_hub(
    self,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    dtype: str | None = None,
  ) -> str:
    """Saves a composition and uploads it to the Hugging Face hub.

    Args:
      repo_id: `org/name`; made if there is none.
      private: whether a new repository is private; the hub's default if None.
      token: of the hub; that of `hf auth login` if None.
      dtype: see `save`.

    Returns:
      The repository's URL.

    Raises:
      InputError: what `save` raises, or the hub refuses.
    """
    from calm_jax import artefact

    return artefact.push(self, repo_id, private, token, dtype)

  def part(self, name: str) -> LanguageModel:
    """One model of a composition: "anchor" or "augmenting/<name>".

    Raises:
      InputError: there is no such part.
    """
    from calm_jax import joining

    return joining.part(self, name)

  def add(
    self, name: str, model: LanguageModel, connections=None, **options
  ) -> LanguageModel:
    """A composition with one augmenting model more (§3.2).

    What is new is fresh, what was there is the same arrays: train it with
    `trainable=("composition/<name>/.*",)`.

    Args:
      name: of the new augmenting model.
      model: a single model.
      connections: as in `compose`.
      **options: as in `compose`.

    Raises:
      InputError: the name is taken, or what `compose` raises.
    """
    from calm_jax import joining

    return joining.add(self, name, model, connections, **options)

  def drop(self, name: str) -> LanguageModel:
    """The composition without one augmenting model; without any, the anchor.

    Raises:
      InputError: there is no such augmenting model.
    """
    from calm_jax import joining

    return joining.drop(self, name)

  def text(self) -> Tokenizer:
    """The tokenizer, or an InputError that says why there is none."""
    if self.tokenizer is None:
      raise InputError(
        f"{self.origin or 'this model'} was loaded without a tokenizer; put "
        "its tokenizer.json or tokenizer.model into the folder to use text"
      )
    return self.tokenizer


def with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
  """Ids behind the BOS token, if there is one."""
  return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]


def load_model(
  path_or_hub_id: str, dtype: str = "float32", *, revision: str | None = None
) -> LanguageModel:
  """Loads a Hugging Face checkpoint: safetensors only, never pickle.

  Args:
    path_or_hub_id: a folder, or an id on the Hugging Face hub.
    dtype: of the parameters and the computation.
    revision: a branch, tag or commit on the hub; its main branch if None.

  Raises:
    InputError: a missing folder, a family or option that is not supported, or
      tensors that are unknown, missing, duplicate, misshapen or truncated.
  """
  return from_source(folders.locate(path_or_hub_id, revision), dtype)


def from_source(source: folders.Source, dtype: str) -> LanguageModel:
  """`load_model` of a checkpoint that was located."""
  folder = source.folder
  config = dataclasses.replace(loading.load_config(folder), dtype=dtype)
  params = loading.load_params(folder, config, dtype=dtype)
  source = source._replace(config=folders.read_json(folder / folders.CONFIG))
  return LanguageModel(
    Composition(config),
    # Unlike jnp.asarray, it takes aligned memory over without a copy.
    jax.tree.map(jax.device_put, params),
    find_tokenizer(folder),
    source.name,
    sources={"anchor": source},
  )


def find_tokenizer(folder: pathlib.Path) -> Tokenizer | None:
  """The tokenizer of a checkpoint's folder, None if it has none."""
  names = "tokenizer.json", "tokenizer.model"
  if not any((folder / name).exists() for name in names):
    return None
  return load_tokenizer(str(folder))


def compose(
  anchor: LanguageModel,
  augmenting: LanguageModel | dict[str, LanguageModel],
  connections=None,
  *,
  visibility: str = "causal",
  norm: bool = True,
  output_init: str = "zeros",
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
    output_init: see `Augmenting`.
    seed: of the fresh parameters.

  Returns:
    A model whose logits are the anchor's, bit for bit, until it is trained
    (with output_init="zeros").

  Raises:
    InputError: there is no augmenting model, vocabularies differ and a model
      has no tokenizer to align them by, or a connection is impossible.
  """
  if isinstance(augmenting, LanguageModel):
    augmenting = {"augmenting": augmenting}
  if not augmenting:
    raise InputError("there is no augmenting model to compose the anchor with")
  parts, tokenizers = [], {}
  for name, model in augmenting.items():
    if model.is_composed or anchor.is_composed:
      raise InputError("compose takes single models, not compositions")
    if not has_same_tokens(name, model, anchor):
      tokenizers[name] = model.tokenizer
    parts.append((name, join(
      model.spec.anchor, anchor.spec.anchor, connections,
      visibility=visibility, norm=norm, output_init=output_init,
    )))  # fmt: skip
  spec = Composition(anchor.spec.anchor, tuple(parts))
  params = {
    "anchor": anchor.params,
    "augmenting": {name: m.params for name, m in augmenting.items()},
    "composition": composition.init(jax.random.key(seed), spec),
  }
  sources = dict(anchor.sources)
  for name, model in augmenting.items():
    sources |= {f"augmenting/{name}": s for s in model.sources.values()}
  return LanguageModel(
    spec, params, anchor.tokenizer, anchor.origin, tokenizers, sources
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
