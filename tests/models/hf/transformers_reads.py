"""The keys of config.json that transformers' own code reads, from its source.

It is read as text, without torch: of a family the code that its causal language
model needs, and what all families share.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import pathlib

_ROOT = pathlib.Path(importlib.util.find_spec("transformers").origin).parent
_MODULES = {"gemma3_text": "gemma3"}  # others are called as their model_type
_SHARED = ("modeling_rope_utils", "masking_utils", "cache_utils")
_HEADS = ("ForCausalLM", "LMHeadModel")
_TAKES = ("get", "pop", "setdefault")  # of the keys that are no field


@functools.cache
def keys(family: str) -> frozenset[str]:
  """Returns the keys that are read for a family, by all families or by it."""
  module = _MODULES.get(family, family)
  folder = _ROOT / "models" / module
  modeling = _definitions(folder / f"modeling_{module}.py")
  configs = _definitions(folder / f"configuration_{module}.py")
  [config] = [c for c in configs.values() if _class_value(c) == family]
  [main] = [name for name in modeling if name.endswith(_HEADS)]
  shared = _definitions(_ROOT / "configuration_utils.py")["PreTrainedConfig"]
  inits = [f for f in shared.body if getattr(f, "name", "") == "__post_init__"]
  nodes = [*_needed(modeling, main), *map(_tree, _SHARED)]
  found = {name for node in nodes for name in _reads(node, ("config",))}
  for node in (config, *inits, _text_config(shared)):
    found |= {name for name in _reads(node, ("config", "self", "kwargs"))}
  found |= {name for c in (config, shared) for name in _fields(c)}
  return frozenset(found | _aliases(config).keys()) - _methods(shared, config)


def aliases(family: str) -> dict[str, str]:
  """Returns other spellings of keys, to the one under which they are read."""
  module = _MODULES.get(family, family)
  path = _ROOT / "models" / module / f"configuration_{module}.py"
  configs = _definitions(path).values()
  [config] = [c for c in configs if _class_value(c) == family]
  return _aliases(config)


def nullable(family: str) -> set[str]:
  """Returns fields that may be null, which is not what they are by default.

  Where that is False null means the same.
  """
  module = _MODULES.get(family, family)
  path = _ROOT / "models" / module / f"configuration_{module}.py"
  configs = _definitions(path).values()
  [config] = [c for c in configs if _class_value(c) == family]
  return {
    name
    for name, field in _fields(config).items()
    if "None" in ast.unparse(field.annotation)
    and ast.unparse(field.value) not in ("None", "False")
  }


@functools.cache
def _tree(name: str) -> ast.Module:
  return ast.parse((_ROOT / f"{name}.py").read_text(encoding="utf-8"))


@functools.cache
def _definitions(path: pathlib.Path) -> dict[str, ast.AST]:
  nodes = ast.parse(path.read_text(encoding="utf-8")).body
  kinds = ast.ClassDef | ast.FunctionDef
  return {node.name: node for node in nodes if isinstance(node, kinds)}


def _class_value(config: ast.AST, name: str = "model_type"):
  for node in getattr(config, "body", ()):
    if isinstance(node, ast.Assign) and node.targets[0].id == name:
      return ast.literal_eval(node.value)
  return None


def _aliases(config: ast.AST) -> dict[str, str]:
  return _class_value(config, "attribute_map") or {}


def _fields(config: ast.AST) -> dict[str, ast.AnnAssign]:
  nodes = (node for node in config.body if isinstance(node, ast.AnnAssign))
  return {
    node.target.id: node
    for node in nodes
    if "ClassVar" not in ast.unparse(node.annotation)
  }


def _methods(*configs: ast.AST) -> set[str]:
  return {
    node.name
    for config in configs
    for node in config.body
    if isinstance(node, ast.FunctionDef) and not node.decorator_list
  }


def _text_config(shared: ast.AST) -> ast.AST:
  [node] = [
    n for n in shared.body if getattr(n, "name", "") == "get_text_config"
  ]
  return node


def _needed(definitions: dict[str, ast.AST], name: str) -> list[ast.AST]:
  """The definitions of a file that one of them needs, itself too."""
  names, todo = {name}, [name]
  while todo:
    for node in ast.walk(definitions[todo.pop()]):
      used = getattr(node, "id", None)
      if used in definitions and used not in names:
        names.add(used)
        todo.append(used)
  return [definitions[n] for n in names]


def _reads(tree: ast.AST, owners: tuple[str, ...]) -> set[str]:
  """The names that are read of an object that is called as one of `owners`."""

  def is_owner(node: ast.AST) -> bool:
    name = getattr(node, "id", None) or getattr(node, "attr", "")
    return name.endswith(owners)

  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and is_owner(node.value):
      found.add(node.attr)
    elif isinstance(node, ast.Call) and len(node.args) > 0:
      called = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
      at = called in ("getattr", "hasattr")
      owner = node.args[0] if at else getattr(node.func, "value", None)
      key = node.args[at] if len(node.args) > at else None
      if (at or called in _TAKES) and owner and is_owner(owner):
        found.add(getattr(key, "value", None))
  return {name for name in found if isinstance(name, str)}


def rope_options() -> set[str]:
  """Returns the rotary options that are read, of all kinds that are known."""
  found = set()
  for node in ast.walk(_tree("modeling_rope_utils")):
    if isinstance(node, ast.Subscript):
      owner, key = node.value, node.slice
    elif isinstance(node, ast.Call) and node.args:
      owner, key = getattr(node.func, "value", None), node.args[0]
    else:
      continue
    name = getattr(owner, "id", None) or getattr(owner, "attr", "")
    if name.startswith("rope_parameters") and isinstance(key, ast.Constant):
      found.add(key.value)
  return found
