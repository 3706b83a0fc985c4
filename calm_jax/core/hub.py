"""Finds the folder of a Hugging Face checkpoint, or downloads it.

Weights are downloaded as safetensors only: a pickled checkpoint (*.bin, *.pt)
runs any code it likes when it is read.
"""

import fnmatch
import glob
import os
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from calm_jax.core.errors import InputError, check_path, check_text
from calm_jax.core.files import read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
COMPOSITION = "calm_config.json"  # in place of CONFIG, of a composition
_SMALL_FILES = (
  "*.json",
  "*.jinja",
  "tokenizer.model",
  "merges.txt",
  "vocab.txt",
)
# Files of a tokenizer and of generation, copied along with a model.
# fmt: off
TEXT_FILES = (
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
  "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
  "merges.txt", GENERATION, "chat_template.jinja",
  "additional_chat_templates/*.jinja",
)
# fmt: on
# Files of what is no checkpoint to load: what they are, and what to do instead.
_OTHERS = {
  COMPOSITION: "a composition. Load it by load_composed, not load_model",
  f"{ADAPTER} adapter_model.*": (
    "an adapter, only what was added to a base model. Merge them by peft: "
    "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
    ".save_pretrained(NEW), and give NEW"
  ),
  "*.gguf": (
    "GGUF, the format of llama.cpp. Give the path of the .gguf file itself, or "
    "the checkpoint that it was made from"
  ),
  "global_step* zero_to_fp32.py *_states.pt": (
    "DeepSpeed's training state. Its own zero_to_fp32.py, with "
    "--safe_serialization, writes the weights; put config.json beside them"
  ),
  "*.distcp": (
    "PyTorch's sharded training state. Load it where it was trained and write "
    "the whole model by save_pretrained(NEW)"
  ),
  "_CHECKPOINT_METADATA _METADATA manifest.ocdbt checkpoints": (
    "training state of Orbax. A run of calm_jax goes on from it; the model is "
    "in the run's folder `composition` or `model` once it is complete"
  ),
  "consolidated* params.json": (
    "weights under their authors' own names. Give the checkpoint in Hugging "
    "Face's format, or convert them by transformers"
  ),
  "*.bin *.pt *.pth *.ckpt *.pkl *.pickle": (
    "pickles, which run any code they hold when read, and are never opened "
    "here. Where you trust them, convert them to safetensors by transformers: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
  ),
  "*.h5 *.msgpack *.onnx *.tflite *.npz *.mlx model_index.json": (
    "a model of another framework. Give the checkpoint in safetensors"
  ),
  "*.zip *.tar *.tgz *.tar.*": "an archive. Unpack it and give its folder",
}
_BELOW = ("*", "*/*", "models--*/snapshots/*")  # the last in the hub's cache
_SHOWN = 8
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(.+))?")


class CheckpointRef(NamedTuple):
  """A checkpoint that was located."""

  name: str  # The folder or hub id that was asked for.
  revision: str | None  # The commit on the hub; None for a folder.
  folder: pathlib.Path  # The folder that holds its files.
  ignore: tuple[str, ...] = ()  # Keys that its config.json is read without.


