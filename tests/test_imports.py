"""Who may import whom (design §2), read off the syntax trees."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "calm_jax"
FILES = {
  str(path.relative_to(PACKAGE)): ast.parse(path.read_text(), str(path))
  for path in sorted(PACKAGE.rglob("*.py"))
}
COMMAND_LINES = {
  "ablations.py", "cli.py", "train.py", "evaluate.py", "generate.py", "plan.py"
}  # fmt: skip


def imports(file: str) -> set[str]:
  """Everything a file imports anywhere, as dotted names."""
  found = set()
  for node in ast.walk(FILES[file]):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{file}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def modules(file: str) -> set[str]:
  """The package's modules that a file imports, as paths: models/hf."""
  names = {f.removesuffix(".py").replace("/", ".") for f in FILES}
  found = set()
  for name in imports(file):
    parts = name.split(".")
    if parts[0] != "calm_jax":
      continue
    inside = [".".join(parts[1:end]) for end in range(2, len(parts) + 1)]
    known = [n for n in inside if n in names or f"{n}.__init__" in names]
    found.add(known[-1].replace(".", "/") if known else "__init__")
  return found


def under(*prefixes: str) -> list[str]:
  return [f for f in FILES if f.startswith(prefixes)]


def tops(file: str) -> set[str]:
  return {name.split(".")[0] for name in imports(file)}


def strings(file: str) -> set[str]:
  """String constants, docstrings left out."""
  docs = {
    node.value
    for node in ast.walk(FILES[file])
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
  }
  return {
    node.value
    for node in ast.walk(FILES[file])
    if isinstance(node, ast.Constant)
    and isinstance(node.value, str)
    and node not in docs
  }


def test_the_walk_sees_what_is_there():
  assert {"models/decoder", "errors"} <= modules("composition.py")
  assert "jax" in tops("models/layers.py")
  assert "lm_head.weight" in strings("models/hf.py")


@pytest.mark.parametrize("file", under("tree.py", "losses.py", "metrics.py"))
def test_the_lowest_files_import_errors_only(file):
  assert modules(file) <= {"errors"}


@pytest.mark.parametrize("file", under("models/"))
def test_models_import_models_only(file):
  others = {m for m in modules(file) if not m.startswith("models")}
  assert others <= {"errors", "tree"}
  assert not any("sharding" in n or "Mesh" in n for n in imports(file))


@pytest.mark.parametrize(
  "file",
  under(
    "composition.py", "connections.py", "controls.py", "cross_attention.py"
  ),
)
def test_composition_imports_models_only(file):
  others = {m for m in modules(file) if not m.startswith("models")}
  assert others <= {"connections", "controls", "cross_attention", "errors"}


@pytest.mark.parametrize("file", under("data/"))
def test_data_imports_no_models(file):
  allowed = ("alignment", "data", "errors", "tokenizer")
  assert all(m.startswith(allowed) for m in modules(file))
  assert not tops(file) & {"jax", "flax"}


@pytest.mark.parametrize("file", under("evals/"))
def test_evals_import_neither_training_nor_models(file):
  allowed = (
    "evals", "errors", "metrics", "sandbox", "tokenizer", "data/sources"
  )  # fmt: skip
  assert all(m.startswith(allowed) for m in modules(file))


@pytest.mark.parametrize("file", under("reporting/"))
def test_reporting_imports_neither_training_nor_models(file):
  allowed = ("errors", "evals/statistics", "kinds", "metrics", "reporting")
  assert all(m.startswith(allowed) for m in modules(file))
  assert not tops(file) & {"jax", "flax"}


@pytest.mark.parametrize("file", FILES)
def test_no_torch(file):
  assert not tops(file) & {"torch", "pickle", "dill", "joblib"}
  models = [n for n in imports(file) if re.match(r"transformers\..*Model", n)]
  assert not models
  trusting = [
    ast.unparse(node)
    for node in ast.walk(FILES[file])
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
  ]
  assert set(trusting) <= {"trust_remote_code=False"}


@pytest.mark.parametrize("file", FILES)
def test_only_hf_knows_names_of_tensors(file):
  if file != "models/hf.py":
    theirs = re.compile(
      r"self_attn|embed_tokens|lm_head\b|[a-z]_proj\b\.|layernorm"
    )
    assert not [s for s in strings(file) if theirs.search(s)]


@pytest.mark.parametrize("file", under("optim.py", "sharding.py", "checkpoint"))
def test_trees_have_no_anchor_below_the_config(file):
  text = ast.unparse(FILES[file])
  code = [line for line in text.splitlines() if "anchor" in line]
  assert not [line for line in code if not line.strip().startswith('"""')]


@pytest.mark.parametrize("file", FILES)
def test_config_dicts_stop_at_the_command_lines(file):
  if file not in COMMAND_LINES:
    assert "ml_collections" not in tops(file)


@pytest.mark.parametrize("file", FILES)
def test_no_default_hides_in_a_get(file):
  calls = [
    ast.unparse(node)
    for node in ast.walk(FILES[file])
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr == "get"
    and len(node.args) + len(node.keywords) > 1
  ]
  assert not [c for c in calls if re.match(r"[\w.]*(config|settings)\b", c)]


PROBE = """
import importlib, sys
sys.modules["torch"] = None  # importing it fails, as where it is missing
import jax
before = dict(jax.config.values)
for name in sys.argv[1:]:
  importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was initialised"
changed = {k for k, v in jax.config.values.items() if before.get(k, v) != v}
assert not changed, f"jax.config was changed: {changed}"
"""


def test_importing_has_no_side_effect():
  without = set() if importlib.util.find_spec("lm_eval") else {"lm_eval.py"}
  names = [
    "calm_jax." + f.removesuffix(".py").replace("/", ".")
    for f in FILES.keys() - without
    if not f.endswith("__init__.py")
  ]
  run = subprocess.run(
    [sys.executable, "-c", PROBE, "calm_jax", *names],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr[-3000:]
