"""Folders of Hugging Face checkpoints: found, downloaded, opened.

safetensors only: a pickled checkpoint (*.bin, *.pt) runs any code it likes
when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import huggingface_hub
import safetensors
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from calm_jax.errors import InputError
from calm_jax.models.streaming import INDEX, WEIGHTS, Tensor

CONFIG = "config.json"
HUB_FILES = (
  "model*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt"
)  # fmt: skip
# What belongs to a tokenizer and to generation, copied along with a model.
TEXT_FILES = (
  "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
  "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
  "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHOWN = 8


class Source(NamedTuple):
  """Where a checkpoint came from.

  Attributes:
    name: the folder or hub id that was asked for.
    revision: the commit on the hub; None for a folder.
    folder: where its files are.
    config: its config.json.
  """

  name: str
  revision: str | None
  folder: pathlib.Path
  config: dict[str, Any] | None = None


def locate(
  path_or_hub_id: str | os.PathLike,
  revision: str | None = None,
  files: Sequence[str] = HUB_FILES,
) -> Source:
  """Finds a checkpoint's folder, downloaded first if need be.

  Args:
    path_or_hub_id: a folder, or an id on the Hugging Face hub, `org/name`.
    revision: a branch, tag or commit on the hub; its main branch if None.
    files: patterns of what is downloaded; by default safetensors, JSON and
      tokenizer files only.

  Raises:
    InputError: no such folder, a revision of a folder, or the hub does not
      have it or cannot be reached. What cannot be a hub id fails without
      asking the network.
  """
  name = str(path_or_hub_id)
  path = pathlib.Path(name).expanduser()
  if name and path.is_dir():
    if revision is not None:
      raise InputError(
        f"{name} is a folder, which has no revision {revision!r}; only an id "
        "on the hub has revisions"
      )
    return Source(name, None, path)
  if name and path.exists():
    raise InputError(f"{name} is a file; give the folder that it is in")
  if not _HUB_ID.fullmatch(name):
    raise InputError(
      f"no folder {name!r}; give one with {CONFIG} and {WEIGHTS}, or an id on "
      "the Hugging Face hub, which looks like org/name"
    )
  try:
    found = huggingface_hub.snapshot_download(
      name, revision=revision, allow_patterns=list(files)
    )
  except (OSError, HfHubHTTPError, HFValidationError) as error:
    at = "" if revision is None else f" at revision {revision!r}"
    raise InputError(
      f"cannot get {name}{at}: there is no such folder here, and the Hugging "
      f"Face hub answered: {error}\nCheck the spelling and the network; a "
      "gated model needs `hf auth login`; without a network, run `hf download "
      f"{name} --local-dir FOLDER` elsewhere and give FOLDER"
    ) from error
  folder = pathlib.Path(found)
  # The cache names a snapshot's folder by its commit, whatever was asked for.
  return Source(name, folder.name, folder)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; InputError if the file is missing or anything else."""
  try:
    read = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise InputError(
      f"{path} is missing: {path.parent} holds no Hugging Face checkpoint"
    ) from error
  except (OSError, ValueError) as error:
    raise InputError(f"{path} is not readable JSON: {error}") from error
  if not isinstance(read, dict):
    raise InputError(f"{path} is not a JSON object but {type(read).__name__}")
  return read


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a checkpoint.

  Raises:
    InputError: there are none, two sets of them, or one is missing.
  """
  single, index = folder / WEIGHTS, folder / INDEX
  if single.exists() and index.exists():
    raise InputError(
      f"{folder} has both {WEIGHTS} and {INDEX}: two sets of weights; move "
      "one of them away"
    )
  if single.exists():
    return [single]
  if index.exists():
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
      raise InputError(f"{index} has no weight_map from tensors to files")
    names = sorted({str(s) for s in shards.values()})
    for name in names:
      if pathlib.PurePath(name).name != name:
        raise InputError(f"{index} names a file outside its folder: {name!r}")
      if not (folder / name).exists():
        raise InputError(
          f"{index} names {name}, which is missing; the download may not have "
          "finished"
        )
    return [folder / name for name in names]
  others = sorted(p.name for p in folder.glob("*.safetensors"))
  pickled = sorted(
    p.name
    for p in folder.glob("*")
    if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
  )
  if others:
    raise InputError(
      f"{folder} has neither {WEIGHTS} nor {INDEX}, only {others[:_SHOWN]}"
    )
  if pickled:
    raise InputError(
      f"{folder} has weights as {pickled[:_SHOWN]} only. These are pickles, "
      "which run any code they hold when read, so they are never opened here: "
      "convert them to safetensors, with transformers where you trust them: "
      "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
    )
  raise InputError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")


def _check_readable(path: pathlib.Path) -> None:
  try:
    with safetensors.safe_open(path, framework="np"):
      return
  except (OSError, safetensors.SafetensorError) as error:
    hint = "truncated or not safetensors; download it again"
    if path.is_file():
      with path.open("rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
          hint = "only git-lfs's pointer to the file; run `git lfs pull`"
    raise InputError(f"cannot read {path}: {hint} ({error})") from error


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a safetensors file by name; none is read yet.

  Raises:
    InputError: the file is missing, truncated or no safetensors.
  """
  _check_readable(path)
  # The library checks the header, and does not say where a tensor starts,
  # which reading into place needs.
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
  header.pop("__metadata__", None)
  return {
    name: Tensor(
      name,
      path,
      found["dtype"],
      tuple(found["shape"]),
      8 + length + found["data_offsets"][0],
    )
    for name, found in header.items()
  }


def sha256(path: pathlib.Path) -> str:
  """The hash of a file, as the hub shows it."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def open_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of a checkpoint by name; none is read yet.

  Raises:
    InputError: there are no weights, they are pickled, a file is missing or
      corrupt, or two files hold the same tensor.
  """
  found: dict[str, Tensor] = {}
  for path in weight_files(folder):
    for name, tensor in read_header(path).items():
      if name in found:
        raise InputError(f"two files hold one tensor: {found[name]}, {tensor}")
      found[name] = tensor
  return found
