"""Text that the stages of a run learn from: named sources, mixed by weight."""

import dataclasses
from typing import Any

from calm_jax.core.errors import InputError, check_choice
from calm_jax.data import examples, pipeline
from calm_jax.data.documents import RowOptions
from calm_jax.data.examples import ExampleSource, TextExample
from calm_jax.experiments.languages import expand
from calm_jax.language_model import LanguageModel
from calm_jax.text.alignment import ChunkEncoder
from calm_jax.training.stage import Stage

_HINT = "; for configs/compose.py, --config.eval_data= a jsonl or txt file"


@dataclasses.dataclass(frozen=True)
class TextTask:
  """The text that is learnt (`sources`) and measured (`held_out`), by name.

  Entries with {language} in their names stand for one of each language.

  Attributes:
    languages: codes, such as lij_Latn.
    held_out: without those of an empty path.
    evals: by name, see `evals.tasks.make`.
    skip_evals: names or patterns, such as mgsm_*, of those to leave out.
    allow_code_execution: whether programs that models write are run, in a
      sandbox.
    num_samples: texts to sample from an anchor that is loaded, for held-out
      text of its own domain if there is no "anchor_domain"; 0 for none.
    sample_tokens: the longest length of a sample.
    prompt_tokens: the longest prompt of an evaluation, in the anchor's tokens.
    eval_batch_size, eval_length: rows, in generation too, and their tokens.
  """

  languages: tuple[str, ...] = ()
  sources: dict[str, ExampleSource] = dataclasses.field(default_factory=dict)
  held_out: dict[str, ExampleSource] = dataclasses.field(default_factory=dict)
  evals: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  skip_evals: tuple[str, ...] = ()
  allow_code_execution: bool = False
  num_samples: int = 0
  sample_tokens: int = 200
  prompt_tokens: int = 1024
  eval_batch_size: int = 32
  eval_length: int = 256


@dataclasses.dataclass(frozen=True)
class Share:
  """The weight of a source in a mixture, and the fraction of it that is used.

  Languages share the weight of an entry with {language}.
  """

  weight: float
  fraction: float = 1.0


@dataclasses.dataclass(frozen=True)
class TextData:
  """The data of a stage.

  Attributes:
    mixture: by the names of the task's sources.
    pack: whether a row holds several examples.
    too_long: "error", "cut" or "drop" a prompt that is longer than a row.
    watch: held-out sets whose loss is followed; all if it names none.
  """

  mixture: dict[str, Share] = dataclasses.field(default_factory=dict)
  pack: bool = True
  too_long: str = "error"
  watch: tuple[str, ...] = ()


class TextCorpus:
  """The text of a task, read from files and cut into batches for a model.

  Attributes:
    held_out: the examples of each held-out set with a path, by name.

  Raises:
    InputError: there is no held-out text, or a file is not as it should be.
  """

  def __init__(self, task: TextTask, seed: int):
    self._task, self._seed = task, seed
    self._encoders: dict[str, ChunkEncoder] = {}
    self._examples: dict[str, list[TextExample]] = {}
    self._sources = expand(task.sources, task.languages)
    held_out = expand(task.held_out, task.languages)
    self.held_out = {
      name: examples.read_examples(source, print)
      for name, source in held_out.items()
      if source.path
    }
    if not self.held_out:
      raise InputError(f"no held-out text: give {list(held_out)} a path{_HINT}")

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
    options = self._stage_options(
      stage,
      model,
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
    watched = [e for name in names for e in self.held_out[name]]
    options = self._stage_options(stage, model, seed=None)
    return list(pipeline.text_source({"": (watched, 1.0)}, options))

  def row_options(self, model: LanguageModel, **options: Any) -> RowOptions:
    """The options of a model's batches, with its tokenizers."""
    for name in model.tokenizers.keys() - self._encoders.keys():
      self._encoders[name] = ChunkEncoder(model.tokenizers[name])
    augmenting = {name: self._encoders[name] for name in model.tokenizers}
    return RowOptions(tokenizer=model.text(), augmenting=augmenting, **options)

  def _stage_options(
    self, stage: Stage, model: LanguageModel, **options: Any
  ) -> RowOptions:
    for name in ("batch_size", "length", "augmenting_length"):
      options[name] = getattr(stage, name)
    return self.row_options(model, **options)

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
