"""Translation into English: FLORES-200, few-shot, chrF1 (§4.2)."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.data import records
from calm_jax.evals import chrf, fewshot
from calm_jax.evals.base import Evaluation

TARGET = "eng_Latn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translation(fewshot.FewShot):
  """Translation into English: FLORES-200, or two aligned files.

  `path` is FLORES (see `read_flores`), or text in the language.
  """

  target: str = ""  # the English of `path`, line by line; empty for FLORES
  # Slices of aligned files, such as "6000:": the test set, and the exemplars'.
  rows: str = ""
  pool_rows: str = ""

  def evaluation(self) -> Evaluation:
    """Reads the files; InputError if they are not as they must be."""
    if self.target:
      pairs = read_pairs(Path(self.path), Path(self.target), self.language)
      items = fewshot.take(pairs, self.rows, self.limit)
      pool = fewshot.take(pairs, self.pool_rows)
    else:
      items, pool = (
        read_flores(self.path, self.language, s) for s in ("devtest", "dev")
      )
      items = fewshot.take(items, limit=self.limit)
    return self.few_shot("translation", "chrf1", items, pool, chrf.judge())


def read_flores(
  path: str | Path, language: str, split: str
) -> list[dict[str, Any]]:
  """Reads sentences of a language and their English ones.

  Args:
    path: FLORES' folder (dev/lij_Latn.dev and so on), its zip, or a folder
      that holds either of them. Nothing is unpacked.
    language: FLORES' code, such as lij_Latn.
    split: dev or devtest.

  Returns rows of "id" (the line, from 1), "language", "source" and "target";
  raises InputError if the language or its pairs are not there.
  """
  codes = language, TARGET
  text, english = (_flores_file(Path(path), code, split) for code in codes)
  return read_pairs(text, english, language)


def read_pairs(
  path: files.Readable, target: files.Readable, language: str
) -> list[dict[str, Any]]:
  """Reads lines of `path` and their English in `target`, as `read_flores`."""
  row = {"language": language_name(language)}
  pairs = records.parallel(path, target, ("source", "target"))
  return [{"id": i} | row | pair for i, pair in files.read_entries(pairs)]


def language_name(code: str) -> str:
  """FLORES-200's English name of a language code."""
  path = fewshot.PROMPTS / "flores_languages.tsv"
  lines = files.read_text(path).split("\n")
  names = dict(line.split("\t") for line in lines)
  if code not in names:
    raise InputError(
      f"{path} has no language {code!r}; give FLORES-200's code of it"
    )
  return names[code]


def _flores_file(path: Path, language: str, split: str) -> files.Readable:
  folder, name = _flores_folder(path, split), f"{language}.{split}"
  for file in (folder / name, folder / f"{name}.gz"):
    if file.is_file():
      return file
  here = sorted(Path(file.name).stem for file in folder.iterdir())
  raise InputError(f"{path} has no {split}/{name}; of that split it has {here}")


def _flores_folder(path: Path, split: str) -> files.Readable:
  """The folder dev/ or devtest/ of FLORES, or of a zip file of it."""
  zips = [path]
  if path.is_dir():
    if folder := _subfolder(path, split):
      return folder
    zips = sorted(path.glob("*.zip"))
  if len(zips) != 1:
    raise InputError(
      f"{path} holds neither FLORES' folder {split}/ nor one zip file"
    )
  try:
    archive = zipfile.Path(zips[0])
  except (OSError, zipfile.BadZipFile) as error:
    raise InputError(f"cannot read FLORES from {zips[0]}: {error}") from error
  names = archive.root.namelist()
  if len(set(names)) < len(names):
    raise InputError(f"{zips[0]} holds several files of one name")
  if folder := _subfolder(archive, split):
    return folder
  raise InputError(f"{zips[0]} holds no folder {split}/")


def _subfolder(root: files.Readable, name: str) -> files.Readable | None:
  """The folder of this name in `root`, or in the only folder that has it."""
  if (root / name).is_dir():
    return root / name
  found = [top / name for top in root.iterdir() if (top / name).is_dir()]
  if len(found) > 1:
    raise InputError(f"{root} holds several folders {name}/: name one of them")
  return found[0] if found else None
