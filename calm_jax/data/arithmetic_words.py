"""Tokens of the key-value task from lookup tables.

An example is a row of words: BOS, the prompt of its task, keys, operators,
digits, EOS. A word is an entry of a table of token ids, and may be empty.

Dimension letters: N examples, T terms of the longest, W words of an example.
"""

from typing import NamedTuple

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.data.key_values import OPERATORS, Expressions, KeyValues, evaluate
from calm_jax.data.packing import ragged_range
from calm_jax.text.tokenizer import Tokenizer


class Task(NamedTuple):
  """What is asked, and what the answer holds."""

  prompt: str
  asked: str  # the expression in "keys", in "values", or in unrelated "names"
  given: bool  # the expression in values follows in the prompt
  steps: bool  # the answer holds the expression in values
  result: bool  # the answer holds (then) the result


TASKS = {
  "kv_subs": Task("subs:", "keys", False, True, False),
  "num_math": Task("math:", "values", False, False, True),
  "kv_math": Task("math:", "keys", False, False, True),
  "num_math_steps": Task("show:", "values", False, True, True),
  "kv_math_steps": Task("show:", "keys", False, True, True),
  "num_math_given": Task("show:", "names", True, False, True),
}
PROMPTS = tuple(dict.fromkeys(task.prompt for task in TASKS.values()))
_LIMB = 18


