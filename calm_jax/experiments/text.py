"""Text that two models read: languages, code, or files of one's own (§4.2-3).

Stages learn from mixtures of named sources. At the end every model is measured
on held-out text, in bits per byte, and by the evaluators that the config names.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

import jax
import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.data import pipeline
from calm_jax.data.documents import RowOptions
from calm_jax.data.examples import (
  ExampleSource,
  TextExample,
  read_examples,
  take_fraction,
)
from calm_jax.evals import suite, tasks
from calm_jax.evals.base import Evaluation
from calm_jax.evals.perplexity import perplexity
from calm_jax.experiments.languages import expand
from calm_jax.generation.text import with_bos
from calm_jax.language_model import LanguageModel
from calm_jax.parallel import processes
from calm_jax.text.alignment import ChunkEncoder
from calm_jax.text.tokenizer import Tokenizer
from calm_jax.training import step
from calm_jax.training.stage import Stage

ANCHOR_DOMAIN = "anchor_domain"
LOOK_TOKENS = 40


@dataclasses.dataclass(frozen=True)
class TextTask:
  """Which text is learnt and measured.

  An entry with {language} in its name stands for one of each language.

  Attributes:
    languages: codes, such as lij_Latn.
    sources: by name, arguments of `data.examples.ExampleSource`.
    held_out: the same, of text to measure. A source with an empty path is
      left out.
    evals: by name, see `evals.tasks.make`.
    skip_evals: names or patterns, such as mgsm_*, of those to leave out.
    allow_code_execution: whether what models write is run, in a sandbox.
    num_samples: texts to sample from an anchor that is loaded, for held-out
      text of its own domain if there is no "anchor_domain"; 0 for none.
    sample_tokens: their longest length.
    prompt_tokens: of the anchor, longest prompt of an evaluation.
    eval_batch_size, eval_length: rows and tokens of an evaluation batch.
    seed: of fractions and samples.
  """

  languages: tuple[str, ...]
  sources: dict[str, dict]
  held_out: dict[str, dict]
  evals: dict[str, dict]
  skip_evals: tuple[str, ...]
  allow_code_execution: bool
  num_samples: int
  sample_tokens: int
  prompt_tokens: int
  eval_batch_size: int
  eval_length: int
  seed: int


class Text:
  """The experiment: stages' data, and what each model makes of other text."""

  def __init__(self, task: TextTask, workdir: Path, loaded: dict):
    if not loaded:
      raise InputError(
        "no model: give --config.anchor= and --config.augmenting= a folder or "
        "a hub id"
      )
    self.task, self.workdir = task, workdir
    # A model that is trained from scratch reads the other one's tokens.
    self.tokenizer = next(iter(loaded.values())).text()
    if "anchor" in loaded:
      self.tokenizer = loaded["anchor"].text()
    self._encoders: dict[str, ChunkEncoder] = {}
    self._examples: dict[str, list[TextExample]] = {}
    self.sources = _sources(task.sources, task.languages)
    held_out = _sources(task.held_out, task.languages)
    self.held_out = {
      name: read_examples(source, print)
      for name, source in held_out.items()
      if source.path
    }
    if not self.held_out:
      raise InputError(
        f"no held-out text: give {list(held_out)} a path; for "
        "configs/compose.py, --config.eval_data= a jsonl or txt file"
      )
    sampled = task.num_samples and ANCHOR_DOMAIN not in self.held_out
    # As it was loaded, which a stage may change: held for no other end.
    self._sampled = loaded.get("anchor") if sampled else None
    if sampled and self._sampled is None:
      raise InputError(
        "an anchor that is trained here cannot be sampled before: give "
        f"held_out.{ANCHOR_DOMAIN} a path, or num_samples=0"
      )
    if sampled and self.tokenizer.bos_id is None:
      raise InputError(
        "the anchor has no BOS token to sample texts from: give held_out."
        f"{ANCHOR_DOMAIN} a path (--config.anchor_eval_data=), or num_samples=0"
      )
    self.evals = self._evaluations()

  def _evaluations(self) -> dict[str, Evaluation]:
    task = self.task
    wanted = expand(task.evals, task.languages)
    left_out = {
      pattern: fnmatch.filter(wanted, pattern) for pattern in task.skip_evals
    }
    if unknown := [p for p, names in left_out.items() if not names]:
      raise InputError(f"skip_evals={unknown} are none of {list(wanted)}")
    found = {}
    for name, settings in wanted.items():
      if any(name in names for names in left_out.values()):
        print(f"evaluation {name} is left out, as skip_evals asks", flush=True)
        continue
      if settings.get("kind") in tasks.RUN_CODE:
        allowed = {"allow_code_execution": task.allow_code_execution}
        settings = settings | allowed
      found[name] = tasks.make(settings)
    return found

  def _read(self, name: str) -> list[TextExample]:
    if name not in self.sources:
      raise InputError(
        f"there is no source {name!r}; there are {list(self.sources)}"
      )
    if not self.sources[name].path:
      raise InputError(
        f"source {name!r} has no path: give it a jsonl or txt file; for "
        "configs/compose.py, --config.data="
      )
    if name not in self._examples:
      self._examples[name] = read_examples(self.sources[name], print)
    return self._examples[name]

  def source(
    self,
    stage: Stage,
    model: LanguageModel,
    seed: int,
    share: tuple[int, int] = (0, 1),
  ):
    """Shuffled rows of the stage's "mixture": {source: weight, fraction}.

    Languages share the weight of an entry that is of each language.
    """
    data, task, parts = stage.data, self.task, {}
    for entry, part in data["mixture"].items():
      names = list(expand({entry: None}, task.languages))
      for name in names:
        if name in parts:
          raise InputError(f"source {name!r} is in the mixture twice")
        examples = take_fraction(self._read(name), part["fraction"], task.seed)
        parts[name] = examples, part["weight"] / len(names)
    options = RowOptions(
      pack=data["pack"],
      too_long=data["too_long"],
      seed=seed,
      process_index=share[0],
      process_count=share[1],
      **self._reading(model),
      **_shape(stage),
    )
    source = pipeline.text_source(parts, options)
    print(source.describe_truncation(), flush=True)
    return source

  def eval_batches(self, stage: Stage, model: LanguageModel) -> list:
    """The held-out sets that the stage's data "watch"; all if it names none."""
    watched = stage.data["watch"] or tuple(self.held_out)
    names = expand(dict.fromkeys(watched), self.task.languages)
    if missing := [name for name in names if name not in self.held_out]:
      raise InputError(
        f"watch has {missing}, which are no held-out sets with a path; there "
        f"are {list(self.held_out)}; for configs/compose.py, "
        "--config.eval_data= a jsonl or txt file"
      )
    examples = [e for name in names for e in self.held_out[name]]
    options = RowOptions(seed=None, **self._reading(model), **_shape(stage))
    return list(pipeline.text_source({"": (examples, 1.0)}, options))

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
    """Bits per byte and perplexity of each set, and the config's evaluations.

    Only bits per byte if the models read different tokens: a perplexity is per
    token, and nothing else's can be set beside it.
    """
    del data
    results = self._scores(models, prefix)
    entries = {}
    for name, evaluation in self.evals.items():
      print(f"evaluating {name}", flush=True)
      entries[name], rows = suite.run(
        evaluation, models, self._fits, self.task.eval_batch_size
      )
      for column, predictions in rows.items():
        file = f"{prefix}{name}.{column}.jsonl"
        files.write_json_lines(self.workdir / "predictions" / file, predictions)
    if entries:
      results |= {"evals": entries, "groups": suite.groups(entries)}
    return results

  def _scores(self, models, prefix: str) -> dict[str, Any]:
    if self._sampled is not None:
      self.held_out[ANCHOR_DOMAIN] = self._sample(self._sampled)
      self._sampled = None
    table: dict = {"perplexity": {}, "bits_per_byte": {}}
    if any(model.tokenizers for model in models.values()):
      del table["perplexity"]
    for set_name, examples in self.held_out.items():
      for numbers in table.values():
        numbers[set_name] = {}
      for column, model in models.items():
        metrics, rows = perplexity(
          examples, lambda e, m=model: self._score(m, e)
        )
        for name, numbers in table.items():
          numbers[set_name][column] = metrics[name]
        files.write_json_lines(
          self.workdir / "scores" / f"{prefix}{set_name}.{column}.jsonl", rows
        )
    return table

  def _sample(self, anchor: LanguageModel) -> list[TextExample]:
    task = self.task
    texts = anchor.generate(
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

  def _fits(self, prompt: str) -> bool:
    # BOS comes before it.
    return len(self.tokenizer.encode(prompt)) < self.task.prompt_tokens

  def _score(self, model: LanguageModel, examples) -> list[tuple]:
    """What `evals.perplexity` asks for; long texts go on in a next window."""
    score = jax.jit(step.row_losses, static_argnums=1)
    options = RowOptions(
      batch_size=self.task.eval_batch_size,
      length=self.task.eval_length,
      pack=False,
      seed=None,
      **self._reading(model),
    )
    source = pipeline.text_source({"": (examples, 1.0)}, options)
    sums: dict[str, np.ndarray] = {}
    for i in range(len(source)):
      nats_B, tokens_B = processes.fetch(
        score(model.params, model.spec, source[i])
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
    example = next(iter(self.held_out.values()))[0]
    prompt = with_bos(self.tokenizer, self.tokenizer.encode(example.prompt))
    text = self.tokenizer.encode_continuation(
      example.prompt, example.completion
    )
    ids = (prompt + text)[:LOOK_TOKENS]
    # Without a BOS nothing predicts the first token: it is given.
    prompt_length = min(max(len(prompt), 1), len(ids))
    look = model.cross_attention(ids, prompt_length)
    return look | {"prompt_length": np.array(prompt_length)}


def _sources(entries: dict[str, dict], languages) -> dict[str, ExampleSource]:
  found = {}
  for name, settings in expand(entries, languages).items():
    try:
      found[name] = ExampleSource(**settings)
    except TypeError as error:
      raise InputError(f"source {name!r}: {error}") from error
  return found


def _shape(stage: Stage) -> dict[str, int]:
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
