"""Batches of the key-value task (§4.1), generated on demand."""

import dataclasses
import functools
import hashlib
import json
import operator

import numpy as np

from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError
from calm_jax.data.arithmetic_words import (
  PROMPTS,
  TASKS,
  WordTable,
  check_task,
  example_words,
)
from calm_jax.data.key_values import (
  OPERATORS,
  KeyValues,
  sample_expressions,
  unrelated,
)
from calm_jax.data.packing import TokenLists, host_rows, make_batch, pack_rows
from calm_jax.text.tokenizer import Tokenizer

_CHECKED = 256
_OF_KEYS = np.array([t.asked == "keys" for t in TASKS.values()])
_OWN_PROMPTS = np.array([PROMPTS.index(t.prompt) for t in TASKS.values()])


class ArithmeticSource:
  """Random access to endless global batches of expressions.

  `source[i]` is a batch that follows from the
  arguments and `i` alone: the rows that this process takes of it.

  Args:
    kv: the dictionary.
    tokenizer: one of `train_tokenizer`, or any that splits the same way.
    tasks: weight of each task of the mixture.
    seed: of the expressions and of the mixture.
    batch_size: B, rows of the global batch.
    length: L, slots of a row.
    pack: fill rows with consecutive examples; else one example a row.
    any_prompt: each example is under any of the prompts, for a model that
      knows one task only, and does it whatever it is asked.
    min_terms, max_terms, operators, keys, part: see `sample_expressions`;
      keys restricts the tasks that ask for keys, NUM-MATH is of all values;
      part "eval" is distinct within a batch, not between batches.
    process_index, process_count: which share of the rows to take.
    num_batches: what `len` says; any index below it can be read.

  Raises:
    InputError: a bad choice, an example longer than `length`, or a tokenizer
      that the tables cannot stand for.
  """

  def __init__(
    self,
    kv: KeyValues,
    tokenizer: Tokenizer,
    tasks: dict[str, float],
    *,
    seed: int,
    batch_size: int,
    length: int,
    min_terms: int,
    max_terms: int,
    operators: str | tuple[str, ...] = OPERATORS,
    keys: str = "all",
    part: str = "train",
    any_prompt: bool = False,
    pack: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    num_batches: int = 1 << 40,
  ):
    self.seed, self.batch_size, self.length = seed, batch_size, length
    self._kv, self._tokenizer = kv, tokenizer
    self._any_prompt = any_prompt
    self._pack, self._num_batches = pack, num_batches
    self._rows = host_rows(batch_size, process_index, process_count)
    self._tasks = dict(tasks)
    self._weights = _mixture(self._tasks)
    self._choice = {
      "min_terms": min_terms,
      "max_terms": max_terms,
      "operators": "".join(operators),
      "keys": keys,
      "part": part,
    }
    self._table = WordTable(kv, tokenizer)
    self._mean_length = self._check_tokens()

  def __len__(self) -> int:
    return self._num_batches

  def __getitem__(self, index: int) -> Batch:
    """The batch at `index`: this process's rows [B / processes, L]."""
    index = operator.index(index)
    if not 0 <= index < self._num_batches:
      raise IndexError(f"batch {index} of {self._num_batches}")
    rng = np.random.default_rng(np.random.SeedSequence((self.seed, index)))
    tokens, lengths_N, prompts_N = self._fill(rng)
    rows_N = pack_rows([(lengths_N, self.length)], pack=self._pack)
    first, last = np.searchsorted(rows_N, (self._rows.start, self._rows.stop))
    ends_N = np.cumsum(lengths_N)
    start = ends_N[first] - lengths_N[first]
    return make_batch(
      TokenLists(tokens[start : ends_N[last - 1]], lengths_N[first:last]),
      prompts_N[first:last],
      rows_N[first:last] - self._rows.start,
      batch_size=self._rows.stop - self._rows.start,
      length=self.length,
    )

  def describe(self, index: int) -> str:
    """Names the batch at `index`, for messages."""
    return f"batch {index} of {'+'.join(self._tasks)}, seed {self.seed}"

  @functools.cached_property
  def fingerprint(self) -> str:
    """Names the sequence of global batches, whatever the number of hosts."""
    parts = [
      self._kv.fingerprint,
      self._tokenizer.fingerprint,
      self._tokenizer.bos_id,
      self._tokenizer.eos_id,
      self._tasks,
      self._any_prompt,
      self._choice,
      [self.seed, self.batch_size, self.length, self._pack],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def _fill(self, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples enough for all rows: tokens, their number, BOS and prompt's."""
    if not self._pack:
      return self._generate(rng, self.batch_size)
    slots = self.batch_size * self.length
    # Rows end with a gap of about half an example.
    room = slots - self.batch_size * min(self._mean_length, self.length) / 2
    drawn = self._generate(rng, int(1.02 * room / self._mean_length) + 8)
    while True:
      rows_N = pack_rows([(drawn[1], self.length)], pack=True)
      missing = self.batch_size - rows_N[-1]
      # A row is full only when an example has gone to the row after it.
      if missing <= 0:
        return drawn
      count = int(missing * self.length / self._mean_length) + 8
      more = self._generate(rng, count)
      drawn = tuple(
        np.concatenate(pair) for pair in zip(drawn, more, strict=True)
      )

  def _generate(
    self, rng, n, **choice
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    choice = self._choice | choice
    expressions = sample_expressions(rng, self._kv, n, **choice)
    tasks_N = rng.choice(len(TASKS), size=n, p=self._weights)
    numeric = np.flatnonzero(~_OF_KEYS[tasks_N])
    if choice["keys"] != "all" and len(numeric):
      numbers = sample_expressions(
        rng, self._kv, len(numeric), **choice | {"keys": "all"}
      )
      for field in dataclasses.fields(expressions):
        getattr(expressions, field.name)[numeric] = getattr(numbers, field.name)
    prompts_N = _OWN_PROMPTS[tasks_N]
    if self._any_prompt:
      prompts_N = rng.integers(len(PROMPTS), size=n)
    words_NW, columns = example_words(
      self._table,
      self._kv,
      expressions,
      tasks_N,
      prompts_N,
      unrelated(rng, self._kv, expressions),
    )
    tokens, lengths_NW = self._table.flatten(words_NW)
    lengths_N = lengths_NW.sum(axis=1)
    longest = int(lengths_N.argmax())
    if lengths_N[longest] > self.length:
      end = int(lengths_N[: longest + 1].sum())
      text = self._tokenizer.decode(tokens[end - lengths_N[longest] : end])
      raise InputError(
        f"the example {text!r} takes {lengths_N[longest]} tokens and a row has"
        f" {self.length}: raise length, or lower max_terms"
      )
    return tokens, lengths_N, lengths_NW[:, :columns].sum(axis=1)

  def _check_tokens(self) -> float:
    """Compares tables and tokenizer; returns the mean length in tokens."""
    tokens, lengths_N, prompts_N = self._generate(
      np.random.default_rng(self.seed), _CHECKED, part="any"
    )
    special = {self._tokenizer.bos_id, self._tokenizer.eos_id}
    start = 0
    for length, prompt in zip(lengths_N, prompts_N, strict=True):
      ids = tokens[start : start + length].tolist()
      start += length
      parts = [
        [i for i in part if i not in special]
        for part in (ids[:prompt], ids[prompt:])
      ]
      texts = [self._tokenizer.decode(part) for part in parts]
      encoded = self._tokenizer.encode("".join(texts))
      if encoded != parts[0] + parts[1] or not all(texts):
        raise InputError(
          f"the tokenizer {self._tokenizer.source} does not split"
          f" {''.join(texts)!r} where its keys, digits and operators meet;"
          " use one made by train_tokenizer"
        )
    return float(lengths_N.mean())


def _mixture(tasks: dict[str, float]) -> np.ndarray:
  for task, weight in tasks.items():
    check_task(task)
    if weight < 0:
      raise InputError(f"task {task!r} has the negative weight {weight}")
  weights = np.array([tasks.get(task, 0.0) for task in TASKS], float)
  if not weights.sum() > 0:
    raise InputError("tasks: give at least one task a weight above 0")
  return weights / weights.sum()
