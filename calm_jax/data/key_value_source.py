"""Batches of the key-value task (§4.1), generated on demand.

An example is a row of words of `WordTable`, and each word a list of token ids.

Dimension letters: N examples, W words of each.
"""

import dataclasses
import functools
import hashlib
import json

import numpy as np

from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError, check_choice
from calm_jax.data import key_value_text, key_values, packing
from calm_jax.data.key_value_text import TASKS
from calm_jax.data.key_values import ExpressionOptions, KeyDictionary
from calm_jax.text.tokenizer import Tokenizer

_CHECKED = 256


@dataclasses.dataclass(eq=False)
class KeyValueSource:
  """Random access to endless global batches of expressions.

  `source[i]` follows from the fields and `i` alone: the rows that this process
  takes of batch `i`.

  Attributes:
    tokenizer: one of `train_tokenizer`, or any that splits the same way.
    tasks: weight of each task of the mixture.
    options: the expressions. Their `keys` restricts the tasks that ask for
      keys, NUM-MATH is of all values; those of part "eval" are distinct within
      a batch, not between batches.
    batch_size: B, rows of the global batch.
    length: L, slots of a row.
    any_prompt: each example is under any of the prompts, for a model that
      knows one task only, and does it whatever it is asked.
    pack: fill rows with consecutive examples; else one example a row.

  Raises:
    InputError: a bad choice, an example longer than `length`, or a tokenizer
      whose segmentation of a text is not that of the text's words.
  """

  kv: KeyDictionary
  tokenizer: Tokenizer
  tasks: dict[str, float]
  options: ExpressionOptions
  _: dataclasses.KW_ONLY
  seed: int
  batch_size: int
  length: int
  any_prompt: bool = False
  pack: bool = True
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self):
    self._rows = packing.host_rows(
      self.batch_size, self.process_index, self.process_count
    )
    self._weights = _task_weights(self.tasks)
    encode = self.tokenizer.encode
    # The tokenizer cuts numbers digit by digit, or three at a time.
    group = 3 if len(encode("123")) == 1 else 1
    self._table = key_value_text.WordTable(self.kv, group)
    special = self.tokenizer.bos_id, self.tokenizer.eos_id
    words = [[], *([] if i is None else [i] for i in special)]
    words += map(encode, self._table.words[len(words) :])
    lists = [np.array(ids, np.int32) for ids in words]
    self._tokens = packing.TokenLists.join(lists)
    self._mean_length = self._check_tokens()

  def __len__(self) -> int:
    return 1 << 40

  def __getitem__(self, index: int) -> Batch:
    """The batch at `index`: this process's rows [B / processes, L]."""
    rng = np.random.default_rng(np.random.SeedSequence((self.seed, index)))
    tokens, lengths_N, prompts_N, rows_N = self._fill(rng)
    first, last = np.searchsorted(rows_N, (self._rows.start, self._rows.stop))
    return packing.make_batch(
      packing.TokenLists(tokens, lengths_N).take(np.arange(first, last)),
      prompts_N[first:last],
      rows_N[first:last] - self._rows.start,
      batch_size=self._rows.stop - self._rows.start,
      length=self.length,
    )

  def describe(self, index: int) -> str:
    """Names the batch at `index`, for messages."""
    return f"batch {index} of {'+'.join(self.tasks)}, seed {self.seed}"

  @functools.cached_property
  def fingerprint(self) -> str:
    """Names the sequence of global batches, whatever the number of hosts."""
    parts = [
      self.kv.fingerprint,
      self.tokenizer.fingerprint,
      self.tokenizer.bos_id,
      self.tokenizer.eos_id,
      self.tasks,
      self.any_prompt,
      {k: v for k, v in vars(self.options).items() if v is not None},
      [self.seed, self.batch_size, self.length, self.pack],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def _fill(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Examples enough for all rows, as of `_generate`, and the row of each."""
    if not self.pack:
      drawn = self._generate(rng, self.batch_size, self.options)
      return *drawn, np.arange(self.batch_size)
    # Rows end with a gap of about half an example.
    gaps = self.batch_size * min(self._mean_length, self.length) / 2
    missing, parts = 1.02 * (self.batch_size * self.length - gaps), []
    while True:
      count = int(missing / self._mean_length) + 8
      parts.append(self._generate(rng, count, self.options))
      drawn = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
      rows_N = packing.pack_rows([(drawn[1], self.length)], pack=True)
      # A row is full only when an example has gone to the row after it.
      if rows_N[-1] >= self.batch_size:
        return *drawn, rows_N
      missing = (self.batch_size - rows_N[-1]) * self.length

  def _generate(
    self, rng: np.random.Generator, n: int, options: ExpressionOptions
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of n examples, their lengths and those of BOS and prompt."""
    sample = functools.partial(key_values.sample_expressions, rng, self.kv)
    expressions_NW = sample(n, options)
    tasks_N = rng.choice(len(TASKS), size=n, p=self._weights)
    numeric = np.flatnonzero(key_value_text.TASK_ASKED[tasks_N] != "keys")
    if options.keys != "all" and len(numeric):
      any_keys = dataclasses.replace(options, keys="all")
      expressions_NW[numeric] = sample(len(numeric), any_keys)
    prompts_N = key_value_text.TASK_PROMPTS[tasks_N]
    if self.any_prompt:
      prompts_N = rng.integers(len(key_value_text.PROMPTS), size=n)
    parts = self._table.examples(rng, expressions_NW, tasks_N, prompts_N)
    words_NW = np.concatenate(parts, axis=1)
    lengths_NW = self._tokens.lengths_N[words_NW]
    lengths_N = lengths_NW.sum(axis=1)
    # Most words of a row are `NO_WORD`, and have no tokens.
    words = words_NW[words_NW != key_value_text.NO_WORD]
    tokens = self._tokens.tokens[self._tokens.places(words)]
    if lengths_N.max() > self.length:
      examples = np.split(tokens, np.cumsum(lengths_N)[:-1])
      text = self.tokenizer.decode(examples[lengths_N.argmax()])
      raise InputError(
        f"the example {text!r} takes {lengths_N.max()} tokens and a row has"
        f" {self.length}: raise length, or lower max_terms"
      )
    return tokens, lengths_N, lengths_NW[:, : parts[0].shape[1]].sum(axis=1)

  def _check_tokens(self) -> float:
    """Compares words and tokenizer; returns the mean length in tokens."""
    tokens, lengths_N, prompts_N = self._generate(
      np.random.default_rng(self.seed),
      _CHECKED,
      dataclasses.replace(self.options, part="any"),
    )
    special = {self.tokenizer.bos_id, self.tokenizer.eos_id}
    examples = np.split(tokens, np.cumsum(lengths_N)[:-1])
    for ids, size in zip(examples, prompts_N, strict=True):
      given, learnt = (
        [i for i in part.tolist() if i not in special]
        for part in (ids[:size], ids[size:])
      )
      texts = self.tokenizer.decode(given), self.tokenizer.decode(learnt)
      text = "".join(texts)
      if self.tokenizer.encode(text) != given + learnt or not all(texts):
        raise InputError(
          f"the tokenizer {self.tokenizer.source} does not split {text!r} where"
          " its keys, digits and operators meet; use one made by"
          " train_tokenizer"
        )
    return float(lengths_N.mean())


def _task_weights(tasks: dict[str, float]) -> np.ndarray:
  for task, weight in tasks.items():
    check_choice("task", task, list(TASKS))
    if weight < 0:
      raise InputError(f"task {task!r} has the negative weight {weight}")
  weights = np.array([tasks.get(task, 0.0) for task in TASKS], float)
  if not weights.sum() > 0:
    raise InputError("tasks: give at least one task a weight above 0")
  return weights / weights.sum()
