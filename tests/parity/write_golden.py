"""Writes golden/families.*: one sequence's logits of every family's base.

  python tests/parity/write_golden.py

Names and shapes of tensors are stored too, and not taken from our own tables,
so that a wrong table is seen without torch.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import reference
from golden import options


def main() -> None:
  stored, described = {}, {}
  for family in options.FAMILIES:
    with tempfile.TemporaryDirectory() as temporary:
      folder = pathlib.Path(temporary)
      reference.write(folder, options.config_json(family))
      tokens = options.tokens(options.LENGTHS[1])
      stored[family] = reference.logits(reference.read(folder), tokens[None])[0]
      described[family] = {
        "config": json.loads((folder / "config.json").read_text()),
        "tensors": reference.shapes(folder),
      }
  np.savez_compressed(options.HERE / "families.npz", **stored)
  # One line a family: nobody reads it, and it is half the size.
  lines = (f"{json.dumps(f)}: {json.dumps(d)}" for f, d in described.items())
  text = "{\n" + ",\n".join(lines) + "\n}\n"
  (options.HERE / "families.json").write_text(text)


if __name__ == "__main__":
  main()
