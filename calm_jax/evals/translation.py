"""Translation into English: FLORES-200, few-shot, chrF1 (§4.2)."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.evals import chrf, fewshot
from calm_jax.evals.base import Evaluation

TARGET = "eng_Latn"
File = Path | zipfile.Path


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
    return self.few_shot("translation", "chrf1", items, pool, chrf.judge)


def read_flores(
  path: str | Path, language: str, split: str
) -> list[dict[str, Any]]:
  """Reads sentences of a language and their English ones.

  Args:
    path: FLORES' folder (dev/lij_Latn.dev and so on), its zip, or a folder
      that holds the zip. Nothing is unpacked.
    language: FLORES' code, such as lij_Latn.
    split: dev or devtest.

  Returns rows of "id" (the line, from 1), "language", "source" and "target";
  raises InputError if the language or its pairs are not there.
  """
  codes = language, TARGET
  files = (_flores_file(Path(path), code, split) for code in codes)
  return read_pairs(*files, language)


def read_pairs(path: File, target: File, language: str) -> list[dict[str, Any]]:
  """Reads lines of `path` and their English in `target`, as `read_flores`."""
  sources, targets = _lines(path), _lines(target)
  if len(sources) != len(targets):
    raise InputError(
      f"{path} has {len(sources)} lines and {target} has {len(targets)}; line "
      "i of one must translate line i of the other"
    )
  name = language_name(language)
  pairs = enumerate(zip(sources, targets, strict=True), start=1)
  return [
    {"id": i, "language": name, "source": source, "target": target}
    for i, (source, target) in pairs
  ]


def _lines(path: File) -> list[str]:
  if not path.is_file():
    raise InputError(f"no sentences at {path}: there is no such file")
  # Not splitlines(): it also splits at rarer characters within a sentence.
  return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def language_name(code: str) -> str:
  """FLORES-200's English name of a language code."""
  path = fewshot.PROMPTS / "flores_languages.tsv"
  lines = path.read_text(encoding="utf-8").splitlines()
  names = dict(line.split("\t") for line in lines)
  if code not in names:
    raise InputError(
      f"{path} has no language {code!r}; give FLORES-200's code of it"
    )
  return names[code]


def _flores_file(path: Path, language: str, split: str) -> File:
  folder, name = _flores_folder(path, split), f"{language}.{split}"
  if not (folder / name).is_file():
    here = sorted(Path(file.name).stem for file in folder.iterdir())
    raise InputError(
      f"{path} has no {split}/{name}; of that split it has {here}"
    )
  return folder / name


def _flores_folder(path: Path, split: str) -> File:
  """The folder dev/ or devtest/ of FLORES, or of a zip file of it."""
  if (path / split).is_dir():
    return path / split
  if path.is_dir():
    zips = sorted(path.glob("*.zip"))
    if len(zips) != 1:
      raise InputError(
        f"{path} holds neither FLORES' folder {split}/ nor one zip file"
      )
    (path,) = zips
  try:
    archive = zipfile.Path(path)
  except (OSError, zipfile.BadZipFile) as error:
    raise InputError(f"cannot read FLORES from {path}: {error}") from error
  for top in (archive, *archive.iterdir()):
    if (top / split).is_dir():
      return top / split
  raise InputError(f"{path} holds no folder {split}/")
