"""Finds and writes the safetensors files of a checkpoint, and no others."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import huggingface_hub
import ml_dtypes
import numpy as np
import safetensors

from calm_jax.core import files, hub
from calm_jax.core.errors import InputError
from calm_jax.core.hub import INDEX, WEIGHTS

FLOATS = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_SHOWN = 8


class Tensor(NamedTuple):
  """A tensor in a file: `start` is its first byte there."""

  name: str
  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  start: int

  def __str__(self) -> str:
    return f"{self.name} {list(self.shape)} ({self.path.name})"


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the safetensors files of a checkpoint.

  Raises InputError if there are none, two sets of them, or one is missing.
  """
  if (folder / hub.ADAPTER).exists():
    raise InputError(
      f"{hub.no_checkpoint(folder)}; where the weights beside it are merged "
      f"already, remove {hub.ADAPTER}"
    )
  single, index = folder / WEIGHTS, folder / INDEX
  paths = folder.glob("*.safetensors")
  others = sorted(path.name for path in paths if path.exists())
  if index.exists():
    shards = files.read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
      raise InputError(f"{index} has no weight_map from tensors to files")
    names = sorted({str(s) for s in shards.values()})
    for name in names:
      if pathlib.PurePath(name).name != name:
        raise InputError(f"{index} names a file outside its folder: {name!r}")
    missing = sorted(set(names) - set(others))
    if others and missing == names:
      raise InputError(
        f"{index} is stale: of the files that it names none is there, only "
        f"{others[:_SHOWN]}; remove it, or get the files {names[:_SHOWN]}"
      )
    if missing:
      raise InputError(
        f"{index} names {missing[0]}, which is missing: finish the download, "
        "or remove the index if it is stale"
      )
    if single.exists() and WEIGHTS not in names:
      raise InputError(
        f"{folder} has two sets of weights, {WEIGHTS} and {INDEX}: move one "
        "away"
      )
    return [folder / name for name in names]
  if single.exists():
    return [single]
  raise InputError(
    f"neither {WEIGHTS} nor {INDEX}, and no other weights are read or "
    f"downloaded: {hub.no_checkpoint(folder)}"
  )


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Lists the tensors of a safetensors file by name; none is read yet.

  Raises InputError if the file is missing, truncated or no safetensors.
  """
  try:
    with safetensors.safe_open(path, framework="np"):
      pass  # It checks the header, but does not say where a tensor starts.
  except (OSError, safetensors.SafetensorError) as error:
    files.check_content(path)
    raise InputError(
      f"cannot read {path}: truncated or not safetensors; download it again "
      f"({error})"
    ) from error
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
  header.pop("__metadata__", None)
  tensors = {}
  for name, entry in header.items():
    shape, start = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
    tensors[name] = Tensor(name, path, entry["dtype"], shape, start)
  return tensors


def open_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
  """Lists all tensors of a checkpoint by name; none is read yet.

  Raises as `weight_files` and `read_header`, or if two files hold one tensor.
  """
  tensors: dict[str, Tensor] = {}
  for path in weight_files(folder):
    for name, tensor in read_header(path).items():
      if name in tensors:
        both = f"{tensors[name]}, {tensor}"
        raise InputError(f"two files hold one tensor: {both}")
      tensors[name] = tensor
  return tensors


def write_tensors(
  folder: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  dtype: str,
  value: Callable[[str], np.ndarray],
  max_shard_size: int,
) -> None:
  """Writes tensors as model.safetensors, or as shards and their index.

  They are written in the order of `shapes`, all of one dtype; `value` makes
  each by its name when its turn comes. A file has at most `max_shard_size`
  bytes of tensors, or a single one that is larger.
  """
  itemsize = np.dtype(dtype).itemsize
  split = huggingface_hub.split_state_dict_into_shards_factory(
    dict(shapes),
    get_storage_size=lambda shape: math.prod(shape) * itemsize,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=max_shard_size,
  )
  for file, names in split.filename_to_tensors.items():
    shard = {name: shapes[name] for name in names}
    _write_file(folder / file, shard, dtype, value)
  if split.is_sharded:
    weight_map = split.tensor_to_filename
    index = {"metadata": split.metadata, "weight_map": weight_map}
    files.write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_file(path: pathlib.Path, shapes, dtype: str, value) -> None:
  """Writes one safetensors file; the library would hold all its tensors."""
  codes = {dtype: code for code, dtype in FLOATS.items()}
  # transformers refuses a file that does not say who wrote it.
  header: dict = {"__metadata__": {"format": "pt"}}
  at = 0
  for name, shape in shapes.items():
    end = at + math.prod(shape) * np.dtype(dtype).itemsize
    code, offsets = codes[np.dtype(dtype)], [at, end]
    header[name] = {"dtype": code, "shape": shape, "data_offsets": offsets}
    at = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
  part = path.with_name(path.name + ".part")
  with part.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in shapes:
      array = np.ascontiguousarray(value(name)).reshape(-1)
      file.write(array.view(np.uint8).data)
  part.replace(path)
