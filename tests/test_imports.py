"""The house: which folder may import which, read off the syntax trees."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys
from collections import Counter

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "calm_jax"
# Exported compositions bring a copy of it, which runs where calm_jax is not;
# the package itself never imports it.
COPIED = "composition/modeling_calm.py"
FILES = {
  str(path.relative_to(PACKAGE)): ast.parse(path.read_text(), str(path))
  for path in sorted(PACKAGE.rglob("*.py"))
  if path != PACKAGE / COPIED
}
COMMANDS = {
  *("train", "generate", "evaluate", "info", "plan", "report", "ablations"),
  *("export", "lm_eval", "cli", "serve"),
}
# What each folder may import besides itself; the others are commands and wings.
MAY_IMPORT = {
  "core": set(),
  "text": {"core"},
  "parallel": {"core"},
  "sandbox": {"core"},
  "models": {"core"},
  "models/hf": {"models", "core"},
  "composition": {"models", "models/hf", "text", "core"},
  "generation": {"composition", "models", "text", "parallel", "core"},
  "data": {"text", "core"},
  "training": {"composition", "data", "models", "parallel", "text", "core"},
  "evals": {"data", "sandbox", "text", "core"},
  "serving": {"generation", "composition", "text", "core"},
  "reporting": {"core", "evals", "training", "experiments"},
}
METHOD = {
  *("core", "models", "models/hf", "text", "composition", "generation"),
  *("data", "training"),
}
WINGS = {
  *("planning", "reporting", "experiments", "evals", "sandbox", "serving"),
  *COMMANDS,
}
# The command lines, and what makes typed settings of their configs.
READS_CONFIG_DICTS = {f"{name}.py" for name in COMMANDS} | {
  "experiments/config_files.py"
}


def room(file: str) -> str:
  """The folder that a file is in; at the root, its own name."""
  parts = file.removesuffix(".py").split("/")
  if parts[:2] == ["models", "hf"]:
    return "models/hf"
  return parts[0]


def imports(file: str) -> set[str]:
  """Everything that a file imports, for types only too, as dotted names."""
  return imported(FILES[file])


def imported(tree: ast.Module) -> set[str]:
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"relative import of {node.module}"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def imported_files(file: str) -> set[str]:
  """The package's own files that a file imports."""
  files = set()
  for name in imports(file):
    while name.startswith("calm_jax."):
      path = name.removeprefix("calm_jax.").replace(".", "/")
      known = {f"{path}.py", f"{path}/__init__.py"} & FILES.keys()
      if known:
        files |= known
        break
      name = name.rpartition(".")[0]
  return files - {file}


def imported_rooms(file: str) -> set[str]:
  return {room(other) for other in imported_files(file)} - {room(file)}


def top_packages(file: str) -> set[str]:
  return {name.split(".")[0] for name in imports(file)}


def in_rooms(*rooms: str) -> list[str]:
  return [file for file in FILES if room(file) in rooms]


def circle(arrows: dict[str, set[str]]) -> list[str]:
  """What is left when all that depends on nothing has been taken away."""
  arrows = dict(arrows)
  while True:
    free = {name for name, others in arrows.items() if not others & set(arrows)}
    if not free:
      return sorted(arrows)
    arrows = {name: x for name, x in arrows.items() if name not in free}


def room_arrows() -> dict[str, set[str]]:
  arrows: dict[str, set[str]] = {room(file): set() for file in FILES}
  for file in FILES:
    arrows[room(file)] |= imported_rooms(file)
  return arrows


def test_the_walk_sees_what_is_there():
  assert {"models/decoder.py", "core/batch.py"} <= imported_files(
    "composition/forward.py"
  )
  assert "jax" in top_packages("models/layers.py")
  assert "lm_head" in strings("models/hf/tensor_tables.py")
  assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [
    "a",
    "b",
    "c",
  ]


def test_no_circle():
  assert not circle({file: imported_files(file) for file in FILES})
  assert not circle(room_arrows())


