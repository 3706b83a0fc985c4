"""The text experiment: languages, code, or files of one's own (§4.2-3).

Stages learn from mixtures of named sources of text. At the end every model is
measured on held-out text, in bits per byte, and by the evaluations of the
config.
"""

import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from calm_jax.core import files
from calm_jax.core.errors import InputError, check_choice
from calm_jax.data import documents, examples, facts, pipeline
from calm_jax.data.documents import RowOptions
from calm_jax.data.examples import TextExample
from calm_jax.data.rows import TextSource
from calm_jax.evals import suite
from calm_jax.evals.audit import AuditSet
from calm_jax.evals.base import Evaluation
from calm_jax.evals.perplexity import perplexity
from calm_jax.experiments import (
  audit_sets,
  baselines,
  evaluations,
  vocabularies,
)
from calm_jax.experiments.audit_sets import AuditOptions
from calm_jax.experiments.base import Models
from calm_jax.experiments.languages import expand
from calm_jax.experiments.text_task import TextData, TextTask
from calm_jax.generation import batching
from calm_jax.generation.text import spelled_bytes
from calm_jax.language_model import LanguageModel
from calm_jax.parallel import processes
from calm_jax.text.alignment import chunk_encoder
from calm_jax.training import step
from calm_jax.training.stage import Stage

ANCHOR_DOMAIN = "anchor_domain"
PICTURE_TOKENS = 40
_EXEMPLARS = 4  # of pasted text
_HINT = "; for configs/compose.py, --config.eval_data= a jsonl or txt file"