class WordTable:
  """Token ids of every word of the task, for one tokenizer.

  It is right for a tokenizer whose segmentation of a text is that of its
  parts, such as those of `train_tokenizer`; `ArithmeticSource` checks.
  """

  def __init__(self, kv: KeyValues, tokenizer: Tokenizer):
    # How the tokenizer cuts numbers: digit by digit, or three at a time.
    self.group = 3 if len(tokenizer.encode("123")) == 1 else 1
    words: list[list[int]] = [[]]

    def add(ids_of_each) -> int:
      first = len(words)
      words.extend(ids_of_each)
      return first

    encode = tokenizer.encode
    special = (tokenizer.bos_id, tokenizer.eos_id)
    self.empty = 0
    self.bos = add([] if i is None else [i] for i in special)
    self.eos = self.bos + 1
    self.prompts = add(map(encode, PROMPTS))
    self.operators = add(map(encode, OPERATORS))
    self.minus = self.operators + OPERATORS.index("-")
    self.equals = add([encode("=")])
    self.keys = add(map(encode, kv.keys))
    self.values = add(encode(str(v)) for v in kv.values)
    # First word of the chunks of 0, 1, .. digits; a chunk of 0 is empty.
    self.chunks = np.zeros(self.group + 1, np.int64)
    for n in range(1, self.group + 1):
      self.chunks[n] = add(encode(f"{v:0{n}d}") for v in range(10**n))
    self.lengths = np.array([len(ids) for ids in words])
    self.starts = np.cumsum(self.lengths) - self.lengths
    self.tokens = np.array([i for ids in words for i in ids], np.int32)

  def flatten(self, words_NW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all rows one after the other, and their number by word."""
    lengths_NW = self.lengths[words_NW]
    lengths = lengths_NW.ravel()
    starts = np.repeat(self.starts[words_NW].ravel(), lengths)
    return self.tokens[starts + ragged_range(lengths)], lengths_NW


def check_task(task: str) -> None:
  """Raises InputError for an unknown task."""
  if task not in TASKS:
    raise InputError(f"task {task!r}: expected one of {', '.join(TASKS)}")


def example_words(
  table: WordTable,
  kv: KeyValues,
  expressions: Expressions,
  tasks_N: np.ndarray,
  prompts_N: np.ndarray,
  names: Expressions,
) -> tuple[np.ndarray, int]:
  """The words of N examples [N, W], and how many columns are the prompt.

  Args:
    table: the words.
    kv: the dictionary.
    expressions: N expressions.
    tasks_N: index of each example's task in `TASKS`.
    prompts_N: index of each example's prompt in `PROMPTS`.
    names: the same expressions over other keys, of `unrelated`.
  """
  _, asked_N, given_N, steps_N, result_N = (
    np.array(column)[tasks_N] for column in zip(*TASKS.values(), strict=True)
  )
  values_NT = _term_words(table, expressions, table.values)
  asked = np.where(
    (asked_N == "keys")[:, None],
    _term_words(table, expressions, table.keys),
    np.where(
      (asked_N == "names")[:, None],
      _term_words(table, names, table.keys),
      values_NT,
    ),
  )
  count = len(tasks_N)

  def where(chosen_N, words):
    return np.where(chosen_N[:, None], words, table.empty)

  prompt = [
    np.full((count, 1), table.bos),
    (table.prompts + prompts_N)[:, None],
    asked,
    np.full((count, 1), table.equals),
    where(given_N, values_NT),
    where(given_N, table.equals),
  ]
  completion = [
    where(steps_N, values_NT),
    where(steps_N & result_N, table.equals),
    _result_words(table, kv, expressions, result_N),
    np.full((count, 1), table.eos),
  ]
  columns = sum(part.shape[1] for part in prompt)
  return np.concatenate(prompt + completion, axis=1), columns


def _term_words(table, expressions: Expressions, first: int) -> np.ndarray:
  count, terms = expressions.key_ids.shape
  words = np.full((count, 2 * terms - 1), table.empty)
  for start, columns, ids in (
    (first, slice(0, None, 2), expressions.key_ids),
    (table.operators, slice(1, None, 2), expressions.operators),
  ):
    words[:, columns] = np.where(ids < 0, table.empty, start + ids)
  return words


def _result_words(table, kv, expressions, wanted_N) -> np.ndarray:
  """Sign and digits of the results, empty words where not wanted."""
  results = evaluate(kv, expressions[wanted_N])
  negative = (results < 0).astype(bool)
  chunks = _chunk_words(table, _digits(abs(results)))
  words = np.full((len(wanted_N), 1 + chunks.shape[1]), table.empty)
  sign = np.where(negative, table.minus, table.empty)
  words[wanted_N] = np.concatenate([sign[:, None], chunks], axis=1)
  return words


def _digits(magnitudes: np.ndarray) -> np.ndarray:
  """Decimal digits [N, D], zeros in front; D fits the largest."""
  if not len(magnitudes):
    return np.zeros((0, 1), np.int64)
  largest = int(magnitudes.max())
  if largest < 10**_LIMB:
    return _low_digits(magnitudes, len(str(largest)))
  limb = 10**_LIMB
  high = _digits(magnitudes // limb)
  return np.concatenate([high, _low_digits(magnitudes % limb, _LIMB)], axis=1)


def _low_digits(magnitudes: np.ndarray, width: int) -> np.ndarray:
  powers = 10 ** np.arange(width - 1, -1, -1, dtype=np.int64)
  return magnitudes.astype(np.int64)[:, None] // powers % 10


def _chunk_words(table: WordTable, digits_ND: np.ndarray) -> np.ndarray:
  """Words of the numbers [N, C], chunks of `group` digits from the left."""
  count, width = digits_ND.shape
  nonzero = digits_ND != 0
  # A zero keeps its last digit.
  lead = np.where(nonzero.any(axis=1), nonzero.argmax(axis=1), width - 1)
  padded = -(-width // table.group) * table.group
  places = lead[:, None] + np.arange(padded)
  present = places < width
  shifted = np.take_along_axis(digits_ND, np.minimum(places, width - 1), axis=1)
  shape = (count, padded // table.group, table.group)
  shifted, present = shifted.reshape(shape), present.reshape(shape)
  value = np.zeros(shape[:2], np.int64)
  for j in range(table.group):
    value = np.where(present[..., j], 10 * value + shifted[..., j], value)
  return table.chunks[present.sum(axis=2)] + value