def test_arrows_go_down():
  for file in in_rooms(*MAY_IMPORT):
    assert imported_rooms(file) <= MAY_IMPORT[room(file)], file


def test_the_method_imports_no_wing():
  for file in in_rooms(*METHOD):
    assert not imported_rooms(file) & WINGS, file


def test_few_floors():
  arrows = room_arrows()

  def floor(name: str) -> int:
    return 1 + max(map(floor, arrows[name]), default=0)

  assert max(map(floor, arrows)) <= 10


def test_only_the_facade_and_commands_stand_at_the_root():
  at_root = {f.removesuffix(".py") for f in FILES if "/" not in f}
  assert at_root <= {"__init__", "language_model"} | COMMANDS


def test_no_class_name_twice():
  names = Counter(
    node.name
    for tree in FILES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
  )
  assert not [name for name, count in names.items() if count > 1]


def test_a_model_has_a_type():
  for file, tree in FILES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef):
        for argument in [*node.args.args, *node.args.kwonlyargs]:
          place = f"{file}:{node.lineno} {node.name}"
          assert argument.arg != "model" or argument.annotation, place


def test_data_and_reports_need_no_jax():
  for file in in_rooms("data", "reporting"):
    assert not top_packages(file) & {"jax", "flax"}, file


def test_the_package_imports_no_configs():
  assert not [f for f in FILES if "configs" in top_packages(f)]


def test_no_torch_no_pickle_no_remote_code():
  for file in FILES:
    assert not top_packages(file) & {"torch", "pickle", "dill", "joblib"}, file
    theirs = [n for n in imports(file) if re.match(r"transformers\..*Model", n)]
    assert not theirs, file
    trusting = [
      ast.unparse(node)
      for node in ast.walk(FILES[file])
      if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
    ]
    assert set(trusting) <= {"trust_remote_code=False"}, file


def test_the_copied_file_stands_alone():
  names = imported(ast.parse((PACKAGE / COPIED).read_text()))
  packages = {name.split(".")[0] for name in names}
  assert packages - sys.stdlib_module_names == {"torch", "transformers"}


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


def test_only_hf_knows_names_of_tensors():
  theirs = re.compile(
    r"self_attn|embed_tokens|lm_head\b|[a-z]_proj\b\.|layernorm"
  )
  for file in FILES:
    if room(file) != "models/hf":
      assert not [s for s in strings(file) if theirs.search(s)], file


def test_trees_have_no_anchor_below_the_settings():
  for file in FILES:
    if file.startswith(
      ("training/optimizer", "training/checkpoint", "parallel/sharding")
    ):
      lines = ast.unparse(FILES[file]).splitlines()
      code = [line for line in lines if not line.strip().startswith('"""')]
      assert not [line for line in code if "anchor" in line], file


def test_config_dicts_stop_at_the_command_lines():
  for file in FILES.keys() - READS_CONFIG_DICTS:
    assert "ml_collections" not in top_packages(file), file


def test_no_default_hides_in_a_get():
  for file, tree in FILES.items():
    calls = [
      ast.unparse(node)
      for node in ast.walk(tree)
      if isinstance(node, ast.Call)
      and isinstance(node.func, ast.Attribute)
      and node.func.attr == "get"
      and len(node.args) + len(node.keywords) > 1
    ]
    hidden = [c for c in calls if re.match(r"[\w.]*(config|settings)\b", c)]
    assert not hidden, file


PROBE = """
import importlib, sys
sys.modules["torch"] = None  # importing it fails, as where it is missing
import jax
import optax.contrib  # that of 0.2.7 changes an option of JAX
before = dict(jax.config.values)
for name in sys.argv[1:]:
  importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was initialised"
changed = {k for k, v in jax.config.values.items() if before.get(k, v) != v}
assert not changed, f"jax.config was changed: {changed}"
"""


def test_importing_has_no_side_effect():
  extras = {"lm_eval.py": "lm_eval", "serving/api.py": "starlette"}
  without = {f for f, n in extras.items() if not importlib.util.find_spec(n)}
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
