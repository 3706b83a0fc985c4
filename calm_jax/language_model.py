"""A model as a user holds it: architecture, parameters, tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from calm_jax.composition import checkpoint, export, forward, joining
from calm_jax.composition.connections import Composition
from calm_jax.core import hub, trees
from calm_jax.core.batch import plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.generation import attention_maps, batching
from calm_jax.generation import inputs as inputs_lib
from calm_jax.generation import text as text_lib
from calm_jax.generation.sampling import Sampler
from calm_jax.generation.scoring import Score
from calm_jax.models import quantisation
from calm_jax.models.hf import loading
from calm_jax.text.alignment import ChunkEncoder
from calm_jax.text.tokenizer import Tokenizer

Array = jax.Array


@functools.partial(jax.jit, static_argnames="spec")
def _logits(params, spec, *inputs):
  return forward.forward(params, spec, *inputs)[0]


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
  sources: dict[str, hub.Source] = dataclasses.field(default_factory=dict)

  @property
  def is_composed(self) -> bool:
    return bool(self.spec.augmenting)

  @property
  def tree(self) -> dict[str, Any]:
    """The parameters as `composition.forward` takes them."""
    return self.params if self.is_composed else {"anchor": self.params}

  @property
  def num_params(self) -> int:
    """Parameters of all models together, each counted once if quantised."""
    return trees.count(jax.eval_shape(quantisation.dequantise, self.params))

  @property
  def num_composition_params(self) -> int:
    """Trainable parameters that the composition adds; 0 for one model."""
    return trees.count(self.params["composition"]) if self.is_composed else 0

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
    limit = batching.max_length(self.spec)
    if tokens_BL.shape[1] > limit:
      raise InputError(
        f"rows of {tokens_BL.shape[1]} tokens exceed the models' length "
        f"limit of {limit}"
      )
    sequence = plain_sequence(tokens_BL.astype(np.int32))
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
    return inputs_lib.of_model(self, tokens_BL, prompt_length)

  def generate(
    self,
    prompts: str | list[str],
    max_new_tokens: int = 64,
    *,
    stop: str | Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    batch_size: int = 64,
    **sampling,
  ) -> str | list[str]:
    """Continues texts, greedily unless a temperature is given.

    Args:
      prompts: texts; a BOS token is put before each if the tokenizer has one.
      max_new_tokens: longest continuation, which ends early at EOS.
      stop: texts that end a continuation; they are not returned.
      seed: of the drawing: one for all, from which prompt i draws with
        seed + i, or one a prompt. Neighbours in the batch make no difference.
      batch_size: rows that decode together.
      **sampling: temperature, top_k, top_p, min_p, repetition_penalty; see
        `Sampler`.

    Returns:
      The continuations without their prompts: a list for a list.

    Raises:
      InputError: the model has no tokenizer, or a prompt is too long.
    """
    alone = isinstance(prompts, str)
    prompts = [prompts] if alone else list(prompts)
    if isinstance(seed, int):
      seeds = [seed + i for i in range(len(prompts))]
    else:
      seeds = list(seed)
    if len(seeds) != len(prompts):
      raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    texts = text_lib.generate(
      self,
      prompts,
      max_new_tokens,
      Sampler(**sampling),
      stop=[stop] if isinstance(stop, str) else stop,
      seeds=seeds,
      batch_size=batch_size,
    )
    return texts[0] if alone else texts

  def stream(
    self,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    **sampling,
  ) -> Iterator[str]:
    """The continuation of one text in pieces; arguments of `generate`."""
    return text_lib.stream(
      self,
      prompt,
      max_new_tokens,
      Sampler(**sampling),
      stop=[stop] if isinstance(stop, str) else stop,
      seed=seed,
    )

  def score(
    self, prompts: list[str], completions: list[str], *, batch_size: int = 16
  ) -> list[Score]:
    """How likely completions are after prompts, in nats.

    Args:
      prompts: texts; a BOS token is put before each if the tokenizer has one.
      completions: one a prompt.
      batch_size: rows that are computed together.

    Returns:
      One `Score(logprob, num_tokens, is_greedy)` a prompt.

    Raises:
      InputError: the model has no tokenizer, a prompt is too long, or has no
        tokens while there is no BOS to begin with.
    """
    return text_lib.score(self, prompts, completions, batch_size)

  def readers(self) -> dict:
    """By name, makers of `batching.Reader`s of models with other tokens."""
    return {
      name: functools.partial(
        inputs_lib.TextReader, self.text(), ChunkEncoder(tokenizer)
      )
      for name, tokenizer in self.tokenizers.items()
    }

  def attention(self, prompt: str, completion: str) -> dict[str, np.ndarray]:
    """Where each connection's heads look while a completion is written.

    `figures.attention_figure` draws it.

    Returns:
      `cross_attention`'s arrays, and "prompt_length" in tokens.

    Raises:
      InputError: as `cross_attention`, or the model has no tokenizer.
    """
    tokenizer = self.text()
    ids = text_lib.with_bos(tokenizer, tokenizer.encode(prompt))
    new = tokenizer.encode_continuation(prompt, completion)
    return self.cross_attention(ids + new, len(ids)) | {
      "prompt_length": len(ids)
    }

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
    return attention_maps.cross_attention(self, ids, prompt_length)

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
      InputError: a composition, a quantised model, a folder that holds a
        model, or parameters that are not those of the config.json.
    """
    export.export_hf(self, folder, max_shard_size)

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
    checkpoint.save(self, folder, dtype)

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
    return checkpoint.push(self, repo_id, private, token, dtype)

  def part(self, name: str) -> LanguageModel:
    """One model of a composition: "anchor" or "augmenting/<name>".

    Raises:
      InputError: there is no such part.
    """
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
    return joining.add(self, name, model, connections, **options)

  def drop(self, name: str) -> LanguageModel:
    """The composition without one augmenting model; without any, the anchor.

    Raises:
      InputError: there is no such augmenting model.
    """
    return joining.drop(self, name)

  def text(self) -> Tokenizer:
    """The tokenizer, or an InputError that says why there is none."""
    if self.tokenizer is None:
      raise InputError(
        f"{self.origin or 'this model'} was loaded without a tokenizer; put "
        "its tokenizer.json or tokenizer.model into the folder to use text"
      )
    return self.tokenizer
