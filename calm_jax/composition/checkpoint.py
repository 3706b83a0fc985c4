"""A composition as a folder to keep and share.

composition.safetensors   Θ_C: the trained leaves, under their names
calm_config.json          connections, options, origins and hashes of the models
README.md                 a model card
chat_template.jinja       that of the anchor's tokenizer, if it has one
"""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from calm_jax.composition import gguf_files, hf_checkpoint, model_files
from calm_jax.composition.model import Model, join_compositions, untrained
from calm_jax.composition.model_card import model_card
from calm_jax.composition.model_files import Location
from calm_jax.core import files, hub, trees
from calm_jax.core.errors import InputError, check_choice, check_folder
from calm_jax.core.version import __version__
from calm_jax.models import quantisation
from calm_jax.models.hf import loading
from calm_jax.text.side_files import CHAT_TEMPLATE, read_chat_template
from calm_jax.text.tokenizer import find_tokenizer

WEIGHTS = "composition.safetensors"
CONFIG = hub.COMPOSITION
CARD = "README.md"

_FORMAT = 1
_REMEDY = (
  "write it by part({!r}).export_hf(FOLDER), load_model(FOLDER) and compose "
  "what was loaded"
)


def save(
  model: Model,
  folder: str | os.PathLike,
  dtype: str | None = None,
  keep_paths: bool = True,
) -> None:
  """Saves a composition in a new folder, to be read by `load_composed`.

  Writes Θ_C (in `dtype` if given), a model card, and of the frozen models
  only where they are and their hashes. Models beside the new folder, or in
  folders there, are named relative to it: a run can be moved as a whole. Of
  other folders, `keep_paths` keeps the whole path.
  Raises InputError for a single model, a folder that holds a composition, or a
  model that was not loaded from a checkpoint or is no longer what that holds.
  """
  folder = check_folder("folder", folder)
  if not model.is_composed:
    raise InputError(
      "save() is for compositions; a single model is written by export_hf()"
    )
  check_choice("dtype", dtype, (None, *loading.DTYPES))
  for name in (CONFIG, WEIGHTS):
    if (folder / name).exists():
      raise InputError(
        f"{folder} holds a composition already ({name}); give another folder"
      )
  names = ["anchor", *(f"augmenting/{n}" for n, _ in model.spec.augmenting)]
  run = folder if keep_paths else None
  models = {part: describe(model, part, run) for part in names}
  for name, _ in model.spec.augmenting:
    same = name not in model.tokenizers
    models[f"augmenting/{name}"]["same_tokens"] = same
  config: dict[str, Any] = {
    "format": _FORMAT,
    "calm_jax_version": __version__,
    "num_params": model.num_composition_params,
    # From here a composition that was moved alone finds models beside it.
    "folder": os.path.abspath(folder) if keep_paths else None,
    "models": models,
    "augmenting": [
      {"name": n} | {k: v for k, v in vars(joined).items() if k != "config"}
      for n, joined in model.spec.augmenting
    ],
  }
  theta = trees.flatten({"composition": model.params["composition"]})
  if dtype is not None:
    theta = {name: leaf.astype(dtype) for name, leaf in theta.items()}
  theta = jax.tree.map(np.asarray, theta)
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(theta, folder / WEIGHTS, {"format": "calm_jax"})
  config["sha256"] = files.sha256(folder / WEIGHTS)
  (folder / CARD).write_text(model_card(config), encoding="utf-8")
  if model.tokenizer and (template := model.tokenizer.chat_template):
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
  # Last: a folder that has it is complete.
  files.write_json(folder / CONFIG, config)


def describe(
  model: Model, part: str, folder: pathlib.Path | None
) -> dict[str, Any]:
  """A frozen model's entry in calm_config.json: its origin and its hashes."""
  source = model.sources.get(part)
  if source is None:
    raise InputError(
      f"the {part} was not loaded from a checkpoint, so there is nothing "
      f"that the composition could name: {_REMEDY.format(part)}"
    )
  single = model.part(part)
  config, params = single.spec.anchor, single.params["anchor"]
  if changed := loading.changed_leaf(source.folder, config, params):
    raise InputError(
      f"the {part} is no longer what {source.name} holds ({changed} differs), "
      f"so the composition could not be loaded again: {_REMEDY.format(part)}"
    )
  text = find_tokenizer(source.folder)
  described = None
  if text is not None:
    described = {"fingerprint": text.fingerprint, "vocab_size": text.vocab_size}
  return {
    "name": model_files.name(source, folder),
    "revision": source.revision,
    "ignore": source.ignore,
    "dtype": config.compute.dtype,
    "quantise": quantisation.kind_of(params),
    "sha256": model_files.hashes(source.folder),
    "tokenizer": described,
  }


def push_to_hub(
  model: Model,
  repo_id: str,
  *,
  private: bool | None = None,
  token: str | None = None,
  dtype: str | None = None,
) -> str:
  """Saves a composition and uploads it to the hub; returns the URL.

  Args:
    repo_id: `org/name`; made if there is none.
    private: whether a new repository is private; the hub's default if None.
    token: of the hub; that of `hf auth login` if None.
    dtype: of Θ_C, as for `save`.
  """
  with tempfile.TemporaryDirectory() as folder:
    # Local paths are of no use to others, and none of their business.
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


