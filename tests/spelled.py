"""Checkpoint folders with a tokenizer of one token a character."""

from __future__ import annotations

from pathlib import Path

import helpers

from calm_jax.models.hf import export
from calm_jax.text import tokenizer

ALPHABET = "abcdefghij kl."
VOCAB = 4 + len(ALPHABET)
SHAPE = {
  "width": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
  "head_dim": 4, "mlp_width": 8, "max_length": 64,
}  # fmt: skip


def save(folder: Path, seed: int, text: str = ALPHABET, **changes) -> Path:
  """Writes a small random model that spells `text`."""
  shape = SHAPE | {"vocab_size": 4 + len(set(text))} | changes
  export.save_params(folder, *helpers.model(seed, **shape))
  tokenizer.train_sentencepiece(
    [text], folder / "tokenizer", vocab_size=4 + len(set(text))
  )
  return folder
