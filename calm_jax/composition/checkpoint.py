"""A composition as a folder to keep and share: Θ_C, and what it fits.

composition.safetensors   the trained leaves, under their names
calm_config.json          connections, options, the frozen models' origins
                          and hashes
README.md                 a model card
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
from typing import Any

import huggingface_hub
import numpy as np
import safetensors.numpy
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from calm_jax.composition import joining
from calm_jax.composition.connections import Augmenting
from calm_jax.core import files, hub, trees
from calm_jax.core.errors import InputError
from calm_jax.core.version import __version__
from calm_jax.models import quantisation
from calm_jax.models.hf import loading, weight_files
from calm_jax.text import tokenizer

WEIGHTS = "composition.safetensors"
CONFIG = "calm_config.json"
CARD = "README.md"
_FORMAT = 1


def save(
  model,
  folder: str | os.PathLike,
  dtype: str | None = None,
  keep_paths: bool = True,
) -> None:
  """See `LanguageModel.save`.

  Args:
    model: a composition.
    folder: is created.
    dtype: of Θ_C in the file.
    keep_paths: whether local folders are named by their whole path.
  """
  folder = pathlib.Path(folder)
  if not model.is_composed:
    raise InputError(
      "save() is for compositions; a single model is written by export_hf()"
    )
  if dtype is not None and dtype not in loading.DTYPES:
    raise InputError(f"dtype={dtype!r} is none of {loading.DTYPES}")
  for name in (CONFIG, WEIGHTS):
    if (folder / name).exists():
      raise InputError(
        f"{folder} holds a composition already ({name}); give another folder"
      )
  parts = ["anchor", *(f"augmenting/{n}" for n, _ in model.spec.augmenting)]
  for part in parts:
    if part not in model.sources:
      raise InputError(
        f"the {part} was not loaded from a checkpoint, so there is nothing "
        f"that the composition could name: write it by part({part!r})"
        ".export_hf(FOLDER), load_model(FOLDER) and compose what was loaded"
      )
  described = {part: _describe(model, part, keep_paths) for part in parts}
  theta = {
    name: np.asarray(leaf if dtype is None else leaf.astype(dtype))
    for name, leaf in trees.flatten(
      {"composition": model.params["composition"]}
    ).items()
  }
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(theta, folder / WEIGHTS, {"format": "calm_jax"})
  config = {
    "format": _FORMAT,
    "calm_jax_version": __version__,
    "num_params": model.num_composition_params,
    "sha256": files.sha256(folder / WEIGHTS),
    "models": described,
    "augmenting": [
      {"name": name} | {
        field.name: getattr(joined, field.name)
        for field in dataclasses.fields(Augmenting)
        if field.name != "config"
      }
      for name, joined in model.spec.augmenting
    ],
  }  # fmt: skip
  (folder / CARD).write_text(_card(config), encoding="utf-8")
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _describe(model, part: str, keep_paths: bool) -> dict[str, Any]:
  """Where a frozen model came from, and the hashes of what it is made of."""
  source = model.sources[part]
  single = joining.part(model, part)
  config = single.spec.anchor
  changed = loading.changed_leaf(source.folder, config, single.params)
  if changed:
    raise InputError(
      f"the {part} is no longer what {source.name} holds ({changed} differs), "
      f"so the composition could not be loaded again: write it by "
      f"part({part!r}).export_hf(FOLDER), load_model(FOLDER) and compose what "
      "was loaded"
    )
  name = source.name
  if source.revision is None:
    path = pathlib.Path(name).expanduser().resolve()
    name = str(path) if keep_paths else path.name
  text = tokenizer.find_tokenizer(source.folder)
  return {
    "name": name,
    "revision": source.revision,
    "dtype": config.compute.dtype,
    "quantise": quantisation.kind_of(single.params),
    "sha256": hashes(source.folder),
    "tokenizer": text and {
      "fingerprint": text.fingerprint,
      "vocab_size": text.vocab_size,
    },
  }  # fmt: skip


def hashes(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 by name of the files that a checkpoint's weights come from."""
  paths = [folder / hub.CONFIG, *weight_files.weight_files(folder)]
  return {path.name: files.sha256(path) for path in paths}


def _card(config: dict[str, Any]) -> str:
  models = config["models"]
  on_hub = [m["name"] for m in models.values() if m["revision"] is not None]
  header = huggingface_hub.ModelCardData(
    library_name="calm_jax",
    base_model=on_hub or None,
    base_model_relation="adapter" if on_hub else None,
    pipeline_tag="text-generation",
    tags=["calm_jax", "calm", "composition"],
  ).to_yaml()
  rows = []
  for part, model in models.items():
    at = f" at `{model['revision']}`" if model["revision"] else ""
    name = model["name"] if at else pathlib.Path(model["name"]).name
    bits = f" in {model['quantise']}" if model["quantise"] else ""
    rows.append(f"| {part} | `{name}`{at}{bits} |")
  joints = [
    f"- `{a['name']}`: layers "
    + ", ".join(f"{i} → {j}" for i, j in a["connections"])
    + f" (augmenting → anchor), visibility {a['visibility']}"
    for a in config["augmenting"]
  ]
  return "\n".join([
    "---", header, "---", "",
    "# A composition of frozen language models", "",
    "Trained with [CALM](https://arxiv.org/abs/2401.02412) in calm_jax "
    f"{config['calm_jax_version']}: {config['num_params']:,} parameters of "
    "projections and cross-attentions. The models that it joins are not in "
    "here; they are found by name, and refused if their files have changed.",
    "", "| model | origin |", "|---|---|", *rows, "", *joints, "",
    "    import calm_jax", "",
    "    composed = calm_jax.load_composed(\"THIS_FOLDER_OR_ID\")",
    "    composed.generate([\"...\"])", "",
  ])  # fmt: skip


def push(
  model,
  repo_id: str,
  private: bool | None,
  token: str | None,
  dtype: str | None,
) -> str:
  """See `LanguageModel.push_to_hub`."""
  with tempfile.TemporaryDirectory() as folder:
    # Of no use to others, and none of their business.
    save(model, folder, dtype, keep_paths=False)
    try:
      api = huggingface_hub.HfApi(token=token)
      url = api.create_repo(repo_id, private=private, exist_ok=True)
      api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="Upload a composition",
      )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
      raise InputError(
        f"cannot push to {repo_id}: {error}\nCheck the name, that the token "
        "may write (`hf auth login`), and the network; save(FOLDER) and "
        "`hf upload` do the same in two steps"
      ) from error
  return str(url)


def describes_composition(path_or_hub_id: str | os.PathLike) -> bool:
  """Whether a folder or hub id is a composition's, not a single model's."""
  files = (CONFIG, hub.CONFIG)
  return (hub.locate(path_or_hub_id, None, files).folder / CONFIG).exists()


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  if not (folder / CONFIG).exists():
    raise InputError(f"{folder} holds no composition: it has no {CONFIG}")
  config = hub.read_json(folder / CONFIG)
  if config.get("format") != _FORMAT:
    raise InputError(
      f"{folder / CONFIG} has format {config.get('format')!r}, this calm_jax "
      f"{__version__} reads {_FORMAT}; it was written by calm_jax "
      f"{config.get('calm_jax_version')!r}"
    )
  return config
