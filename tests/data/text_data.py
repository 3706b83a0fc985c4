"""Small texts and tokenizers for tests of the data pipeline."""

from __future__ import annotations

import jax
import numpy as np

from calm_jax.data.documents import RowOptions
from calm_jax.data.examples import TextExample
from calm_jax.data.pipeline import text_source
from calm_jax.text.alignment import ChunkEncoder
from calm_jax.text.tokenizer import train_sentencepiece

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def train_tokenizer(folder, kind="bpe"):
  size = 40 if kind == "bpe" else 31
  return train_sentencepiece(
    [" ".join(WORDS), "0123456789=:"] * 3,
    folder / kind,
    vocab_size=size,
    model_type=kind,
  )


def augmenting(folder):
  """A model that reads the same text by letters."""
  return {"letters": ChunkEncoder(train_tokenizer(folder, "char"))}


def documents(count, words=3, name="a.txt", seed=0):
  rng = np.random.default_rng(seed)
  return [
    TextExample("", " ".join(rng.choice(WORDS, words)), f"{name} line {i + 1}")
    for i in range(count)
  ]


def questions(count):
  return [
    TextExample(f"{WORDS[i % 8]}: ", f"{i}", f"q.jsonl line {i + 1}")
    for i in range(count)
  ]


def flat(lists):
  return [item for items in lists for item in items]


def make_source(parts, tokenizer, **options):
  """A source of one list of examples, or of a mixture of parts."""
  if not isinstance(parts, dict):
    parts = {"": (parts, 1.0)}
  return text_source(parts, RowOptions(tokenizer=tokenizer, **options))


def one_pass(examples, tokenizer, **options):
  """All batches of the examples in order, an example a row."""
  settings = {"seed": None, "pack": False} | options
  return list(make_source(examples, tokenizer, **settings))


def texts_of(batch, tokenizer):
  """Texts by row, of the segments of each row."""
  return [
    [
      tokenizer.decode(tokens[segments == number])
      for number in range(1, segments.max() + 1)
    ]
    for tokens, segments in zip(
      batch.anchor.tokens, batch.anchor.segments, strict=True
    )
  ]


def assert_same(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


def joined(shares):
  """The global batch of the shares of all hosts."""
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *shares)
