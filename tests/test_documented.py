"""Runs the commands that README.md and docs/ show, at tiny size.

They run as for a user who has installed the wheel, in a folder that is not the
checkout; of the checkout it has configs/ and benchmarks/.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile

import compiler
import documented
import made_runs
import numpy as np
import pytest
import spelled

import calm_jax
from calm_jax import train
from calm_jax.experiments import config_files

LETTERS = "abcdefghijklmnopqrstuvwxyz AHO.:+-=0123456789"
# The folders of checkpoints and compositions that the commands name.
SMOL = "HuggingFaceTB/SmolLM2-"
MODELS = ("DIR_OR_ID", "PATH_OR_ID", f"{SMOL}360M", f"{SMOL}135M")
COMPOSITIONS = ("my-composition", "runs/mine/composition")
TEMPLATE = (
  "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}. {% endfor %}"
)
# What blocks of a page take for granted.
GIVEN = {
  "evaluation.md": {"data": "data"},
  "generation.md": {"tokens": np.ones((1, 4), int)},
}
RUN = {
  command: flags
  for command, flags in documented.COMMANDS.items()
  if not flags.endswith(".")
}
# This one runs as where no extra is installed.
BARE = "python -m calm_jax.train --config=configs/kv.py"
EXTRAS = ("matplotlib", "qwix", "sacrebleu", "datasets", "gguf", "wandb")
# What they write, which must not be there before.
WRITTEN = {"compose.md": "my-composition"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with all files and folders that the commands name."""
  place = tmp_path_factory.mktemp("place")
  for name in ("configs", "benchmarks"):
    (place / name).symlink_to(documented.ROOT / name)
  (place / "bare").mkdir()
  (place / "bare" / "sitecustomize.py").write_text(
    f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS}))\n"
  )
  for seed, name in enumerate(MODELS):
    spelled.save(place / name, seed, LETTERS, max_length=256)
  (place / MODELS[0] / "chat_template.jinja").write_text(TEMPLATE)
  anchor, augmenting = (
    calm_jax.load_model(str(place / name)) for name in MODELS[:2]
  )
  composed = calm_jax.compose(anchor, augmenting, 1)
  made_runs.key_values(place / "runs" / "kv")
  made_runs.ablations(place / "runs")
  for name in (*COMPOSITIONS, "runs/kv/composition"):
    composed.save(place / name)
  (place / "path" / "to").mkdir(parents=True)
  for at, names in enumerate(
    (("here", "path/to/anchor"), ("there", "path/to/augmenting"))
  ):
    for name in names:
      (place / name).symlink_to(place / MODELS[at])
  lines = [json.dumps({"text": "once upon a time."}) + "\n"] * 40
  for name in ("train.jsonl", "test.jsonl"):
    (place / name).write_text("".join(lines))
  (place / "file.jsonl").write_text('{"prompt": "Once"}\n{"prompt": "a"}\n')
  return place


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, built of a copy: builds leave files in the folder."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in ("calm_jax", "configs"):
    no_cache = shutil.ignore_patterns("__pycache__")
    shutil.copytree(documented.ROOT / name, folder / name, ignore=no_cache)
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(documented.ROOT / name, folder)
  build = "from setuptools import build_meta; build_meta.build_wheel('.')"
  subprocess.run([sys.executable, "-c", build], cwd=folder, check=True)
  [path] = folder.glob("*.whl")
  return path


@pytest.fixture(scope="module")
def python(wheel, place):
  """Python of a new environment with the wheel and this one's packages."""
  folder = wheel.parent / "environment"
  venv.create(folder)
  python = folder / "bin" / "python"
  pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "-q"]
  options = ("--no-deps", "--no-index", "--no-compile")
  subprocess.run([*pip, *options, wheel], check=True)
  [packages] = folder.glob("lib/*/site-packages")
  here = [path for path in sys.path if path.endswith("-packages")]
  (packages / "here.pth").write_text("\n".join(here))
  ask = "from importlib.util import find_spec; print(find_spec('calm_jax'))"
  run = [python, "-c", ask]
  environment = os.environ | {"PYTHONPATH": ""}
  found = subprocess.check_output(run, cwd=place, env=environment, text=True)
  assert str(packages / "calm_jax" / "__init__.py") in found
  return python


def test_the_wheel_holds_all_files_of_the_package(wheel):
  package = wheel.parent / "calm_jax"
  files = [p for p in package.rglob("*") if p.is_file()]
  with zipfile.ZipFile(wheel) as archive:
    held = {name for name in archive.namelist() if name.startswith("calm_jax/")}
  assert held == {str(path.relative_to(wheel.parent)) for path in files}
  assert {"calm_jax/py.typed", "calm_jax/sandbox/syscalls.txt"} <= held


@pytest.mark.parametrize(
  "page",
  [*filter(documented.blocks, documented.PAGES)],
  ids=lambda page: page.name,
)
def test_python_runs(page, place, tmp_path, monkeypatch):
  """Runs a page's blocks of Python in turn.

  `train.main` only checks the config: the command that README.md shows beside
  it trains with the same one, in the test below.
  """
  for entry in place.iterdir():
    if entry.name != WRITTEN.get(page.name):
      (tmp_path / entry.name).symlink_to(entry)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(train, "main", config_files.read_settings)
  names = {"calm_jax": calm_jax} | GIVEN.get(page.name, {})
  for block in documented.blocks(page):
    if not block.startswith(tuple(documented.NOT_RUN)):
      exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("command", RUN)
def test_the_command_runs(command, place, python):
  arguments = shlex.split(f"{command} {RUN[command]}")
  assert arguments.pop(0) == "python"
  environment = os.environ | {
    "PYTHONPATH": "bare" if command == BARE else "",
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "XLA_FLAGS": compiler.FLAGS,
  }
  run = subprocess.run(
    [python, *arguments],
    cwd=place,
    env=environment,
    capture_output=True,
    text=True,
    input="Once\n",
    timeout=300,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  assert run.stdout.strip()
  if command == BARE:
    assert "install 'calm_jax[report]'" in run.stdout
    written = {path.name for path in (place / "out" / "kv").iterdir()}
    assert "results.json" in written and "report.html" not in written
