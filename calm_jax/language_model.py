"""Models as a user holds them: loaded, composed, asked and saved."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from calm_jax.composition import (
  checkpoint,
  forward,
  gguf_files,
  hf_checkpoint,
  transformers_folder,
)
from calm_jax.composition.connections import Composition
from calm_jax.composition.model import Model
from calm_jax.composition.model_files import Location
from calm_jax.core.batch import Batch
from calm_jax.core.errors import (
  InputError,
  check_int,
  check_seed,
  check_text,
  check_texts,
)
from calm_jax.evals import audit
from calm_jax.generation import attention_maps, audited_models, batching, text
from calm_jax.text import stop_strings

Array = jax.Array


@functools.partial(jax.jit, static_argnames="spec")
def _logits(params: dict, spec: Composition, batch: Batch) -> Array:
  return forward.forward(params, spec, batch)[0]


class LanguageModel(Model):
  """One decoder, or a composition of several, with all that it can do.

  See `composition.model.Model` for the fields; made by `load_model`,
  `load_composed` and `compose`.
  """

  # These functions of the rooms below take the model as their first argument.
  generate = text.generate
  stream = text.stream
  score = text.score
  cross_attention = attention_maps.cross_attention
  export_hf = transformers_folder.export_hf
  save = checkpoint.save
  push_to_hub = checkpoint.push_to_hub

  def logits(self, tokens_BL) -> Array:
    """Next-token logits of full rows: integers [B, L] to float32 [B, L, V].

    Raises InputError if tokens_BL is not that, has an id outside the vocabulary
    or rows beyond the models' length limit; and for visibility="encoder", which
    needs to know where prompts end.
    """
    batch = batching.token_batch(self, tokens_BL)
    return _logits(self.params, self.spec, batch)

  def audit(
    self,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 32,
  ) -> dict[str, dict[str, Any]]:
    """Measures what a composition's answers owe to the content of m_A's states.

    Args:
      prompts: what is asked, with the right `completions`; each example that
        differs from another may lend it its states.
      max_new_tokens: of an answer; those of the longest completion, and one,
        if None.
      stop: texts that end an answer.
      draws: how many times states of other examples are drawn.
      seed: of the draws and of the noise.
      batch_size: rows that are computed together.

    Returns:
      What `evals.audit.audit` does: "answers", in percent by exact match, and
      "likelihood" of the right completions in nats per byte.

    Raises:
      InputError: the model is no composition, or as for `generate` and `score`.
    """
    prompts = check_texts("prompts", prompts)
    completions = check_texts("completions", completions)
    if len(prompts) != len(completions):
      raise InputError(
        f"{len(prompts)} prompts, {len(completions)} completions"
      )
    draws = check_int("draws", draws, 1)
    columns = audited_models.columns(self, draws, check_seed("seed", seed))
    if max_new_tokens is None:
      pairs = map(self.text().encode_pair, prompts, completions)
      max_new_tokens = 1 + max(len(new) for _, new in pairs)
    examples = audit.AuditSet(
      prompts=prompts,
      completions=completions,
      judge=audit.exact_match_judge(prompts, completions),
      max_new_tokens=max_new_tokens,
      stop=tuple(stop_strings.check(stop)),
    )
    return audit.audit(examples, columns, batch_size)

  def attention(self, prompt: str, completion: str) -> dict[str, Any]:
    """`cross_attention` of a text, and "prompt_length" in tokens."""
    check_text("prompt", prompt)
    check_text("completion", completion)
    ids, new = self.text().encode_pair(prompt, completion)
    weights = self.cross_attention(ids + new, len(ids))
    return weights | {"prompt_length": max(len(ids), 1)}


def load_model(
  path_or_hub_id: Location,
  dtype: str = "float32",
  *,
  revision: str | None = None,
  shardings: Callable[[dict], dict] | None = None,
  quantise: str = "",
  ignore: Collection[str] = (),
) -> LanguageModel:
  """Loads a Hugging Face checkpoint: safetensors only, never pickle.

  Args:
    path_or_hub_id: a folder, or an id on the Hugging Face hub.
    dtype: of the parameters and the computation.
    revision: a branch, tag or commit on the hub; its main branch if None.
    shardings: the model's tree of shapes to a tree of `jax.sharding.Sharding`:
      each process then reads what its devices hold. None for one device.
    quantise: "int8" or "int4" for matrices in few bits (docs/quantisation.md).
    ignore: keys to read config.json without: a list, or one string of them
      with commas.

  Raises:
    InputError: a missing folder, a family or option that is not supported, or
      tensors that are unknown, missing, duplicate, misshapen or truncated.
  """
  source = gguf_files.locate(path_or_hub_id, revision)
  loaded = hf_checkpoint.load(source, dtype, shardings, quantise, ignore)
  return LanguageModel(**vars(loaded))


def load_composed(
  path_or_hub_id: Location,
  anchor: Location | None = None,
  augmenting: Location | Mapping[str, Location] | None = None,
  *,
  dtype: str | None = None,
  revision: str | None = None,
  quantise: str | None = None,
  shardings: Callable[[str], Callable | None] | None = None,
) -> LanguageModel:
  """Loads what `LanguageModel.save` wrote, and the models that it joins.

  Args:
    path_or_hub_id: the composition's folder, or its id on the hub.
    anchor: where the anchor is, if not where it was: a folder or hub id.
    augmenting: the same of the augmenting model; of several a dict by name, or
      a text such as "kv=FOLDER,code=FOLDER".
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
  anchor: Location | None = None,
  augmenting: Location | Mapping[str, Location] | None = None,
  shardings: Callable[[str], Callable | None] | None = None,
  ignore: Collection[str] = (),
) -> LanguageModel:
  """`load_composed` or `load_model`, whichever the folder or id is for."""
  if checkpoint.describes_composition(path_or_hub_id, anchor, augmenting):
    return load_composed(
      path_or_hub_id,
      anchor,
      augmenting,
      dtype=dtype,
      quantise=quantise,
      shardings=shardings,
    )
  return load_model(
    path_or_hub_id,
    dtype or "float32",
    quantise=quantise or "",
    shardings=shardings("anchor") if shardings else None,
    ignore=ignore,
  )