def describes_composition(
  path_or_hub_id: Location, *locations: Location | Mapping | None
) -> bool:
  """Tells a composition's folder or hub id from a single model's.

  InputError for a single model with locations of the models of a composition.
  """
  names = (CONFIG, hub.CONFIG)
  folder = gguf_files.locate(path_or_hub_id, None, names).folder
  is_composed = (folder / CONFIG).exists()
  if any(locations) and not is_composed:
    raise InputError(
      f"{path_or_hub_id} is no composition: anchor and augmenting say where "
      "the models of one are"
    )
  return is_composed


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The calm_config.json of a folder; InputError if it cannot be read."""
  if not (folder / CONFIG).exists():
    problem = hub.no_checkpoint(folder)
    if (folder / hub.CONFIG).exists():
      problem = f"{folder} holds a single model, which load_model loads"
    raise InputError(f"no {CONFIG}: {problem}")
  config = files.read_json(folder / CONFIG)
  if config.get("format") != _FORMAT:
    raise InputError(
      f"{folder / CONFIG} has format {config.get('format')!r}, this calm_jax "
      f"{__version__} reads {_FORMAT}; it was written by calm_jax "
      f"{config.get('calm_jax_version')!r}"
    )
  return config


def load(
  path_or_hub_id: Location,
  anchor: Location | None,
  augmenting: Location | Mapping[str, Location] | None,
  dtype: str | None,
  revision: str | None,
  quantise: str | None,
  shardings: Callable[[str], Callable | None] | None,
) -> Model:
  """Reads what `save` wrote; see `language_model.load_composed`."""
  names = (WEIGHTS, CONFIG, CARD, CHAT_TEMPLATE)
  folder = hub.locate(path_or_hub_id, revision, names).folder
  config = read_config(folder)
  sources = model_files.find(folder, config, anchor, augmenting)
  frozen = {}
  for part, saved in config["models"].items():
    source = sources[part]
    model_files.check(source.folder, part, config)
    # Older compositions do not say how they were quantised.
    kind = saved.get("quantise", "") if quantise is None else quantise
    places = shardings(part) if shardings else None
    model = hf_checkpoint.load(
      source, dtype or saved["dtype"], places, kind, saved.get("ignore", ())
    )
    ours = model.tokenizer.fingerprint if model.tokenizer else None
    theirs = saved["tokenizer"]["fingerprint"] if saved["tokenizer"] else None
    if ours != theirs:
      raise InputError(
        f"{source.folder}: the tokenizer is not that of the {part} that the "
        f"composition was trained with (fingerprint {ours}, then {theirs})"
      )
    frozen[part] = model
  compositions = []
  for options in config["augmenting"]:
    name = options.pop("name")
    one, saved = frozen[f"augmenting/{name}"], config["models"]
    same = saved[f"augmenting/{name}"].get("same_tokens")
    if same is None:
      same = _had_same_tokens(frozen["anchor"], one)
    options["same_tokens"] = same
    compositions.append(untrained(frozen["anchor"], {name: one}, **options))
  composed = join_compositions(compositions)
  theta = _read_theta(folder, config["sha256"], composed.params["composition"])
  tokenizer, template = composed.tokenizer, folder / CHAT_TEMPLATE
  if tokenizer and template.is_file():
    # What it was trained with, whatever the anchor's folder has now.
    text = read_chat_template(template)
    tokenizer = dataclasses.replace(tokenizer, chat_template=text)
  return dataclasses.replace(
    composed,
    params=composed.params | {"composition": theta},
    tokenizer=tokenizer,
    origin=str(path_or_hub_id),
  )


def _had_same_tokens(anchor: Model, augmenting: Model) -> bool:
  """The rule of older compositions, which do not say how they are aligned."""
  both = anchor, augmenting
  sizes = {model.spec.anchor.vocab_size for model in both}
  prints = {model.tokenizer.fingerprint for model in both if model.tokenizer}
  return len(sizes) == 1 and len(prints) < 2


def _read_theta(folder: pathlib.Path, sha256: str, shapes: dict) -> dict:
  """Θ_C from its file, if the leaves are those of `shapes` in any dtype."""
  path = folder / WEIGHTS
  if not path.exists():
    raise InputError(f"{path} is missing")
  files.check_content(path)
  if files.sha256(path) != sha256:
    raise InputError(
      f"{path} is not what {CONFIG} describes: its sha256 is not {sha256}; "
      "copy the composition again"
    )
  leaves = safetensors.numpy.load_file(path)
  expected = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaves.get(name, leaf).dtype)
    for name, leaf in trees.flatten({"composition": shapes}).items()
  }
  trees.check_same_structure(leaves, expected, str(path))
  return jax.tree.map(jnp.asarray, trees.unflatten(leaves)["composition"])
