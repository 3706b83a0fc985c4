"""README.md, CONTRIBUTING.md and docs/: what they name exists."""

from __future__ import annotations

import ast
import configparser
import importlib
import json
import pathlib
import re
import xml.etree.ElementTree

import documented
import pytest
from documented import DOCS, PAGES, ROOT, code_lines

FOLDERS = "calm_jax|configs|docs|tests|benchmarks|launch|notebooks"
WITH_CONFIG = ("train", "evaluate", "plan", "ablations")

each_page = pytest.mark.parametrize(
  "page", PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


def anchors(page: pathlib.Path) -> set[str]:
  """The fragments that GitHub gives the headings of a page."""
  titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
  kept = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
  return {title.replace(" ", "-") for title in kept}


def test_versions_are_those_that_are_tested():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  needed = setup["options"]["install_requires"]
  least = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", needed, re.M))
  for extra, packages in setup["options.extras_require"].items():
    for bound in re.findall(r"^jax\[.*\]>=(.*)$", packages, re.M):
      assert bound == least["jax"], extra
  kinds = re.findall(r":: (3\.\d+)$", setup["metadata"]["classifiers"], re.M)
  assert setup["options"]["python_requires"] == f">={kinds[0]}"
  workflow = (ROOT / ".github/workflows/test.yml").read_text()
  assert f"python: {json.dumps(kinds)}" in workflow
  assert f'python-version: "{kinds[0]}"' in workflow, "of the oldest versions"
  text = " ".join((ROOT / "README.md").read_text().split())
  names, version = "Python|JAX|Flax|transformers|NumPy", r"(\d[\d.]*\d)"
  said = re.findall(rf"({names}) {version} to {version}", text)
  said = {name.lower(): ends for name, *ends in said}
  assert said.pop("python") == [kinds[0], kinds[-1]]
  assert said.keys() == {"jax", "flax", "transformers", "numpy"}
  for name, (lowest, newest) in said.items():
    assert lowest == least[name]
    assert [*map(int, newest.split("."))] >= [*map(int, lowest.split("."))]


@each_page
def test_links_resolve(page):
  for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
    if target.startswith("https://"):
      continue
    path, _, fragment = target.partition("#")
    file = page.parent / path if path else page
    assert file.exists(), target
    if fragment:
      assert fragment in anchors(file), target


@each_page
def test_paths_exist(page):
  named = re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*-]*", page.read_text())
  for name in {name.rstrip(".") for name in named}:
    assert list(ROOT.glob(name.rstrip("/"))), name


@each_page
def test_commands_exist(page):
  text = page.read_text()
  for package, name in re.findall(r"-m (calm_jax|benchmarks)\.([a-z_]+)", text):
    assert (ROOT / package / f"{name}.py").is_file(), f"{package}.{name}"
  targets = re.findall(r"^([\w. -]+):", (ROOT / "Makefile").read_text(), re.M)
  known = {name for line in targets for name in line.split()}
  for line in [*code_lines(page), *re.findall(r"`(make [^`]*)`", text)]:
    if named := re.match(r"make ([a-z][a-z-]*)", line):
      assert named[1] in known, line


def test_every_command_is_run_by_a_test_or_says_why_not():
  """tests/test_documented.py runs them."""
  shown = documented.shown()
  assert not shown - documented.COMMANDS.keys(), "list them in documented.py"
  assert not documented.COMMANDS.keys() - shown, "no page shows them any more"
  for reason in documented.COMMANDS.values():
    for file in re.findall(r"\btests/[\w/]+\.py", reason):
      assert (ROOT / file).is_file(), file


@each_page
def test_flags_of_configs_exist(page):
  for line in code_lines(page):
    run = re.search(r"-m calm_jax\.(\w+)", line)
    file = re.search(r"--config=configs/(\w+)\.py(?::([\w,]+))?", line)
    if not run or not file or run[1] not in WITH_CONFIG:
      continue
    module = importlib.import_module(f"configs.{file[1]}")
    config = module.get_config(*filter(None, [file[2]]))
    for flag in re.findall(r"--config\.([\w.]+)", line):
      entry = config
      for name in flag.split("."):
        assert name in entry, f"{flag} of {file[0]}"
        entry = entry[name]


@each_page
def test_python_is_python(page):
  for source in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
    if "..." not in source and not source.startswith('"'):
      ast.parse(source)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pages_begin_by_saying_for_whom_they_are(page):
  title, first = page.read_text().split("\n\n")[:2]
  assert title.startswith("# ") and "\n" not in title
  assert first.startswith("For ")


def test_the_index_lists_all_pages():
  listed = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text())
  assert sorted(listed) == [p.name for p in DOCS if p.name != "README.md"]


def test_the_readme_is_short():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_blocks_that_no_test_runs_are_there_and_say_why():
  """tests/test_documented.py runs the others."""
  there = [block for page in PAGES for block in documented.blocks(page)]
  for start, reason in documented.NOT_RUN.items():
    assert any(block.startswith(start) for block in there), start
    for file in re.findall(r"\btests/[\w/]+\.py", reason):
      assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").rglob("*.png")))
def test_bitmaps_are_shown_with_a_description(picture):
  shown = "\n".join(page.read_text() for page in PAGES)
  name = re.escape(picture.name)
  [words] = re.findall(rf"!\[([^\]]+)\]\([\w/.-]*{name}\)", shown)
  assert len(words) > 100


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")))
def test_pictures_are_described_and_used(picture):
  root = xml.etree.ElementTree.parse(picture).getroot()
  names = {child.tag.rpartition("}")[2] for child in root}
  assert {"title", "desc"} <= names
  assert any(picture.name in page.read_text() for page in PAGES)


def defined(file: pathlib.Path) -> set[str]:
  """Functions, classes, methods and constants of a file."""
  names = set()
  for node in ast.parse(file.read_text()).body:
    if isinstance(node, ast.Assign | ast.AnnAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      names |= {target.id for target in targets if isinstance(target, ast.Name)}
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
      if isinstance(node, ast.ClassDef):
        inner = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        names |= {f"{node.name}.{method.name}" for method in inner}
  return names


def test_functions_that_pages_name_exist():
  """A page names a function of a file as `calm_jax/FILE.py` `FUNCTION`."""
  text = "\n".join(page.read_text() for page in PAGES)
  named = re.findall(
    r"`(calm_jax/[\w/]+\.py)`((?:,?\s(?:and\s)?`[\w.]+`)*)", text
  )
  assert len(named) > 30
  for path, names in named:
    missing = {*re.findall(r"`([\w.]+)`", names)} - defined(ROOT / path)
    assert not missing, f"{path} has no {missing}"
