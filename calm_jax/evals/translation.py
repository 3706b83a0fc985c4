"""Translation into English: FLORES-200, few-shot, chrF1 (§4.2)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calm_jax.core.errors import InputError
from calm_jax.evals import chrf, fewshot
from calm_jax.evals.base import Generate, Outcome

SHOTS = 5  # the paper's
TARGET = "eng_Latn"


def translation(
  items: Sequence[dict[str, Any]],
  pool: Sequence[dict[str, Any]],
  generate: Generate,
  *,
  shots: int = SHOTS,
  seed: int = 0,
  prompt: str | Path = "translation",
  fits: Callable[[str], bool] | None = None,
) -> Outcome:
  """chrF1 of translations.

  Args:
    items: of the test split, such as `read_flores` gives.
    pool: of the dev split, which the exemplars are drawn from.
    generate, prompt: see `fewshot.answers`.
    shots, seed, fits: see `fewshot.prompts`.

  Returns:
    See `chrf.outcome`.

  Raises:
    InputError: what `fewshot.answers` raises.
  """
  rows = fewshot.answers(
    prompt, items, pool, generate, shots=shots, seed=seed, fits=fits
  )
  return chrf.outcome(rows, seed)


def read_flores(
  path: str | Path, language: str, split: str, name: str | None = None
) -> list[dict[str, Any]]:
  """Sentences of a language beside their English ones.

  Args:
    path: FLORES' folder (dev/lij_Latn.dev and so on), its zip, or a folder
      that holds the zip. Nothing is unpacked.
    language: FLORES' code, such as lij_Latn.
    split: dev or devtest.
    name: of the language in prompts; FLORES' own if None.

  Returns:
    {"id", "language", "source", "target"}; id is the line, from 1.

  Raises:
    InputError: nothing there, no such language, or lines that do not pair.
  """
  sources, targets = (
    _lines(Path(path), code, split) for code in (language, TARGET)
  )
  if len(sources) != len(targets):
    raise InputError(
      f"{path}: {split} has {len(sources)} lines of {language} and "
      f"{len(targets)} of {TARGET}; they must be the same sentences"
    )
  name = name or language_name(language)
  return [
    {"id": i, "language": name, "source": source, "target": target}
    for i, (source, target) in enumerate(
      zip(sources, targets, strict=True), start=1
    )
  ]


def read_pairs(
  path: str | Path, target: str | Path, language: str, rows: str = ""
) -> list[dict[str, Any]]:
  """Lines of one file beside the English ones of another.

  Args:
    path, target: text files; line i of one translates line i of the other.
    language: FLORES' code of the first, such as lij_Latn.
    rows: a slice of the lines; see `fewshot.take_rows`.

  Returns:
    As `read_flores`.

  Raises:
    InputError: no such file, not as many lines, or no such rows.
  """
  sources, targets = (_file_lines(Path(file)) for file in (path, target))
  if len(sources) != len(targets):
    raise InputError(
      f"{path} has {len(sources)} lines and {target} has {len(targets)}; line "
      "i of one must translate line i of the other"
    )
  name = language_name(language)
  items = [
    {"id": i, "language": name, "source": source, "target": english}
    for i, (source, english) in enumerate(
      zip(sources, targets, strict=True), start=1
    )
  ]
  return fewshot.take_rows(items, rows)


def language_name(code: str) -> str:
  """FLORES-200's English name of a language code."""
  path = fewshot.PROMPTS / "flores_languages.tsv"
  lines = path.read_text(encoding="utf-8").splitlines()
  names = dict(line.split("\t") for line in lines)
  if code not in names:
    raise InputError(f"{path} has no name for {code!r}; give the name")
  return names[code]


def _lines(path: Path, language: str, split: str) -> list[str]:
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
      _missing(path, wanted, sorted(p.stem for p in (path / split).iterdir()))
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
        _missing(path, wanted, sorted(here))
      return archive.read(inside[wanted]).decode("utf-8")
  except (OSError, zipfile.BadZipFile) as error:
    raise InputError(f"cannot read FLORES from {path}: {error}") from error


def _missing(path: Path, wanted: str, here: list[str]):
  raise InputError(f"{path} has no {wanted}; of that split it has {here}")
