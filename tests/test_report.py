"""The report: its page, and the command that writes it."""

from __future__ import annotations

import html.parser
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import made_runs
import numpy as np
import pytest
from rich.console import Console

from calm_jax import report
from calm_jax.core.errors import InputError

ROOT = Path(__file__).parents[1]
VOID = {"meta", "link", "img", "br"}
# What could make a browser ask for something.
LOADING = {"src", "href", "srcset", "data", "action", "poster", "background"}


class Parsed(html.parser.HTMLParser):
  """A page: its tags' attributes, and whether all are closed in order."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self.open: list[str] = []
    self.text = ""
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data

  def of(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Four experiments' report: its folder and its page."""
  root = tmp_path_factory.mktemp("runs")
  out = root / "out"
  made_runs.languages(root / "ntl")
  made_runs.languages(root / "ntl" / "lora", "lora")
  folders = [
    made_runs.key_values(root / "kv"), root / "ntl",
    made_runs.code(root / "code"), made_runs.ablations(root / "sweep"),
  ]  # fmt: skip
  page = report.write(folders, out)
  return out, page.read_text(encoding="utf-8")


def test_the_page_asks_for_nothing(written):
  page = Parsed(written[1])
  for _, attributes in page.tags:
    for name in LOADING & attributes.keys():
      assert attributes[name].startswith(("#", "data:"))
  assert "url(" not in written[1] and "@import" not in written[1]
  [policy] = [a for a in page.of("meta") if "http-equiv" in a]
  assert policy["content"] == (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  )
  assert not {"script", "iframe", "object", "form"} & {t for t, _ in page.tags}


def test_what_models_write_stays_text(written):
  page = Parsed(written[1])
  assert made_runs.SCRIPT in page.text
  assert made_runs.SCRIPT not in written[1]


def test_every_link_has_an_end_and_no_name_is_given_twice(written):
  page = Parsed(written[1])
  names = [a["id"] for _, a in page.tags if "id" in a]
  assert len(names) == len(set(names))
  links = [a["href"][1:] for a in page.of("a")]
  assert links == names


def test_tables_and_pictures_can_be_read_out(written):
  page = Parsed(written[1])
  assert len(page.of("caption")) == len(page.of("table"))
  assert {a.get("scope") for a in page.of("th")} == {"col", "row"}
  images = page.of("img")
  assert len(images) == 3 + 5 + 3 + 2 + 1
  assert all(len(a["alt"]) > 40 for a in images)
  for number in range(1, 7):
    assert f"Table {number}: " in page.text
  assert "Overhead (Appendix C)" in page.text
  assert "Bits per byte" in page.text
  assert "predictions/flores-200-lij_latn.composed.jsonl" in page.text
  assert "the paper's Table 8 is cherry-picked" in page.text
  assert "the whole prompt" in page.text


def test_one_run_folds_the_tables_it_lacks(tmp_path):
  page = report.write([made_runs.key_values(tmp_path / "kv")], tmp_path / "o")
  text = page.read_text(encoding="utf-8")
  assert text.index('id="table-1"') < text.index('id="others"')
  assert "<summary>Table 2, Table 3, Table 4, Table 5, Table 6" in text
  assert text.index("Table 2: translation") > text.index('id="others"')
  assert len(text) < 1_000_000


def test_markdown_and_csv_files(written):
  out, _ = written
  names = {path.stem for path in (out / "tables").iterdir()}
  assert {f"table-{i}" for i in range(2, 7)} <= names
  assert {"table-1-kv", "table-1-sweep-ablations", "overhead"} <= names
  text = (out / "report.md").read_text(encoding="utf-8")
  headings = re.findall("^## (.*)", text, re.MULTILINE)
  assert len(headings) == len(names)
  # Every row of a table has as many cells as its head.
  for block in text.split("\n\n"):
    rows = [x for x in block.splitlines() if x.startswith("|")]
    cells = {row.replace("\\|", "").count("|") for row in rows}
    assert len(cells) <= 1, block
  assert not list(out.glob("**/*.tmp"))


def test_the_same_runs_give_the_same_page(written, tmp_path):
  folder = made_runs.key_values(tmp_path / "kv")
  made = [report.write([folder], tmp_path / str(i)) for i in range(2)]
  assert made[0].read_bytes() == made[1].read_bytes()


def test_results_json_holds_numpy_and_infinite_numbers(tmp_path):
  results = {
    "perplexity": {"a": {"anchor": np.float32(2.5), "composed": math.inf}},
    "parameters": {"anchor": np.int64(7)},
    "config": {"dtype": np.float32, "layers": (1, np.arange(2))},
  }
  report.write_results(tmp_path / "new", results, draw=True)
  read = json.loads((tmp_path / "new" / "results.json").read_text())
  assert read["perplexity"]["a"] == {"anchor": 2.5, "composed": "Infinity"}
  assert read["parameters"] == {"anchor": 7}
  assert read["config"]["layers"] == [1, [0, 1]]
  assert "**2.50**" in (tmp_path / "new" / "report.md").read_text()


def test_a_bad_file_does_not_lose_the_results(tmp_path):
  folder = made_runs.key_values(tmp_path / "kv")
  results = json.loads((folder / "results.json").read_text())
  (folder / "results.json").unlink()
  np.savez(folder / "attention.npz", weights=np.zeros(3))
  with pytest.raises(InputError, match="prompt_length"):
    report.write_results(folder, results, draw=True)
  assert json.loads((folder / "results.json").read_text()) == results


def test_printed_are_the_tables_that_have_a_number(tmp_path):
  console = Console(file=io.StringIO(), width=200)
  report.print_results(made_runs.key_values(tmp_path / "kv"), console)
  text = console.file.getvalue()
  assert "84.3 / 75.0" in text and "1,000,000" in text and "12.3 s" in text
  assert "FLORES" not in text


def test_the_command(tmp_path):
  command = [sys.executable, "-m", "calm_jax.report"]
  folder = made_runs.code(tmp_path / "code")
  run = subprocess.run(
    [*command, folder, f"--out={tmp_path / 'out'}"],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert run.returncode == 0, run.stderr
  assert run.stdout.strip() == str(tmp_path / "out" / "report.html")
  assert Path(run.stdout.strip()).exists()
  bad = subprocess.run(
    [*command, tmp_path, tmp_path / "none", f"--out={tmp_path / 'bad'}"],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert bad.returncode == 2 and bad.stderr.startswith("error: ")
  assert f"{tmp_path / 'none'} has no results.json" in bad.stderr
  assert not (tmp_path / "bad").exists()
