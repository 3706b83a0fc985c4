"""The safetensors files of a checkpoint, and the tensors that they hold.

safetensors only: a pickled checkpoint (*.bin, *.pt) runs any code it likes
when it is read.
"""

from __future__ import annotations

import json
import pathlib

import safetensors

from calm_jax.core.errors import InputError
from calm_jax.core.hub import INDEX, WEIGHTS, read_json
from calm_jax.models.hf.safetensors import Tensor

_SHOWN = 8


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
