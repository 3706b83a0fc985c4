"""Trees of arrays: names of leaves, masks, partition, merge, fingerprints.

A tree is a nested dict of arrays or anything else with a shape and a dtype. A
leaf's name is its path joined by "/". Empty dicts are dropped.
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
    if isinstance(value, Mapping):
      for name, leaf in flatten(value, separator).items():
        leaves[f"{key}{separator}{name}"] = leaf
    else:
      leaves[key] = value
  return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Inverts `flatten`; a name may not be a leaf and the parent of another."""
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
  """Returns a tree of bool: whether a leaf's whole name matches a pattern.

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
      listing = _listing(names)
      raise InputError(f"pattern {pattern!r} matches no leaf of\n{listing}")
    chosen |= matched
  return unflatten({name: name in chosen for name in names})


def partition(tree: Tree, selection: Tree) -> tuple[dict, dict]:
  """Splits a tree into the leaves that a `mask` selects, and the rest."""
  leaves, flags = flatten(tree), flatten(selection)
  if leaves.keys() != flags.keys():
    odd = sorted(leaves.keys() ^ flags.keys())
    raise ValueError(f"tree and mask differ in\n{_listing(odd)}")
  selected = {name: x for name, x in leaves.items() if flags[name]}
  rest = {name: x for name, x in leaves.items() if not flags[name]}
  return unflatten(selected), unflatten(rest)


def merge(*trees: Tree) -> dict[str, Any]:
  """Joins trees; raises ValueError if a leaf or its name is in two of them."""
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
  """Returns the sha256 (hex) of names, shapes, dtypes and bytes, in any order.

  `fetch` makes a numpy array of one leaf after the other, so that the tree may
  be larger than the host's memory.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(flatten(tree).items()):
    array = np.ascontiguousarray(fetch(leaf))
    # Not dtype.str: it is "<V2" for bfloat16 and for any 2-byte record.
    digest.update(f"{name}\0{leaf.shape}\0{array.dtype.name}\0".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def check_same_structure(got: Tree, want: Tree, what: str) -> None:
  """Raises InputError unless two trees have equal names, shapes and dtypes.

  The message lists where `got`, which it calls `what`, differs from `want`.
  """
  found, wanted = (
    {name: _describe(leaf) for name, leaf in flatten(tree).items()}
    for tree in (got, want)
  )
  sections = {
    "missing (wanted, not found)": [
      f"{name}: {leaf}" for name, leaf in wanted.items() if name not in found
    ],
    "unexpected (found, not wanted)": [
      f"{name}: {leaf}" for name, leaf in found.items() if name not in wanted
    ],
    "misshapen": [
      f"{name}: found {found[name]}, wanted {leaf}"
      for name, leaf in wanted.items()
      if found.get(name, leaf) != leaf
    ],
  }
  lines = [
    f"{len(leaves)} {title}:\n{_listing(leaves)}"
    for title, leaves in sections.items()
    if leaves
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
