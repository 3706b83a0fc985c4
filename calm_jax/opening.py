"""Checkpoints on disk or on the hub, as models."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import jax

from calm_jax.connections import Composition
from calm_jax.language_model import LanguageModel
from calm_jax.models import decoder, folders, loading, quantisation
from calm_jax.tokenizer import Tokenizer, load_tokenizer


def load_model(
  path_or_hub_id: str,
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
  source = folders.locate(path_or_hub_id, revision)
  return from_source(source, dtype, shardings, quantise)


def from_source(
  source: folders.Source,
  dtype: str,
  shardings: Callable[[dict], dict] | None = None,
  quantise: str = "",
) -> LanguageModel:
  """`load_model` of a checkpoint that was located."""
  folder = source.folder
  config = dataclasses.replace(loading.load_config(folder), dtype=dtype)
  quantisation.check(quantise)
  places = shardings and shardings(
    quantisation.shapes(decoder.param_shapes(config), quantise)
  )
  params = loading.load_params(folder, config, dtype, places, quantise)
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
