"""FLORES as it lies on disk, and its evaluation."""

from __future__ import annotations

import zipfile

import eval_data
import pytest

from calm_jax.core.errors import InputError
from calm_jax.evals import tasks
from calm_jax.evals.translation import language_name, read_flores

FILES = {
  "dev/eng_Latn.dev": "One.\nTwo\u2028cats.\nThree.\n",
  "dev/lij_Latn.dev": "Un.\nDoî gatti.\nTrei.\n",
  "devtest/eng_Latn.devtest": "A house.\nWe sing.\n",
  "devtest/lij_Latn.devtest": "Unna casa.\nCantemmo.\n",
}


@pytest.fixture(params=["folder", "zip", "folder with a zip", "nested zip"])
def flores(request, tmp_path):
  if request.param == "folder":
    for name, text in FILES.items():
      (tmp_path / name).parent.mkdir(exist_ok=True)
      (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path
  top = "flores200_dataset/" if request.param == "nested zip" else ""
  with zipfile.ZipFile(tmp_path / "flores.zip", "w") as archive:
    for name, text in FILES.items():
      archive.writestr(top + name, text)
  return tmp_path if "folder" in request.param else tmp_path / "flores.zip"


def test_sentences_are_paired_by_line(flores):
  pairs = read_flores(flores, "lij_Latn", "dev")
  assert [(p["id"], p["source"], p["target"]) for p in pairs] == [
    (1, "Un.", "One."),
    (2, "Doî gatti.", "Two\u2028cats."),
    (3, "Trei.", "Three."),
  ]
  assert {p["language"] for p in pairs} == {"Ligurian"}
  assert read_flores(flores, "lij_Latn", "devtest")[0] == {
    "id": 1, "language": "Ligurian", "source": "Unna casa.",
    "target": "A house.",
  }  # fmt: skip
  with pytest.raises(InputError, match=r"dev/vec_Latn\.dev; .*'lij_Latn'"):
    read_flores(flores, "vec_Latn", "dev")


def evaluation(path, language, shots):
  return tasks.make(
    {
      "kind": "translation", "group": "FLORES-200", "language": language,
      "path": path, "shots": shots, "max_new_tokens": 96,
    }
  )  # fmt: skip


def test_the_evaluation(flores):
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [" A house.\nLigurian: Doî", " abcd"]

  judged = eval_data.answer(evaluation(flores, "lij_Latn", 2), generate)
  assert asked[1].endswith("\n\nLigurian: Cantemmo.\nEnglish:")
  assert asked[1].count("English:") == 3
  rows = judged.rows
  assert [row["prediction"] for row in rows] == ["A house.", "abcd"]
  assert [row["completion"] for row in rows] == ["A house.", "We sing."]
  assert [row["chrf1"] for row in rows] == [100, 0]
  assert all(len(row["exemplars"]) == 2 for row in rows)
  assert 0 < judged.value < 100
  assert judged.note.startswith("chrF1|nrefs:1|")


def test_lines_that_do_not_pair_and_files_that_are_none(tmp_path):
  with pytest.raises(InputError, match="neither FLORES' folder dev/ nor one"):
    read_flores(tmp_path, "lij_Latn", "dev")
  (tmp_path / "x.zip").write_bytes(b"no zip")
  with pytest.raises(InputError, match="cannot read FLORES from"):
    read_flores(tmp_path, "lij_Latn", "dev")
  with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
    archive.writestr("dev/lij_Latn.dev", "Un.\n")
    archive.writestr("dev/eng_Latn.dev", "One.\nTwo.\n")
  with pytest.raises(
    InputError, match=r"lij_Latn.dev has 1 lines and .*eng_Latn.dev has 2"
  ):
    read_flores(tmp_path, "lij_Latn", "dev")


def test_names_of_languages():
  assert language_name("taq_Latn") == "Tamasheq"
  assert language_name("nno_Latn") == "Norwegian Nynorsk"
  with pytest.raises(InputError, match="no language 'xxx_Latn'"):
    language_name("xxx_Latn")


@pytest.mark.parametrize("code", ["lij_Latn", "mar_Deva", "tha_Thai"])
def test_the_real_flores(code):
  path = eval_data.folder("flores200")
  items = read_flores(path, code, "devtest")
  assert (len(items), len(read_flores(path, code, "dev"))) == (1012, 997)
  judged = eval_data.answer(
    evaluation(path, code, 5),
    lambda prompts: [f" {item['target']}" for item in items],
  )
  assert judged.value == 100
  assert all(len(row["exemplars"]) == 5 for row in judged.rows)
