"""The key-value experiment (§4.1): arithmetic over memorised keys."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np

from calm_jax.core import files
from calm_jax.core.typed_fields import Count
from calm_jax.data import key_value_text, key_values
from calm_jax.data.key_value_source import KeyValueSource
from calm_jax.data.key_values import ExpressionOptions, KeyDictionary
from calm_jax.evals import audit
from calm_jax.evals.audit import AuditSet
from calm_jax.evals.base import Row
from calm_jax.evals.exact_match import count_right, exact_match
from calm_jax.experiments.audit_sets import AuditOptions
from calm_jax.experiments.base import Models
from calm_jax.language_model import LanguageModel
from calm_jax.training.stage import Stage

# The keys that the expressions of an evaluation set are drawn from.
SPLITS = ("held_in", "mixed", "held_out")
# The expressions of held-out losses, and those of accuracies at the end.
_WATCH_SEED = 1_000_003
_TEST_SEED = 2_000_003
_EVAL_ROWS = 256


@dataclasses.dataclass(frozen=True)
class KeyValueTask:
  """The dictionary and the expressions over it, as `data.key_value_text`."""

  num_keys: Count = 999  # of the dictionary D_KV; its values are 1 .. num_keys
  held_in_fraction: float = 0.2  # of the keys, for D_C (20% in the paper)
  min_terms: Count = 2  # keys in an expression
  max_terms: Count = 2
  operators: str = "+-"  # some of "+-*"
  max_products: Count | None = None  # how many * an expression may hold
  # How keys and digits are split, see `key_value_text.train_tokenizer`.
  keys: str = "pieces"
  digits: str = "single"
  num_examples: Count = 1000  # expressions per evaluation set


@dataclasses.dataclass(frozen=True)
class KeyValueData:
  """The data of a stage; for the fields see `KeyValueSource`.

  What is None is that of the `KeyValueTask`.
  """

  tasks: dict[str, float] = dataclasses.field(default_factory=dict)
  pack: bool = True
  any_prompt: bool = False
  keys: str = "all"
  part: str = "train"
  min_terms: Count | None = None
  max_terms: Count | None = None
  operators: str | None = None
  max_products: Count | None = None
  levelling: Count = 1


class KeyValueExperiment:
  """The stages' data, Table 1, and attention maps; see `Experiment`."""

  task_type: ClassVar[type] = KeyValueTask
  data_type: ClassVar[type] = KeyValueData

  def __init__(
    self, task: KeyValueTask, seed: int, workdir: Path, loaded: Models
  ):
    del loaded
    self.task, self.seed, self.workdir = task, seed, workdir
    self.kv = key_values.make_dictionary(
      task.num_keys, task.held_in_fraction, seed
    )
    path = workdir / "tokenizer"
    tokenizer = key_value_text.train_tokenizer(
      self.kv, path, keys=task.keys, digits=task.digits, seed=seed
    )
    self.tokenizers = {"anchor": tokenizer, "augmenting": tokenizer}
    # Drawing them now raises what it would after training.
    drawn_NW = np.concatenate([self._expressions(split) for split in SPLITS])
    self._longest = _longest_answer(self.kv, drawn_NW)

  def source(self, stage: Stage, model: LanguageModel, seed: int, share=(0, 1)):
    """An endless mixture of the stage's tasks; see `KeyValueSource`."""
    del model
    data, options = stage.data, {}
    for field in dataclasses.fields(ExpressionOptions):
      value = getattr(data, field.name)
      options[field.name] = (
        getattr(self.task, field.name) if value is None else value
      )
    return KeyValueSource(
      self.kv,
      self.tokenizers["anchor"],
      data.tasks,
      ExpressionOptions(**options),
      seed=seed,
      batch_size=stage.batch_size,
      length=stage.length,
      any_prompt=data.any_prompt,
      pack=data.pack,
      process_index=share[0],
      process_count=share[1],
    )

  def eval_batches(self, stage: Stage, model: LanguageModel) -> list:
    """Two batches of expressions that no stage trains on."""
    least = self.task.min_terms
    data = dataclasses.replace(stage.data, part="eval", min_terms=least)
    watched = dataclasses.replace(stage, data=data)
    source = self.source(watched, model, _WATCH_SEED)
    return [source[0], source[1]]

  def evaluate(
    self, models: Models, data: KeyValueData, prefix: str = ""
  ) -> dict:
    """Measures Table 1, in percent, and writes the models' predictions.

    The models are by column: "augmenting", "anchor", "composed". KV-MATH is
    asked as in `data`, that of the stage that composed them; where that is in
    steps, so is NUM-MATH once more, of the models that calculate.
    """
    kv_math = _kv_math(data)
    tasks = {"kv_subs": "kv_subs", "num_math": "num_math", "kv_math": kv_math}
    if kv_math == "kv_math_steps":
      tasks["num_math_steps"] = "num_math_steps"
    table: dict[str, dict[str, float]] = {row: {} for row in tasks}
    parts: dict[str, dict[str, dict]] = {row: {} for row in tasks}
    for row, task in tasks.items():
      for column, model in models.items():
        if row == "num_math_steps" and column.startswith("augmenting"):
          continue
        has_splits = row == "kv_math" and column == "composed"
        for split in SPLITS if has_splits else SPLITS[-1:]:
          kind = f"_{split}" if row == "kv_math" else ""
          file = f"{prefix}{row}{kind}.{column}.jsonl"
          accuracy, rows = self._measure(file, model, task, split)
          if has_splits:
            table[row][f"{column}_{split}"] = accuracy
          # The headline is all keys held out, the last of the splits.
          table[row][column] = accuracy
          parts[row][column] = _accuracy_of_parts(rows)
    return {
      "table1": table,
      "table1_parts": parts,
      "answer": "direct" if kv_math == "kv_math" else "steps",
      "examples": self.task.num_examples,
    }

  def _expressions(self, split: str) -> np.ndarray:
    task = self.task
    options = ExpressionOptions(
      task.min_terms,
      task.max_terms,
      task.operators,
      keys=split,
      part="eval",
      max_products=task.max_products,
    )
    rng = np.random.default_rng((_TEST_SEED, self.seed))
    return key_values.sample_expressions(
      rng, self.kv, task.num_examples, options
    )

  def _measure(
    self, file: str, model: LanguageModel, task: str, split: str
  ) -> tuple[float, list[Row]]:
    expressions = self._expressions(split)
    examples = key_value_text.make_examples(self.kv, expressions, task)
    accuracy, rows = exact_match(
      [example.prompt for example in examples],
      [example.completion for example in examples],
      lambda prompts: model.generate(
        prompts, self._longest, batch_size=_EVAL_ROWS
      ),
      num_terms=key_values.num_terms(expressions).tolist(),
      num_products=key_values.num_products(expressions).tolist(),
    )
    files.write_json_lines(self.workdir / "predictions" / file, rows)
    return round(accuracy, 2), rows

  def audit_sets(
    self, model: LanguageModel, data: KeyValueData, options: AuditOptions
  ) -> dict[str, AuditSet]:
    """The tasks of Table 1, of KV-MATH all keys held out."""
    del model
    drawn = self._expressions("held_out")[: options.examples]
    sets = {}
    for task in ("kv_subs", "num_math", _kv_math(data)):
      examples = key_value_text.make_examples(self.kv, drawn, task)
      prompts = [example.prompt for example in examples]
      completions = [example.completion for example in examples]
      sets[task] = AuditSet(
        prompts=prompts,
        completions=completions,
        judge=audit.exact_match_judge(prompts, completions),
        max_new_tokens=self._longest,
      )
    return sets

  def attention_maps(self, model: LanguageModel, data: KeyValueData) -> dict:
    """Cross-attention over one KV-MATH example with all keys held out."""
    drawn = self._expressions("held_out")
    example = key_value_text.make_examples(self.kv, drawn, _kv_math(data))[0]
    return model.attention(example.prompt, example.completion)


def _accuracy_of_parts(rows: list[Row]) -> dict[str, dict[str, float]]:
  """Accuracy in percent by the number of terms, and by that of products."""
  parts: dict[str, dict[str, float]] = {}
  for column in ("num_terms", "num_products"):
    parts[column] = {
      str(number): round(100 * right / total, 2)
      for number, (right, total) in count_right(rows, column).items()
    }
  return parts


def _longest_answer(kv: KeyDictionary, expressions_NW: np.ndarray) -> int:
  """Tokens of a right answer at most, with EOS: one program for all sets."""
  answers = key_value_text.make_examples(kv, expressions_NW, "kv_math_steps")
  return max(len(answer.completion) for answer in answers) + 1


def _kv_math(data: KeyValueData) -> str:
  """The task that a composition learnt KV-MATH as: direct or in steps."""
  tasks = [t for t in ("kv_math", "kv_math_steps") if data.tasks.get(t)]
  # D_C may hold substitutions only (§4.1): what follows them is asked then.
  return tasks[-1] if tasks else "kv_math_steps"
