"""A single model from and to a Hugging Face checkpoint."""

import os
import pathlib
import shutil
from collections.abc import Callable, Collection

import jax

from calm_jax.composition import execution
from calm_jax.composition.connections import Composition
from calm_jax.composition.model import Model
from calm_jax.core import hub
from calm_jax.core.errors import InputError, check_folder, check_int
from calm_jax.models import decoder, quantisation
from calm_jax.models.hf import export, loading
from calm_jax.text.side_files import CHAT_TEMPLATE
from calm_jax.text.tokenizer import find_tokenizer


def load(
  source: hub.CheckpointRef,
  dtype: str,
  shardings: Callable[[dict], dict] | None = None,
  quantise: str = "",
  ignore: Collection[str] = (),
) -> Model:
  """Loads the checkpoint at `source`; see `language_model.load_model`."""
  folder = source.folder
  config = loading.load_config(folder, ignore).with_compute(dtype=dtype)
  places = None
  if shardings is not None:
    shapes = quantisation.shapes(decoder.param_shapes(config), quantise)
    places = shardings(shapes)
  params = loading.load_params(folder, config, dtype, places, quantise)
  source = source._replace(ignore=hub.ignored_keys(ignore))
  spec = Composition(config)
  if shardings is None:
    # XLA cannot partition kernels: on a mesh they need a placement too.
    device = execution.Device.here()
    spec = execution.for_inference(spec, execution.Asked(unroll=1), device)
  return Model(
    spec,
    # Unlike jnp.asarray, it takes aligned memory over without a copy.
    {"anchor": jax.tree.map(jax.device_put, params)},
    find_tokenizer(folder),
    source.name,
    sources={"anchor": source},
  )


def export_hf(
  model: Model,
  folder: str | os.PathLike,
  max_shard_size: int = export.MAX_SHARD_SIZE,
) -> None:
  """Writes a single model as a new folder that transformers loads.

  It has the config.json and tokenizer files that the model was loaded with;
  one that was not loaded from a checkpoint is written as a Llama. No file
  holds more than `max_shard_size` bytes of tensors. Raises InputError for a
  composition, a quantised model, a folder that holds a model, or parameters
  that are not those of the config.json.
  """
  folder = check_folder("folder", folder)
  max_shard_size = check_int("max_shard_size", max_shard_size, 1)
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
  described = None
  if source is not None:
    described = hub.read_config(source.folder, source.ignore)
  config, params = model.spec.anchor, model.params["anchor"]
  export.save_params(folder, config, params, described, max_shard_size)
  for name, path in text_files.items():
    copy = pathlib.Path(folder) / name
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, copy)
  if model.tokenizer and (template := model.tokenizer.chat_template):
    # That of a composition's anchor may be the composition's own.
    copy = pathlib.Path(folder) / CHAT_TEMPLATE
    copy.write_text(template, encoding="utf-8")


def _text_files(model: Model) -> dict[str, pathlib.Path]:
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
  paths = [path for name in hub.TEXT_FILES for path in folder.glob(name)]
  return {str(p.relative_to(folder)): p for p in paths if p.is_file()}
