"""Names of leaves, regex masks, partition and merge, counts, fingerprints.

A tree is a plain nested dict with string keys whose leaves are arrays, or
anything else with a shape and a dtype. A leaf's name is its path joined by
"/". Empty dicts carry no leaf and are dropped by every function here.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax.core.errors import InputError

Tree = Mapping[str, Any]

_SHOWN = 12


def flatten(tree: Tree, separator: str = "/") -> dict[str, Any]:
  """Returns {"a/b/c": leaf} in the order of the tree."""
  leaves: dict[str, Any] = {}
  for key, value in tree.items():
    if not isinstance(value, Mapping):
      leaves[key] = value
      continue
    for name, leaf in flatten(value, separator).items():
      leaves[f"{key}{separator}{name}"] = leaf
  return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`.

  Raises:
    ValueError: a name is a leaf and also the prefix of another leaf.
  """
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for end, parent in enumerate(parents, start=1):
      if (prefix := "/".join(parents[:end])) in leaves:
        raise ValueError(f"{prefix!r} is a leaf and the parent of {name!r}")
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def mask(tree: Tree, patterns: Sequence[str]) -> dict[str, Any]:
  """Marks the leaves whose whole name matches one of the patterns.

  Args:
    tree: nested dict of arrays.
    patterns: regular expressions, applied with `re.fullmatch`.

  Returns:
    A tree of bool with the structure of `tree`.

  Raises:
    InputError: a pattern is not a regular expression, or matches no leaf.
  """
  if isinstance(patterns, str):
    raise InputError(f"expected a list of patterns, got the str {patterns!r}")
  names = list(flatten(tree))
  chosen = set()
  for pattern in patterns:
    try:
      compiled = re.compile(pattern)
    except re.error as error:
      raise InputError(f"bad pattern {pattern!r}: {error}") from error
    matched = {name for name in names if compiled.fullmatch(name)}
    if not matched:
      raise InputError(
        f"pattern {pattern!r} matches no leaf; the leaves are\n"
        + _listing(names)
      )
    chosen |= matched
  return unflatten({name: name in chosen for name in names})


def partition(
  tree: Tree, selection: Tree
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits a tree in two: `merge(*partition(tree, m))` is the tree again.

  Args:
    tree: nested dict of arrays.
    selection: tree of bool with the same structure, as `mask` returns it.

  Returns:
    (selected, rest), both pruned nested dicts.

  Raises:
    ValueError: the two structures differ.
  """
  leaves, flags = flatten(tree), flatten(selection)
  if leaves.keys() != flags.keys():
    odd = sorted(leaves.keys() ^ flags.keys())
    raise ValueError(f"tree and mask differ in\n{_listing(odd)}")
  selected = {name: x for name, x in leaves.items() if flags[name]}
  rest = {name: x for name, x in leaves.items() if not flags[name]}
  return unflatten(selected), unflatten(rest)


def merge(*trees: Tree) -> dict[str, Any]:
  """Joins trees that share no leaf.

  Raises:
    ValueError: a leaf is in two trees, or is a leaf in one and an inner node
      in another.
  """
  merged: dict[str, Any] = {}
  for tree in trees:
    leaves = flatten(tree)
    if overlap := sorted(merged.keys() & leaves.keys()):
      raise ValueError(f"leaves in more than one tree:\n{_listing(overlap)}")
    merged.update(leaves)
  return unflatten(merged)


def count(tree: Tree) -> int:
  """Returns the number of elements in all leaves together."""
  return sum(math.prod(x.shape) for x in flatten(tree).values())


def fingerprint(tree: Tree, fetch: Callable = np.asarray) -> str:
  """Returns the sha256 (hex) of names, shapes, dtypes and bytes.

  Independent of the order of keys and of where the arrays live. Leaves are
  fetched to the host one at a time, so that a tree larger than the host's
  memory can be hashed.

  Args:
    tree: nested dict of arrays.
    fetch: gives the whole of a leaf as a numpy array; one that this process
      does not hold all of needs another than the default.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(flatten(tree).items()):
    array = np.ascontiguousarray(fetch(leaf))
    # Not dtype.str: it is "<V2" for bfloat16 and for any 2-byte record.
    header = f"{name}\0{leaf.shape}\0{array.dtype.name}\0"
    digest.update(header.encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def check_same_structure(got: Tree, want: Tree, what: str) -> None:
  """Checks that two trees have the same names, shapes and dtypes.

  Args:
    got: the tree that was found, e.g. in a checkpoint.
    want: the tree that is needed.
    what: names `got` in the error message.

  Raises:
    InputError: lists the missing, the unexpected and the misshapen leaves.
  """
  got_leaves, want_leaves = flatten(got), flatten(want)
  missing = [
    f"{name}: {_describe(x)}"
    for name, x in want_leaves.items()
    if name not in got_leaves
  ]
  unexpected = [
    f"{name}: {_describe(x)}"
    for name, x in got_leaves.items()
    if name not in want_leaves
  ]
  misshapen = [
    f"{name}: found {_describe(got_leaves[name])}, wanted {_describe(x)}"
    for name, x in want_leaves.items()
    if name in got_leaves and _describe(got_leaves[name]) != _describe(x)
  ]
  sections = {
    "missing (wanted, not found)": missing,
    "unexpected (found, not wanted)": unexpected,
    "misshapen": misshapen,
  }
  lines = [
    f"{len(found)} {title}:\n{_listing(found)}"
    for title, found in sections.items()
    if found
  ]
  if lines:
    raise InputError("\n".join([f"{what} does not match:", *lines]))


def _describe(leaf: Any) -> str:
  # Typed PRNG keys have dtypes that numpy cannot parse.
  dtype = getattr(leaf.dtype, "name", str(leaf.dtype))
  return f"{dtype}[{','.join(map(str, leaf.shape))}]"


def _listing(lines: Sequence[str]) -> str:
  shown = [f"  {line}" for line in lines[:_SHOWN]]
  if len(lines) > _SHOWN:
    shown.append(f"  ... and {len(lines) - _SHOWN} more")
  return "\n".join(shown) or "  (none)"