class TextExperiment:
  """The stages' data, and the measures of each model; see `Experiment`.

  `held_out` are the examples of each held-out set with a path, by name.
  """

  task_type: ClassVar[type] = TextTask
  data_type: ClassVar[type] = TextData

  def __init__(self, task: TextTask, seed: int, workdir: Path, loaded: Models):
    self._task, self._seed, self._workdir = task, seed, workdir
    if task.facts.folder:
      facts.write(task.facts, seed)
    self._examples: dict[str, list[TextExample]] = {}
    self._sources = expand(task.sources, task.languages)
    names = {n for v in task.tokenizers.values() for n in v.sources}
    self.tokenizers = vocabularies.make(
      task.tokenizers, loaded, {n: self._read(n) for n in names}, workdir
    )
    self._tokenizer = self.tokenizers["anchor"]
    held_out = expand(task.held_out, task.languages)
    self.held_out = {
      name: examples.read_examples(source, print)
      for name, source in held_out.items()
      if source.path
    }
    if not self.held_out:
      raise InputError(f"no held-out text: give {list(held_out)} a path{_HINT}")
    self._evaluations = self._read_evaluations()
    # The anchor to sample texts from, before a stage changes it; it is held
    # for no other end.
    self._sampled: LanguageModel | None = None
    if not task.num_samples or ANCHOR_DOMAIN in self.held_out:
      return
    self._sampled, fault = loaded.get("anchor"), ""
    if self._sampled is None:
      fault = "an anchor that is trained here cannot be sampled before"
    elif self._tokenizer.bos_id is None:
      fault = "the anchor has no BOS token to sample texts from"
    if fault:
      raise InputError(
        f"{fault}: give held_out.{ANCHOR_DOMAIN} a path "
        "(--config.anchor_eval_data=), or num_samples=0"
      )

  def source(self, stage: Stage, model: LanguageModel, seed: int, share=(0, 1)):
    """Shuffled rows of a stage's mixture; see `Experiment.source`."""
    data, languages, parts = stage.data, self._task.languages, {}
    for entry, part in data.mixture.items():
      names = list(expand({entry: None}, languages))
      for name in names:
        if name in parts:
          raise InputError(f"source {name!r} is in the mixture twice")
        read = self._read(name)
        used = examples.take_fraction(read, part.fraction, self._seed)
        parts[name] = used, part.weight / len(names)
    options = self._row_options(
      model,
      stage,
      pack=data.pack,
      too_long=data.too_long,
      seed=seed,
      process_index=share[0],
      process_count=share[1],
    )
    source = pipeline.text_source(parts, options)
    print(source.describe_truncation(), flush=True)
    return source

  def eval_batches(self, stage: Stage, model: LanguageModel) -> list:
    """Batches of the held-out sets that a stage watches."""
    entries = stage.data.watch or tuple(self.held_out)
    names = expand(dict.fromkeys(entries), self._task.languages)
    if missing := [name for name in names if name not in self.held_out]:
      raise InputError(
        f"watch has {missing}, which are no held-out sets with a path; there "
        f"are {list(self.held_out)}{_HINT}"
      )
    # What cannot be measured at the end is found now.
    length = self._eval_length({"": model})
    for held_out in self.held_out.values():
      if not all(example.is_plain for example in held_out):
        self._eval_source(model, held_out, length)
    watched = [e for name in names for e in self.held_out[name]]
    options = self._row_options(model, stage, seed=None)
    source = pipeline.text_source({"": (watched, 1.0)}, options)
    return [source[i] for i in range(len(source))]

  def _row_options(
    self, model: LanguageModel, stage: Stage | None = None, **options: Any
  ) -> RowOptions:
    """The options of a model's batches; their shape may be a stage's."""
    if stage is not None:
      for name in ("batch_size", "length", "augmenting_length"):
        options[name] = getattr(stage, name)
    joined = dict(model.spec.augmenting)
    limits = {name: joined[name].config.max_length for name in model.tokenizers}
    return RowOptions(
      tokenizer=model.text(),
      augmenting={n: chunk_encoder(t) for n, t in model.tokenizers.items()},
      augmenting_limits=limits,
      answers_apart=any(a.visibility == "encoder" for a in joined.values()),
      **options,
    )

  def _read(self, name: str) -> list[TextExample]:
    check_choice("source", name, list(self._sources))
    if not self._sources[name].path:
      raise InputError(
        f"source {name!r} has no path: give it a jsonl or txt file; for "
        "configs/compose.py, --config.data="
      )
    if name not in self._examples:
      self._examples[name] = examples.read_examples(self._sources[name], print)
    return self._examples[name]

  def _read_evaluations(self, *limits) -> dict[str, Evaluation]:
    task = self._task
    chosen = task.evals, task.languages, task.skip_evals
    return evaluations.read(*chosen, task.allow_code_execution, *limits)

  def evaluate(self, models: Models, data: TextData, prefix: str = "") -> dict:
    """Bits per byte and perplexity of each set, and the config's evaluations.

    Only bits per byte of a model that reads other tokens than the anchor:
    perplexities are per token, and those of different tokens do not compare.
    """
    del data
    results = self._held_out_scores(models, prefix)
    others = baselines.make(models, self._exemplars(), self._task.ensemble)
    asked, entries = models | others, {}
    for name, evaluation in self._evaluations.items():
      print(f"evaluating {name}", flush=True)
      fits = functools.partial(self._fits, models, evaluation.max_new_tokens)
      entries[name], rows = suite.run(
        evaluation, asked, fits, self._task.eval_batch_size
      )
      for column, predictions in rows.items():
        file = f"predictions/{prefix}{name}.{column}.jsonl"
        files.write_json_lines(self._workdir / file, predictions)
    if entries:
      results |= {"evals": entries, "groups": suite.groups(entries)}
    return results

  def audit_sets(
    self, model: LanguageModel, data: TextData, options: AuditOptions
  ) -> dict[str, AuditSet]:
    """Held-out text, and the evaluations that the options name."""
    del data
    models = {"": model} | {n: model.part(n) for n in model.sources}
    length, limit = self._eval_length(models), options.examples
    sets = audit_sets.held_out_sets(self.held_out, model, length, limit)
    for name, one in self._read_evaluations(options.evals, limit).items():
      fits = functools.partial(self._fits, models, one.max_new_tokens)
      if asked := audit_sets.evaluation_set(one, fits):
        sets[name] = asked
    return sets

  def _exemplars(self) -> list[TextExample]:
    """Draws the exemplars of pasted text; none without a source of them."""
    given = self._read(self._task.pasted) if self._task.pasted else []
    order = np.random.default_rng(self._seed).permutation(len(given))
    return [given[i] for i in order[:_EXEMPLARS]]

  def _held_out_scores(self, models: Models, prefix: str) -> dict:
    """{"perplexity" and "bits_per_byte": {set: {column: value}}}."""
    if self._sampled is not None:
      self.held_out[ANCHOR_DOMAIN] = self._sample(self._sampled)
      self._sampled = None
    measures = ("perplexity", "bits_per_byte")
    table: dict = {m: {name: {} for name in self.held_out} for m in measures}
    length = self._eval_length(models)
    if length < self._task.eval_length:
      asked = self._task.eval_length
      read = f"windows of {length}, not of eval_length={asked}"
      print(f"a model reads {length} tokens at most: {read}", flush=True)
    for name, held_out in self.held_out.items():
      is_chat = any(example.messages for example in held_out)
      for column, model in models.items():
        if is_chat and model.text().chat_template is None:
          print(f"{column} has no chat template for {name}", flush=True)
          continue
        score = functools.partial(self._score, model, length)
        metrics, rows = perplexity(held_out, score)
        is_anchors = model.text().fingerprint == self._tokenizer.fingerprint
        for measure in measures if is_anchors else measures[1:]:
          table[measure][name][column] = metrics[measure]
        file = f"scores/{prefix}{name}.{column}.jsonl"
        files.write_json_lines(self._workdir / file, rows)
    return table

  def _sample(self, anchor: LanguageModel) -> list[TextExample]:
    prompts = [""] * self._task.num_samples
    length = min(self._task.sample_tokens, anchor.max_length - 1)  # after BOS
    texts = anchor.generate(prompts, length, temperature=1.0, seed=self._seed)
    return [
      TextExample("", text, f"sample {i} of the anchor")
      for i, text in enumerate(texts)
      if text
    ]

  def _fits(self, models: Models, new_tokens: int, prompt: str) -> bool:
    """True if a prompt is short enough, and all models can answer it."""
    prompt_ids = self._tokenizer.encode_prompt(prompt)
    if len(prompt_ids) > self._task.prompt_tokens:
      return False
    for model in models.values():
      ids = model.text().encode_prompt(prompt)
      # An augmenting model reads tokens of its own, which may be more.
      readable = batching.num_readable(model, ids, len(ids), new_tokens)
      if readable < len(ids):
        return False
    return True

  def _eval_length(self, models: Models) -> int:
    """Tokens of a window of held-out text, the same for all models."""
    limits = [model.max_length for model in models.values()]
    return min(self._task.eval_length, *limits)

  def _eval_source(
    self, model: LanguageModel, texts: list[TextExample], length: int
  ) -> TextSource:
    options = self._row_options(
      model,
      batch_size=self._task.eval_batch_size,
      length=length,
      pack=False,
      seed=None,
    )
    return pipeline.text_source({"": (texts, 1.0)}, options)

  def _score(
    self, model: LanguageModel, length: int, texts: list[TextExample]
  ) -> list[tuple[float, float, int]]:
    """(nats, tokens, bytes) of each example, as `evals.perplexity` asks.

    A text that is longer than a row goes on in a next window.
    """
    # Logits of a row at a time: those of a batch are many gigabytes where a
    # vocabulary is large.
    spec = model.spec.with_compute(lambda _: {"loss_chunk": length})
    score = jax.jit(step.row_losses, static_argnums=1)
    source = self._eval_source(model, texts, length)
    sums = {example.origin: np.zeros(2) for example in texts}
    for i in range(len(source)):
      losses = processes.fetch(score(model.params, spec, source[i]))
      for origins, *row in zip(source.row_origins(i), *losses, strict=True):
        for origin in origins:  # one, or none in a row of padding
          sums[origin] += np.array(row)
    tokenizer = model.text()
    return [
      (
        float(sums[e.origin][0]),
        float(sums[e.origin][1]),
        spelled_bytes(tokenizer, e.prompt, e.completion),
      )
      for e in texts
    ]

  def attention_maps(self, model: LanguageModel, data: TextData) -> dict:
    """Cross-attention over the start of the first held-out example."""
    del data
    example = next(iter(self.held_out.values()))[0]
    encode = self._tokenizer.encode_pair
    prompt, new = encode(*documents.texts(example, self._tokenizer))
    ids = (prompt + new)[:PICTURE_TOKENS]
    ids = ids[: batching.num_readable(model, ids, len(prompt))]
    prompt_length = min(len(prompt), len(ids))
    maps = model.cross_attention(ids, prompt_length)
    # Without a BOS nothing predicts the first token: it is given.
    return maps | {"prompt_length": np.array(max(prompt_length, 1))}
