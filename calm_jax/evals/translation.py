"""Translation into English: FLORES-200, few-shot, chrF1 (§4.2)."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.evals import chrf, fewshot
from calm_jax.evals.base import Evaluation

TARGET = "eng_Latn"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translation(fewshot.FewShot):
  """Translation into English: FLORES-200, or two aligned files.

  Attributes:
    path: FLORES (see `read_flores`), or text in the language.
    target: the English of `path`, line by line; empty for FLORES.
    rows, pool_rows: the slices of aligned files, such as "6000:", that are the
      test set, and that exemplars are drawn from.
  """

  target: str = ""
  rows: str = ""
  pool_rows: str = ""

  def evaluation(self) -> Evaluation:
    """Reads the files; InputError if they are not as they must be."""
    if self.target:
      pairs = read_pairs(self.path, self.target, self.language)
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
  sources, targets = (
    _flores_lines(Path(path), code, split) for code in (language, TARGET)
  )
  if len(sources) != len(targets):
    raise InputError(
      f"{path}: {split} has {len(sources)} lines of {language} and "
      f"{len(targets)} of {TARGET}; they must be the same sentences"
    )
  return _pairs(language, sources, targets)


def read_pairs(
  path: str | Path, target: str | Path, language: str
) -> list[dict[str, Any]]:
  """Reads lines of `path` and their English in `target`, as `read_flores`."""
  sources, targets = (_file_lines(Path(file)) for file in (path, target))
  if len(sources) != len(targets):
    raise InputError(
      f"{path} has {len(sources)} lines and {target} has {len(targets)}; line "
      "i of one must translate line i of the other"
    )
  return _pairs(language, sources, targets)


def _pairs(
  language: str, sources: list[str], targets: list[str]
) -> list[dict[str, Any]]:
  name = language_name(language)
  pairs = enumerate(zip(sources, targets, strict=True), start=1)
  return [
    {"id": i, "language": name, "source": source, "target": target}
    for i, (source, target) in pairs
  ]


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


def _flores_lines(path: Path, language: str, split: str) -> list[str]:
  wanted = f"{split}/{language}.{split}"
  if path.is_dir() and not (path / split).is_dir():
    zips = sorted(path.glob("*.zip"))
    if len(zips) != 1:
      raise InputError(
        f"{path} holds neither FLORES' folder {split}/ nor one zip file"
      )
    (path,) = zips
  if path.is_dir():
    if not (path / wanted).is_file():
      raise _missing(path, wanted, [p.stem for p in (path / split).iterdir()])
    return _file_lines(path / wanted)
  return _split(_from_zip(path, wanted, split))


def _file_lines(path: Path) -> list[str]:
  if not path.is_file():
    raise InputError(f"no sentences at {path}: there is no such file")
  return _split(path.read_text(encoding="utf-8"))


def _split(text: str) -> list[str]:
  # Not splitlines(): it also splits at rarer characters within a sentence.
  return text.removesuffix("\n").split("\n")


def _from_zip(path: Path, wanted: str, split: str) -> str:
  try:
    with zipfile.ZipFile(path) as archive:
      inside = {
        "/".join(name.split("/")[-2:]): name for name in archive.namelist()
      }
      if wanted not in inside:
        here = [Path(n).stem for n in inside if n.startswith(f"{split}/")]
        raise _missing(path, wanted, here)
      return archive.read(inside[wanted]).decode("utf-8")
  except (OSError, zipfile.BadZipFile) as error:
    raise InputError(f"cannot read FLORES from {path}: {error}") from error


def _missing(path: Path, wanted: str, here: list[str]) -> InputError:
  return InputError(
    f"{path} has no {wanted}; of that split it has {sorted(here)}"
  )
