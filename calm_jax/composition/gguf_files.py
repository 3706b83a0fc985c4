"""Finds a checkpoint, also in a GGUF file, which is converted once."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from calm_jax.core import hub
from calm_jax.core.errors import InputError, check_path
from calm_jax.models.hf.gguf_checkpoint import GgufFile
from calm_jax.text import gguf_tokenizer

_SUFFIX = ".gguf"


def locate(
  path_or_hub_id: str | os.PathLike,
  revision: str | None = None,
  files: Sequence[str] = (),
) -> hub.CheckpointRef:
  """Finds a checkpoint as `hub.locate` does; a path may be a GGUF file's.

  Such a file is written as a folder in float32, once, beside what the hub's
  client keeps (HF_HOME). Its tokenizer is that of files beside it, or else its
  own. Raises InputError as `hub.locate`, or for a file that cannot be read.
  """
  name = check_path("path_or_hub_id", path_or_hub_id)
  path = Path(name).expanduser()
  if path.suffix != _SUFFIX or not path.is_file() or revision is not None:
    return hub.locate(path_or_hub_id, revision, files)
  about, file = path.stat(), path.resolve()
  key = f"{file} {about.st_size} {about.st_mtime_ns}"
  key = hashlib.sha256(key.encode()).hexdigest()[:16]
  folder = Path(constants.HF_HOME, "gguf", f"{path.stem}-{key}")
  if not folder.is_dir():
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
      _convert(path, made)
      os.replace(made, folder)
    except OSError:
      if not folder.is_dir():  # Nor did another process just make it.
        raise
    finally:
      shutil.rmtree(made, ignore_errors=True)
  return hub.CheckpointRef(name, None, folder)


def _convert(path: Path, folder: Path) -> None:
  file = GgufFile(path)
  beside = [path.parent / name for name in hub.TEXT_FILES]
  beside = [other for other in beside if other.is_file()]
  for other in beside:
    shutil.copyfile(other, folder / other.name)
  if not beside:
    try:
      gguf_tokenizer.write(file.metadata, folder)
    except (InputError, KeyError) as error:
      raise InputError(
        f"{path}: its tokenizer cannot be read ({error}): put the tokenizer "
        "files of the checkpoint that it was made from beside it"
      ) from error
  file.write_model(folder)
