"""Batches of the key-value task (§4.1), generated on demand.

An example is a row of words: BOS, the prompt of its task, keys, operators,
digits, EOS. A word is an entry of a table of token ids, and may be empty.

Dimension letters: N examples, T terms of the longest, W words of an example.
"""

import dataclasses
import functools
import hashlib
import json
import operator
from typing import Any

import numpy as np

from calm_jax.core.batch import Batch
from calm_jax.core.errors import InputError, check_choice
from calm_jax.data import packing
from calm_jax.data.key_value_text import PROMPTS, TASKS
from calm_jax.data.key_values import (
  OPERATORS,
  Expressions,
  KeyDictionary,
  evaluate,
  sample_expressions,
  unrelated,
)
from calm_jax.text.tokenizer import Tokenizer

_CHECKED = 256
# Columns of TASKS, to be indexed by arrays of tasks.
_PROMPT, _ASKED, _GIVEN, _STEPS, _RESULT = (
  np.array(column) for column in zip(*TASKS.values(), strict=True)
)
_PROMPT = np.array([PROMPTS.index(prompt) for prompt in _PROMPT])


@dataclasses.dataclass(eq=False)
class KeyValueSource:
  """Random access to endless global batches of expressions.

  `source[i]` is a batch that follows from the fields and `i` alone: the rows
  that this process takes of it.

  Attributes:
    kv: the dictionary.
    tokenizer: one of `train_tokenizer`, or any that splits the same way.
    tasks: weight of each task of the mixture.
    seed: of the expressions and of the mixture.
    batch_size: B, rows of the global batch.
    length: L, slots of a row.
    min_terms, max_terms, operators, keys, part: see `sample_expressions`;
      keys restricts the tasks that ask for keys, NUM-MATH is of all values;
      part "eval" is distinct within a batch, not between batches.
    any_prompt: each example is under any of the prompts, for a model that
      knows one task only, and does it whatever it is asked.
    pack: fill rows with consecutive examples; else one example a row.
    process_index, process_count: which share of the rows to take.
    num_batches: the length of the source; any index below it can be read.

  Raises:
    InputError: a bad choice, an example longer than `length`, or a tokenizer
      that the tables cannot stand for.
  """

  kv: KeyDictionary
  tokenizer: Tokenizer
  tasks: dict[str, float]
  _: dataclasses.KW_ONLY
  seed: int
  batch_size: int
  length: int
  min_terms: int
  max_terms: int
  operators: str | tuple[str, ...] = OPERATORS
  keys: str = "all"
  part: str = "train"
  any_prompt: bool = False
  pack: bool = True
  process_index: int = 0
  process_count: int = 1
  num_batches: int = 1 << 40

  def __post_init__(self):
    self._rows = packing.host_rows(
      self.batch_size, self.process_index, self.process_count
    )
    self._weights = _task_weights(self.tasks)
    self._choice: dict[str, Any] = {
      "min_terms": self.min_terms,
      "max_terms": self.max_terms,
      "operators": "".join(self.operators),
      "keys": self.keys,
      "part": self.part,
    }
    self._table = WordTable(self.kv, self.tokenizer)
    self._mean_length = self._check_tokens()

  def __len__(self) -> int:
    return self.num_batches

  def __getitem__(self, index: int) -> Batch:
    """The batch at `index`: this process's rows [B / processes, L]."""
    index = operator.index(index)
    if not 0 <= index < self.num_batches:
      raise IndexError(f"batch {index} of {self.num_batches}")
    rng = np.random.default_rng(np.random.SeedSequence((self.seed, index)))
    tokens, lengths_N, prompts_N = self._fill(rng)
    rows_N = packing.pack_rows([(lengths_N, self.length)], pack=self.pack)
    first, last = np.searchsorted(rows_N, (self._rows.start, self._rows.stop))
    ends_N = np.cumsum(lengths_N)
    own_tokens = tokens[ends_N[first] - lengths_N[first] : ends_N[last - 1]]
    return packing.make_batch(
      packing.TokenLists(own_tokens, lengths_N[first:last]),
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
      self._choice,
      [self.seed, self.batch_size, self.length, self.pack],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def _fill(self, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples enough for all rows, as `_generate` returns them."""
    if not self.pack:
      return self._generate(rng, self.batch_size, self._choice)
    slots = self.batch_size * self.length
    # Rows end with a gap of about half an example.
    room = slots - self.batch_size * min(self._mean_length, self.length) / 2
    count = int(1.02 * room / self._mean_length) + 8
    drawn = self._generate(rng, count, self._choice)
    while True:
      rows_N = packing.pack_rows([(drawn[1], self.length)], pack=True)
      missing = self.batch_size - rows_N[-1]
      # A row is full only when an example has gone to the row after it.
      if missing <= 0:
        return drawn
      count = int(missing * self.length / self._mean_length) + 8
      more = self._generate(rng, count, self._choice)
      drawn = tuple(map(np.concatenate, zip(drawn, more, strict=True)))

  def _generate(
    self, rng: np.random.Generator, n: int, choice: dict[str, Any]
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of n examples, their lengths and those of BOS and prompt."""
    expressions = sample_expressions(rng, self.kv, n, **choice)
    tasks_N = rng.choice(len(TASKS), size=n, p=self._weights)
    numeric = np.flatnonzero(_ASKED[tasks_N] != "keys")
    if choice["keys"] != "all" and len(numeric):
      any_keys = choice | {"keys": "all"}
      numbers = sample_expressions(rng, self.kv, len(numeric), **any_keys)
      expressions.replace(numeric, numbers)
    prompts_N = _PROMPT[tasks_N]
    if self.any_prompt:
      prompts_N = rng.integers(len(PROMPTS), size=n)
    names = unrelated(rng, self.kv, expressions)
    words_NW, columns = self._table.examples(
      expressions, tasks_N, prompts_N, names
    )
    tokens, lengths_NW = self._table.flatten(words_NW)
    lengths_N = lengths_NW.sum(axis=1)
    longest = int(lengths_N.argmax())
    if lengths_N[longest] > self.length:
      end = int(lengths_N[: longest + 1].sum())
      text = self.tokenizer.decode(tokens[end - lengths_N[longest] : end])
      raise InputError(
        f"the example {text!r} takes {lengths_N[longest]} tokens and a row has"
        f" {self.length}: raise length, or lower max_terms"
      )
    return tokens, lengths_N, lengths_NW[:, :columns].sum(axis=1)

  def _check_tokens(self) -> float:
    """Compares tables and tokenizer; returns the mean length in tokens."""
    tokens, lengths_N, prompts_N = self._generate(
      np.random.default_rng(self.seed), _CHECKED, self._choice | {"part": "any"}
    )
    special = {self.tokenizer.bos_id, self.tokenizer.eos_id}
    ends_N = np.cumsum(lengths_N)
    for end, length, prompt in zip(ends_N, lengths_N, prompts_N, strict=True):
      ids = tokens[end - length : end].tolist()
      parts = [
        [i for i in part if i not in special]
        for part in (ids[:prompt], ids[prompt:])
      ]
      texts = [self.tokenizer.decode(part) for part in parts]
      encoded = self.tokenizer.encode("".join(texts))
      if encoded != parts[0] + parts[1] or not all(texts):
        raise InputError(
          f"the tokenizer {self.tokenizer.source} does not split"
          f" {''.join(texts)!r} where its keys, digits and operators meet;"
          " use one made by train_tokenizer"
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


class WordTable:
  """Token ids of every word of the task, for one tokenizer.

  It is right for a tokenizer whose segmentation of a text is that of its
  parts, such as those of `train_tokenizer`; `KeyValueSource` checks.
  """

  def __init__(self, kv: KeyDictionary, tokenizer: Tokenizer):
    self._kv = kv
    # How the tokenizer cuts numbers: digit by digit, or three at a time.
    self._group = 3 if len(tokenizer.encode("123")) == 1 else 1
    words: list[list[int]] = [[]]
    self._empty = 0

    def add(ids_of_each) -> int:
      first = len(words)
      words.extend(ids_of_each)
      return first

    encode = tokenizer.encode
    special = (tokenizer.bos_id, tokenizer.eos_id)
    self._bos = add([] if i is None else [i] for i in special)
    self._prompts = add(map(encode, PROMPTS))
    self._operators = add(map(encode, OPERATORS))
    self._equals = add([encode("=")])
    self._keys = add(map(encode, kv.keys))
    self._values = add(encode(str(v)) for v in kv.values)
    # First word of the chunks of 0, 1, .. digits; a chunk of 0 is empty.
    self._chunks = np.zeros(self._group + 1, np.int64)
    for n in range(1, self._group + 1):
      self._chunks[n] = add(encode(f"{v:0{n}d}") for v in range(10**n))
    self._lengths = np.array([len(ids) for ids in words])
    self._starts = np.cumsum(self._lengths) - self._lengths
    self._tokens = np.array([i for ids in words for i in ids], np.int32)

  def flatten(self, words_NW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all rows one after the other, and their number by word."""
    lengths_NW = self._lengths[words_NW]
    lengths = lengths_NW.ravel()
    starts = np.repeat(self._starts[words_NW].ravel(), lengths)
    return self._tokens[starts + packing.ragged_range(lengths)], lengths_NW

  def examples(
    self,
    expressions: Expressions,
    tasks_N: np.ndarray,
    prompts_N: np.ndarray,
    names: Expressions,
  ) -> tuple[np.ndarray, int]:
    """The words of N examples [N, W], and how many columns are the prompt.

    Args:
      expressions: N expressions.
      tasks_N: index of each example's task in `TASKS`.
      prompts_N: index of each example's prompt in `PROMPTS`.
      names: the same expressions over other keys, of `unrelated`.
    """
    count = len(tasks_N)

    def where(chosen_N, words, others=self._empty):
      return np.where(chosen_N[:, None], words, others)

    values_NW = self._terms(expressions, self._values)
    named_NW = where(
      _ASKED[tasks_N] == "names", self._terms(names, self._keys), values_NW
    )
    asked_NW = where(
      _ASKED[tasks_N] == "keys", self._terms(expressions, self._keys), named_NW
    )
    given_N, steps_N, result_N = (
      column[tasks_N] for column in (_GIVEN, _STEPS, _RESULT)
    )
    prompt = [
      np.full((count, 1), self._bos),
      (self._prompts + prompts_N)[:, None],
      asked_NW,
      np.full((count, 1), self._equals),
      where(given_N, values_NW),
      where(given_N, self._equals),
    ]
    completion = [
      where(steps_N, values_NW),
      where(steps_N & result_N, self._equals),
      self._results(expressions, result_N),
      np.full((count, 1), self._bos + 1),  # EOS
    ]
    columns = sum(part.shape[1] for part in prompt)
    return np.concatenate(prompt + completion, axis=1), columns

  def _terms(self, expressions: Expressions, first: int) -> np.ndarray:
    """Words of expressions, whose terms are words from `first` on."""
    count, terms = expressions.key_ids.shape
    words = np.full((count, 2 * terms - 1), self._empty)
    for start, columns, ids in (
      (first, slice(0, None, 2), expressions.key_ids),
      (self._operators, slice(1, None, 2), expressions.operators),
    ):
      words[:, columns] = np.where(ids < 0, self._empty, start + ids)
    return words

  def _results(self, expressions: Expressions, wanted_N) -> np.ndarray:
    """Sign and digits of the results, empty words where not wanted."""
    results = evaluate(self._kv, expressions[wanted_N])
    digits = self._numbers(abs(results))
    words = np.full((len(wanted_N), 1 + digits.shape[1]), self._empty)
    minus = self._operators + OPERATORS.index("-")
    is_negative = (results < 0).astype(bool)
    words[wanted_N, 0] = np.where(is_negative, minus, self._empty)
    words[wanted_N, 1:] = digits
    return words

  def _numbers(self, magnitudes_N: np.ndarray) -> np.ndarray:
    """Words of the numbers [N, C], chunks of `group` digits from the left."""
    count, group = len(magnitudes_N), self._group
    width = len(str(magnitudes_N.max(initial=0)))
    width += -width % group
    # The characters of a number, from the left, and then zeros.
    codes_ND = magnitudes_N.astype(f"U{width}").view(np.uint32)
    codes = codes_ND.reshape(count, width // group, group).astype(np.int64)
    value = np.zeros(codes.shape[:2], np.int64)
    for j in range(group):
      digit = codes[..., j] - ord("0")
      value = np.where(digit < 0, value, 10 * value + digit)
    return self._chunks[(codes > 0).sum(axis=2)] + value
