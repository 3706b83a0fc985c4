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
from calm_jax.text import side_files
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
  model: Model, folder: str | os.PathLike, max_shard_size: int
) -> None:
  """Writes a single model; see `transformers_folder.export_hf`."""
  folder = check_folder("folder", folder)
  max_shard_size = check_int("max_shard_size", max_shard_size, 1)
  export.check_new(folder)
  copied = text_files(model)
  export.write(folder, tensors(model), max_shard_size)
  copy_text_files(model, copied, folder)


def tensors(model: Model) -> export.Tensors:
  """Returns a single model as a checkpoint's tensors.

  It has the config.json that it was loaded with, or a Llama's. Raises
  InputError if it is quantised, or not what the config.json describes.
  """
  if kind := quantisation.kind_of(model.params):
    raise InputError(
      f"{model.origin or 'the model'} is in {kind}, no longer what was "
      "trained: export it from where it was loaded, without quantise"
    )
  source, described = model.sources.get("anchor"), None
  if source is not None:
    described = hub.read_config(source.folder, source.ignore)
  config, params = model.spec.anchor, model.params["anchor"]
  return export.tensors(config, params, described)


def copy_text_files(
  model: Model, copied: dict[str, pathlib.Path], folder: pathlib.Path
) -> None:
  """Copies some of a model's `text_files`, and writes its chat template."""
  for name, path in copied.items():
    copy = folder / name
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, copy)
  template = model.tokenizer.chat_template if model.tokenizer else None
  if template and side_files.read(folder).chat_template() != template:
    # A composition's may be another one than that of its anchor's folder.
    copy = folder / side_files.CHAT_TEMPLATE
    copy.write_text(template, encoding="utf-8")


def text_files(model: Model) -> dict[str, pathlib.Path]:
  """Finds a model's tokenizer files, by the names they have in a checkpoint."""
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