def locate(
  path_or_hub_id: str | os.PathLike,
  revision: str | None = None,
  files: Sequence[str] = (),
) -> CheckpointRef:
  """Finds a checkpoint's folder, or downloads it from the Hugging Face hub.

  It is a folder, or `org/name` on the hub with a branch, tag or commit as its
  revision, which `org/name@revision` gives too, by default its main branch;
  InputError if neither. Only `files` that match are downloaded; if none are
  given, the weights that the index names or model.safetensors, and what belongs
  to the model and its tokenizer.
  """
  name = check_path("path_or_hub_id", path_or_hub_id)
  if revision is not None:
    check_text("revision", revision)
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    if revision is not None:
      raise InputError(
        f"{name} is a folder, which has no revision {revision!r}; only an id "
        "on the hub has revisions"
      )
    return CheckpointRef(name, None, path)
  if path.exists():
    if kind := _other_kind([path.name]):
      raise InputError(f"{path.parent} holds {kind}")
    raise InputError(f"{name} is a file; give the folder that it is in")
  hub_id = _HUB_ID.fullmatch(name)
  if hub_id is None:
    raise InputError(
      f"no folder {name!r}; give one with {CONFIG} and {WEIGHTS}, or an id on "
      "the Hugging Face hub, which looks like org/name or org/name@revision"
    )
  name, revision = hub_id[1], revision or hub_id[2]
  try:
    folder = _download(name, revision, files or _SMALL_FILES)
    if not files:
      # Both steps at one commit, which the cache names the folder by.
      _download(name, folder.name, _weights(folder))
  except (OSError, HfHubHTTPError, HFValidationError) as error:
    at = "" if revision is None else f" at revision {revision!r}"
    raise InputError(
      f"cannot get {name}{at}: there is no such folder here, and the Hugging "
      f"Face hub answered: {error}\nCheck the spelling and the network; a "
      "gated model needs `hf auth login`; without a network, run `hf download "
      f"{name} --local-dir FOLDER` elsewhere and give FOLDER"
    ) from error
  return CheckpointRef(name, folder.name, folder)


def _download(
  name: str, revision: str | None, files: Sequence[str]
) -> pathlib.Path:
  folder = huggingface_hub.snapshot_download(
    name, revision=revision, allow_patterns=list(files)
  )
  return pathlib.Path(folder)


def _weights(folder: pathlib.Path) -> list[str]:
  """Patterns of a checkpoint's weights: the files that its index names."""
  if not (folder / INDEX).exists():
    return [WEIGHTS]
  shards = read_json(folder / INDEX).get("weight_map")
  names = {str(n) for n in shards.values()} if isinstance(shards, dict) else ()
  return [glob.escape(n) for n in sorted(names) if n.endswith(".safetensors")]


def ignored_keys(ignore: Collection[str]) -> tuple[str, ...]:
  """Returns keys as a tuple; a string has commas or plus signs between them."""
  return tuple(re.split("[,+]", ignore) if isinstance(ignore, str) else ignore)


def read_config(
  folder: pathlib.Path, ignore: Collection[str] = ()
) -> dict[str, Any]:
  """Reads a folder's config.json, but for the `ignored_keys`.

  Raises InputError if there is none.
  """
  path, ignored = folder / CONFIG, ignored_keys(ignore)
  if path.exists():
    return {k: v for k, v in read_json(path).items() if k not in ignored}
  raise InputError(f"{path} is missing: {no_checkpoint(folder)}")


def no_checkpoint(folder: pathlib.Path) -> str:
  """Says what a folder is that holds no checkpoint, and what to do."""
  names = [
    path.name if path.exists() else f"{path.name} (a broken link)"
    for path in folder.glob("*")
  ]
  below = {
    str(path.parent)
    for pattern in _BELOW
    for name in (CONFIG, COMPOSITION)
    for path in folder.glob(f"{pattern}/{name}")
    if name == COMPOSITION or any(path.parent.glob("*.safetensors"))
  }
  if below:
    return f"{folder} is no checkpoint, but holds one: give {_some(below)}"
  if kind := _other_kind(names):
    return f"{folder} holds {kind}"
  held = f"has only {_some(names)}" if names else "is empty"
  return f"{folder} holds no Hugging Face checkpoint: it {held}"


def _other_kind(names: Sequence[str]) -> str | None:
  for patterns, kind in _OTHERS.items():
    fits = {n for p in patterns.split() for n in fnmatch.filter(names, p)}
    if fits:
      return f"{_some(fits)}: {kind}"
  return None


def _some(names: Collection[str]) -> str:
  shown = sorted(names)[:_SHOWN]
  rest = len(names) - len(shown)
  return ", ".join(shown) + (f" and {rest} more" if rest else "")
