"""Two checkpoints and a file of text: compose, and compare perplexities."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from calm_jax import trainer
from calm_jax.alignment import ChunkEncoder
from calm_jax.data import pipeline
from calm_jax.data.sources import TextExample, read_examples, take_fraction
from calm_jax.errors import InputError
from calm_jax.evals.base import write_rows
from calm_jax.evals.perplexity import perplexity
from calm_jax.language_model import LanguageModel, with_bos
from calm_jax.tokenizer import Tokenizer

LOOK_TOKENS = 40


@dataclasses.dataclass(frozen=True)
class TextTask:
  """Which text is learnt and measured.

  Attributes:
    data: .jsonl of {"text"} or {"prompt", "completion"}, or .txt.
    eval_data: held-out text of the same domain.
    anchor_eval_data: text of the anchor's own domain; if empty, `num_samples`
      texts are sampled from the anchor itself.
    num_samples: how many, 0 for none.
    sample_tokens: their longest length.
    text_field, prompt_field, completion_field: names in the jsonl files.
    eval_batch_size, eval_length: rows and tokens of an evaluation batch.
    seed: of the fraction and of the samples.
  """

  data: str
  eval_data: str
  anchor_eval_data: str
  num_samples: int
  sample_tokens: int
  text_field: str
  prompt_field: str
  completion_field: str
  eval_batch_size: int
  eval_length: int
  seed: int


class Text:
  """The experiment: stages' data, and perplexity on held-out text."""

  def __init__(self, task: TextTask, workdir: Path, loaded: dict):
    for side in ("anchor", "augmenting"):
      if side not in loaded:
        raise InputError(
          f"no {side} model: give --config.{side}= a folder or a hub id"
        )
    self.task, self.workdir = task, workdir
    self.anchor = loaded["anchor"]
    self.tokenizer = self.anchor.text()
    self._encoders: dict[str, ChunkEncoder] = {}
    self.examples = self._read(task.data, "data")
    self.eval_sets = {"domain": self._read(task.eval_data, "eval_data")}
    if task.anchor_eval_data:
      self.eval_sets["anchor_domain"] = self._read(
        task.anchor_eval_data, "anchor_eval_data"
      )

  def _read(self, path: str, option: str) -> list[TextExample]:
    if not path:
      raise InputError(f"no text: give --config.{option}= a jsonl or txt file")
    return read_examples(
      path,
      text_field=self.task.text_field,
      prompt_field=self.task.prompt_field,
      completion_field=self.task.completion_field,
    )

  def source(self, stage: trainer.Stage, model: LanguageModel, seed: int):
    """Shuffled rows of the stage's "fraction" of the examples."""
    data = stage.data
    return pipeline.text_source(
      take_fraction(self.examples, data["fraction"], self.task.seed),
      pack=data["pack"],
      seed=seed,
      **self._reading(model),
      **_shape(stage),
    )

  def eval_batches(self, stage: trainer.Stage, model: LanguageModel) -> list:
    """All of the domain's held-out text."""
    return list(
      pipeline.eval_batches(
        self.eval_sets["domain"],
        pack=True,
        **self._reading(model),
        **_shape(stage),
      )
    )

  def _reading(self, model: LanguageModel) -> dict[str, Any]:
    """The tokenizers that a model's batches are made with."""
    for name, tokenizer in model.tokenizers.items():
      if name not in self._encoders:
        self._encoders[name] = ChunkEncoder(tokenizer)
    return {
      "tokenizer": model.text(),
      "augmenting": {name: self._encoders[name] for name in model.tokenizers},
    }

  def evaluate(
    self, models: dict[str, LanguageModel], data: dict, prefix: str = ""
  ) -> dict[str, Any]:
    """Perplexity and bits per byte of each model on each set.

    Only bits per byte if the models read different tokens: a perplexity is per
    token, and nothing else's can be set beside it.
    """
    del data
    if self.task.num_samples and "anchor_domain" not in self.eval_sets:
      self.eval_sets["anchor_domain"] = self._sample()
    table: dict = {"perplexity": {}, "bits_per_byte": {}}
    if any(model.tokenizers for model in models.values()):
      del table["perplexity"]
    for set_name, examples in self.eval_sets.items():
      for numbers in table.values():
        numbers[set_name] = {}
      for column, model in models.items():
        outcome = perplexity(examples, lambda e, m=model: self._score(m, e))
        for name, numbers in table.items():
          numbers[set_name][column] = outcome.metrics[name]
        write_rows(
          self.workdir / "scores" / f"{prefix}{set_name}.{column}.jsonl",
          outcome.rows,
        )
    return table

  def _sample(self) -> list[TextExample]:
    task = self.task
    texts = self.anchor.generate(
      [""] * task.num_samples,
      task.sample_tokens,
      temperature=1.0,
      seed=task.seed,
    )
    return [
      TextExample("", text, f"sample {i} of the anchor")
      for i, text in enumerate(texts)
      if text
    ]

  def _score(self, model: LanguageModel, examples) -> list[tuple]:
    """What `evals.perplexity` asks for; long texts go on in a next window."""
    score = jax.jit(trainer.row_losses, static_argnums=1)
    source = pipeline.text_source(
      examples,
      batch_size=self.task.eval_batch_size,
      length=self.task.eval_length,
      pack=False,
      seed=None,
      **self._reading(model),
    )
    sums: dict[str, np.ndarray] = {}
    for i in range(len(source)):
      nats_B, tokens_B = jax.device_get(
        score(model.tree, model.spec, source[i])
      )
      rows = zip(source.row_origins(i), nats_B, tokens_B, strict=True)
      for origins, *both in rows:
        for origin in origins:  # one, or none in a row of padding
          sums[origin] = sums.get(origin, np.zeros(2)) + np.array(both)
    return [
      (*map(float, sums[e.origin]), _spelled_bytes(model.text(), e))
      for e in examples
    ]

  def look(self, model: LanguageModel, data: dict) -> dict[str, np.ndarray]:
    """Cross-attention over the start of the first held-out example."""
    del data
    example = self.eval_sets["domain"][0]
    prompt = with_bos(self.tokenizer, self.tokenizer.encode(example.prompt))
    text = self.tokenizer.encode_continuation(
      example.prompt, example.completion
    )
    ids = (prompt + text)[:LOOK_TOKENS]
    # Without a BOS nothing predicts the first token: it is given.
    prompt_length = min(max(len(prompt), 1), len(ids))
    look = model.cross_attention(ids, prompt_length)
    return look | {"prompt_length": np.array(prompt_length)}


def _shape(stage: trainer.Stage) -> dict[str, int]:
  return {
    "batch_size": stage.batch_size,
    "length": stage.length,
    "augmenting_length": stage.augmenting_length,
  }


def _spelled_bytes(tokenizer: Tokenizer, example: TextExample) -> int:
  """Bytes of the completion that its tokens spell; no unknown characters."""
  ids = tokenizer.encode_continuation(example.prompt, example.completion)
  text = tokenizer.decode_continuation(tokenizer.encode(example.prompt), ids)
  # Normalisation may write more than there was.
  return min(len(text.encode()), len(example.completion.encode()))
