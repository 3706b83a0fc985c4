"""A single model as a folder that transformers loads."""

from __future__ import annotations

import os
import pathlib
import shutil

from calm_jax.core import hub
from calm_jax.core.errors import InputError
from calm_jax.models import quantisation
from calm_jax.models.hf import loading


def export_hf(model, folder: str | os.PathLike, max_shard_size: int) -> None:
  """See `LanguageModel.export_hf`."""
  if model.is_composed:
    raise InputError(
      "a composition is no Hugging Face model: save() it, or export its parts "
      "by part('anchor').export_hf(FOLDER)"
    )
  if kind := quantisation.kind_of(model.params):
    raise InputError(
      f"the model is in {kind}, which is no longer what was trained: export it "
      "from where it was loaded, without quantise"
    )
  source = model.sources.get("anchor")
  text_files = _text_files(model)
  loading.save_params(
    folder,
    model.spec.anchor,
    model.params,
    source and source.config,
    max_shard_size,
  )
  for name, path in text_files.items():
    shutil.copyfile(path, pathlib.Path(folder) / name)


def _text_files(model) -> dict[str, pathlib.Path]:
  """The tokenizer's files, by the name they have in a checkpoint."""
  if "anchor" in model.sources:
    folder = model.sources["anchor"].folder
  elif model.tokenizer is None:
    return {}
  else:
    path = pathlib.Path(model.tokenizer.source).expanduser()
    if path.is_file():
      return {f"tokenizer{path.suffix}": path}
    folder = hub.locate(path, files=hub.TEXT_FILES).folder
  found = {name: folder / name for name in hub.TEXT_FILES}
  return {name: path for name, path in found.items() if path.is_file()}
