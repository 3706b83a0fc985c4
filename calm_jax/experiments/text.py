"""The text experiment: languages, code, or files of one's own (§4.2-3).

Stages learn from mixtures of named sources. At the end every model is measured
on held-out text, in bits per byte, and by the evaluations of the config.
"""

import fnmatch
import functools
from pathlib import Path

import jax
import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.data import pipeline
from calm_jax.data.examples import TextExample
from calm_jax.evals import suite, tasks
from calm_jax.evals.base import Evaluation
from calm_jax.evals.perplexity import perplexity
from calm_jax.experiments.base import Models
from calm_jax.experiments.languages import expand
from calm_jax.experiments.text_data import TextCorpus, TextData, TextTask
from calm_jax.language_model import LanguageModel
from calm_jax.parallel import processes
from calm_jax.text.tokenizer import Tokenizer
from calm_jax.training import step

ANCHOR_DOMAIN = "anchor_domain"
PICTURE_TOKENS = 40


class TextExperiment:
  """The stages' data, and the measures of each model; see `Experiment`."""

  task_type, data_type = TextTask, TextData

  def __init__(self, task: TextTask, seed: int, workdir: Path, loaded: Models):
    if not loaded:
      raise InputError(
        "no model: give --config.anchor= and --config.augmenting= a folder or "
        "a hub id"
      )
    self._task, self._seed, self._workdir = task, seed, workdir
    # A model that is trained from scratch reads the other one's tokens.
    side = "anchor" if "anchor" in loaded else next(iter(loaded))
    self.tokenizer = loaded[side].text()
    self.corpus = TextCorpus(task, seed)
    self.source = self.corpus.source
    self.eval_batches = self.corpus.eval_batches
    self._evaluations = _evaluations(task)
    # The anchor to sample texts from, before a stage changes it; it is held
    # for no other end.
    self._sampled: LanguageModel | None = None
    if not task.num_samples or ANCHOR_DOMAIN in self.corpus.held_out:
      return
    self._sampled, fault = loaded.get("anchor"), ""
    if self._sampled is None:
      fault = "an anchor that is trained here cannot be sampled before"
    elif self.tokenizer.bos_id is None:
      fault = "the anchor has no BOS token to sample texts from"
    if fault:
      raise InputError(
        f"{fault}: give held_out.{ANCHOR_DOMAIN} a path "
        "(--config.anchor_eval_data=), or num_samples=0"
      )

  def evaluate(self, models: Models, data: TextData, prefix: str = "") -> dict:
    """Bits per byte and perplexity of each set, and the config's evaluations.

    Only bits per byte if the models read different tokens: perplexities are
    per token, and those of different tokens do not compare.
    """
    del data
    results = self._held_out_scores(models, prefix)
    entries = {}
    for name, evaluation in self._evaluations.items():
      print(f"evaluating {name}", flush=True)
      entries[name], rows = suite.run(
        evaluation, models, self._fits, self._task.eval_batch_size
      )
      for column, predictions in rows.items():
        file = f"predictions/{prefix}{name}.{column}.jsonl"
        files.write_json_lines(self._workdir / file, predictions)
    if entries:
      results |= {"evals": entries, "groups": suite.groups(entries)}
    return results

  def _held_out_scores(self, models: Models, prefix: str) -> dict:
    """{"perplexity" and "bits_per_byte": {set: {column: value}}}."""
    held_out = self.corpus.held_out
    if self._sampled is not None:
      held_out[ANCHOR_DOMAIN] = self._sample(self._sampled)
      self._sampled = None
    measures = ["perplexity", "bits_per_byte"]
    if any(model.tokenizers for model in models.values()):
      measures = ["bits_per_byte"]
    table: dict = {m: {name: {} for name in held_out} for m in measures}
    for name, examples in held_out.items():
      for column, model in models.items():
        score = functools.partial(self._score, model)
        metrics, rows = perplexity(examples, score)
        for measure in measures:
          table[measure][name][column] = metrics[measure]
        file = f"scores/{prefix}{name}.{column}.jsonl"
        files.write_json_lines(self._workdir / file, rows)
    return table

  def _sample(self, anchor: LanguageModel) -> list[TextExample]:
    prompts, length = [""] * self._task.num_samples, self._task.sample_tokens
    texts = anchor.generate(prompts, length, temperature=1.0, seed=self._seed)
    return [
      TextExample("", text, f"sample {i} of the anchor")
      for i, text in enumerate(texts)
      if text
    ]

  def _fits(self, prompt: str) -> bool:  # with BOS before it
    return len(self.tokenizer.encode(prompt)) < self._task.prompt_tokens

  def _score(
    self, model: LanguageModel, examples: list[TextExample]
  ) -> list[tuple[float, float, int]]:
    """(nats, tokens, bytes) of each example, as `evals.perplexity` asks.

    A text that is longer than a row goes on in a next window.
    """
    score = jax.jit(step.row_losses, static_argnums=1)
    options = self.corpus.row_options(
      model,
      batch_size=self._task.eval_batch_size,
      length=self._task.eval_length,
      pack=False,
      seed=None,
    )
    source = pipeline.text_source({"": (examples, 1.0)}, options)
    sums = {example.origin: np.zeros(2) for example in examples}
    for i in range(len(source)):
      losses = processes.fetch(score(model.params, model.spec, source[i]))
      for origins, *row in zip(source.row_origins(i), *losses, strict=True):
        for origin in origins:  # one, or none in a row of padding
          sums[origin] += np.array(row)
    tokenizer = model.text()
    return [
      (*map(float, sums[e.origin]), _spelled_bytes(tokenizer, e))
      for e in examples
    ]

  def attention_maps(self, model: LanguageModel, data: TextData) -> dict:
    """Cross-attention over the start of the first held-out example."""
    del data
    example = next(iter(self.corpus.held_out.values()))[0]
    prompt = self.tokenizer.with_bos(self.tokenizer.encode(example.prompt))
    new = self.tokenizer.encode_continuation(example.prompt, example.completion)
    ids = (prompt + new)[:PICTURE_TOKENS]
    # Without a BOS nothing predicts the first token: it is given.
    prompt_length = min(max(len(prompt), 1), len(ids))
    maps = model.cross_attention(ids, prompt_length)
    return maps | {"prompt_length": np.array(prompt_length)}


def _evaluations(task: TextTask) -> dict[str, Evaluation]:
  """The evaluations of a task that are not left out, by name."""
  wanted = expand(task.evals, task.languages)
  skipped = {p: fnmatch.filter(wanted, p) for p in task.skip_evals}
  if unknown := [p for p, names in skipped.items() if not names]:
    raise InputError(f"skip_evals={unknown} are none of {list(wanted)}")
  made = {}
  for name, settings in wanted.items():
    if any(name in names for names in skipped.values()):
      print(f"evaluation {name} is left out, as skip_evals asks", flush=True)
      continue
    if settings.get("kind") in tasks.RUN_CODE:
      allowed = {"allow_code_execution": task.allow_code_execution}
      settings = settings | allowed
    made[name] = tasks.make(settings)
  return made


def _spelled_bytes(tokenizer: Tokenizer, example: TextExample) -> int:
  """Bytes of the completion that its tokens spell; no unknown characters."""
  ids = tokenizer.encode_continuation(example.prompt, example.completion)
  text = tokenizer.decode_continuation(tokenizer.encode(example.prompt), ids)
  # Normalisation may write more than there was.
  return min(len(text.encode()), len(example.completion.encode()))
