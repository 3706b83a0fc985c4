"""Models as a user holds them: loaded, composed, asked and saved."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from calm_jax.composition import checkpoint, forward, hf_checkpoint
from calm_jax.composition.checkpoint import Location
from calm_jax.composition.connections import Composition
from calm_jax.composition.model import Model
from calm_jax.core import hub
from calm_jax.core.batch import Batch
from calm_jax.generation import attention_maps, batching
from calm_jax.generation import text as text_lib
from calm_jax.generation.sampling import Sampler
from calm_jax.generation.scoring import Score
from calm_jax.models.hf.export import MAX_SHARD_SIZE

Array = jax.Array


@functools.partial(jax.jit, static_argnames="spec")
def _logits(params: dict, spec: Composition, batch: Batch) -> Array:
  return forward.forward(params, spec, batch)[0]


class LanguageModel(Model):
  """One decoder, or a composition of several, with all that it can do.

  See `composition.model.Model` for the fields; made by `load_model`,
  `load_composed` and `compose`.
  """

  def logits(self, tokens_BL) -> Array:
    """Next-token logits of full rows: integers [B, L] to float32 [B, L, V].

    Raises:
      InputError: tokens_BL is not that, has an id outside the vocabulary or
        rows beyond the models' length limit; or visibility="encoder", which
        needs to know where prompts end.
    """
    tokens_BL = batching.check_tokens(self.spec, tokens_BL)
    batch = batching.token_batch(self, tokens_BL)
    return _logits(self.params, self.spec, batch)

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
      prompts: texts; each gets a BOS token if the tokenizer has one.
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
    sampler = Sampler(**sampling)
    return text_lib.generate(
      self, prompts, max_new_tokens, sampler, stop, seed, batch_size
    )

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
    sampler = Sampler(**sampling)
    return text_lib.stream(self, prompt, max_new_tokens, sampler, stop, seed)

  def score(
    self, prompts: list[str], completions: list[str], *, batch_size: int = 16
  ) -> list[Score]:
    """Log-likelihoods of completions after prompts, in nats.

    Args:
      prompts: texts; each gets a BOS token if the tokenizer has one.
      completions: one a prompt.
      batch_size: rows that are computed together.

    Raises:
      InputError: the model has no tokenizer, a prompt is too long, or has no
        tokens while there is no BOS to begin with.
    """
    return text_lib.score(self, prompts, completions, batch_size)

  def attention(self, prompt: str, completion: str) -> dict[str, np.ndarray]:
    """`cross_attention` of a text, and "prompt_length" in tokens."""
    ids, new = text_lib.token_ids(self, prompt, completion)
    found = self.cross_attention(ids + new, len(ids))
    return found | {"prompt_length": len(ids)}

  def cross_attention(
    self, ids: list[int], prompt_length: int
  ) -> dict[str, np.ndarray]:
    """Attention weights of each connection, for one sequence of token ids.

    Its first `prompt_length` are the prompt, all that visibility="encoder"
    shows. `figures.attention_figure` draws them.

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
    self, folder: str | os.PathLike, max_shard_size: int = MAX_SHARD_SIZE
  ) -> None:
    """Writes a single model as a folder that transformers loads.

    It has the config.json and tokenizer files that the model was loaded with;
    one that was not loaded from a checkpoint is written as a Llama.

    The folder is created; a file holds up to `max_shard_size` bytes.

    Raises:
      InputError: a composition, a quantised model, a folder that holds a
        model, or parameters that are not those of the config.json.
    """
    hf_checkpoint.export(self, folder, max_shard_size)

  def save(self, folder: str | os.PathLike, dtype: str | None = None) -> None:
    """Saves a composition, to be read by `load_composed`.

    Writes Θ_C (in `dtype` if given), a model card, and of the frozen models
    only where they are and their hashes. The folder is created.

    Raises:
      InputError: a single model; a folder that holds a composition; a model
        that was not loaded from a checkpoint or is no longer what that holds.
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


def load_model(
  path_or_hub_id: Location,
  dtype: str = "float32",
  *,
  revision: str | None = None,
  shardings: Callable[[dict], dict] | None = None,
  quantise: str = "",
) -> LanguageModel:
  """Loads a Hugging Face checkpoint: safetensors only, never pickle.

  Args:
    path_or_hub_id: a folder, or an id on the Hugging Face hub.
    dtype: of the parameters and the computation.
    revision: a branch, tag or commit on the hub; its main branch if None.
    shardings: the model's tree of shapes to a tree of `jax.sharding.Sharding`:
      each process then reads what its devices hold. None for one device.
    quantise: "int8" or "int4" for matrices in few bits (docs/quantisation.md).

  Raises:
    InputError: a missing folder, a family or option that is not supported, or
      tensors that are unknown, missing, duplicate, misshapen or truncated.
  """
  source = hub.locate(path_or_hub_id, revision)
  loaded = hf_checkpoint.load(source, dtype, shardings, quantise)
  return LanguageModel(**vars(loaded))


def load_composed(
  path_or_hub_id: Location,
  anchor: Location | None = None,
  augmenting: Location | Mapping[str, Location] | None = None,
  *,
  dtype: str | None = None,
  revision: str | None = None,
  quantise: str | None = None,
  shardings: Callable[[str], Callable] | None = None,
) -> LanguageModel:
  """Loads what `LanguageModel.save` wrote, and the models that it joins.

  Args:
    path_or_hub_id: the composition's folder, or its id on the hub.
    anchor: where the anchor is, if not where it was: a folder or hub id.
    augmenting: the same of the augmenting model, or of some by name.
    dtype: of the frozen models and the computation; as saved if None. Θ_C
      keeps the dtype that it was saved in.
    revision: of the composition on the hub.
    quantise: the frozen models, to "int8" or "int4", or ("") not at all; as
      they were when the composition was saved if None.
    shardings: from "anchor" or "augmenting/<name>" to what `load_model` takes.

  Raises:
    InputError: a folder without a composition, a frozen model that is not
      found, or files that are not those that the composition was trained
      with, named.
  """
  loaded = checkpoint.load(
    path_or_hub_id, anchor, augmenting, dtype, revision, quantise, shardings
  )
  return LanguageModel(**vars(loaded))


def load_any(
  path_or_hub_id: Location,
  dtype: str | None = None,
  quantise: str | None = None,
  *,
  shardings: Callable[[str], Callable] | None = None,
) -> LanguageModel:
  """`load_composed` or `load_model`, whichever the folder or id is for."""
  if checkpoint.describes_composition(path_or_hub_id):
    return load_composed(
      path_or_hub_id, dtype=dtype, quantise=quantise, shardings=shardings
    )
  return load_model(
    path_or_hub_id,
    dtype or "float32",
    quantise=quantise or "",
    shardings=shardings("anchor") if shardings else None,
  )
