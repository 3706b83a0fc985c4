"""The key-value task (§4.1) as words and as text, and a tokenizer for it.

Tasks, for the expression ab+cd with ab = 10 and cd = 22:

  kv_subs          D_KV-SUBS   subs:ab+cd=   10+22
  num_math         D_NUM-MATH  math:10+22=   32
  kv_math          D_KV-MATH   math:ab+cd=   32
  num_math_steps   D_NUM-MATH  show:10+22=   10+22=32
  kv_math_steps    D_KV-MATH   show:ab+cd=   10+22=32
  num_math_given   D_NUM-MATH  show:ef+gh=10+22=   32

Under `show:` the answer carries out one operation at a time and writes the
expression out after each, products first, then sums, each from the left:

  kv_math_steps    D_KV-MATH   show:ab-cd*ef+gh=   10-22*3+5=10-66+5=-56+5=-51

In num_math_given, ef and gh are any keys, drawn independently of the numbers:
it tells nothing of their values, and asks for arithmetic on what was written
last, whatever came before; a language model of some size can do that.

The prompts are ours: the paper maps the same expression to two answers without
saying how the models tell the tasks apart.

Dimension letters: N examples, W words of each.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from calm_jax.core.errors import InputError, check_choice
from calm_jax.data import key_values
from calm_jax.data.examples import TextExample
from calm_jax.data.key_values import OPERATORS, KeyDictionary
from calm_jax.text.tokenizer import Tokenizer, train_sentencepiece


class KeyValueFormat(NamedTuple):
  """The prompt and the answer of a task.

  Attributes:
    prompt: before the expression.
    asked: the expression is in "keys", in "values", or in unrelated "names".
    given: the expression in values follows in the prompt.
    steps: the answer holds the expression in values.
    reductions: it holds (then) the expression after each operation but the
      last.
    result: it holds (then) the result.
  """

  prompt: str
  asked: str
  given: bool
  steps: bool
  reductions: bool
  result: bool


TASKS = {
  "kv_subs": KeyValueFormat("subs:", "keys", False, True, False, False),
  "num_math": KeyValueFormat("math:", "values", False, False, False, True),
  "kv_math": KeyValueFormat("math:", "keys", False, False, False, True),
  "num_math_steps": KeyValueFormat("show:", "values", False, True, True, True),
  "kv_math_steps": KeyValueFormat("show:", "keys", False, True, True, True),
  "num_math_given": KeyValueFormat("show:", "names", True, False, True, True),
}
PROMPTS = tuple(dict.fromkeys(task.prompt for task in TASKS.values()))
# Columns of TASKS, to be indexed by arrays of tasks.
TASK_PROMPTS = np.array([PROMPTS.index(task.prompt) for task in TASKS.values()])
TASK_ASKED, _GIVEN, _STEPS, _REDUCTIONS, _RESULT = (
  np.array([getattr(task, field) for task in TASKS.values()])
  for field in ("asked", "given", "steps", "reductions", "result")
)
NO_WORD, BOS, EOS = range(3)
_BASE_11 = ("", *"0123456789")


class WordTable:
  """The words of the task, and examples as rows of their numbers.

  Attributes:
    words: "" for `NO_WORD`, `BOS` and `EOS`, which are the first three; then
      prompts, operators, "=", keys, values and the digits of other numbers.
  """

  def __init__(self, kv: KeyDictionary, group: int = 1):
    """Numbers are cut from the left, into words of `group` digits."""
    self._kv, self._group = kv, group
    parts = [[""] * 3, PROMPTS, OPERATORS, "=", kv.keys, map(str, kv.values)]
    # A group is a number of base 11, whose 0 stands behind the last digit.
    parts.append(map("".join, itertools.product(_BASE_11, repeat=group)))
    parts = list(map(list, parts))
    self.words = list(itertools.chain(*parts))
    starts = itertools.accumulate(map(len, parts[1:-1]), initial=3)
    # The first word of each part.
    self._prompts, self._operators, self._equals, *starts = starts
    self._keys, self._values, self._digits = starts

  def examples(
    self,
    rng: np.random.Generator,
    expressions_NW: np.ndarray,
    tasks_N: np.ndarray,
    prompts_N: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Words [N, W] of the prompts with BOS, and of the completions with EOS.

    Tasks and prompts are indices into `TASKS` and `PROMPTS`; `rng` draws the
    unrelated names.
    """

    def where(chosen_N, words):
      return np.where(chosen_N[:, None], words, NO_WORD)

    given_N, steps_N = _GIVEN[tasks_N], _STEPS[tasks_N]
    asked_N1, all_N = TASK_ASKED[tasks_N][:, None], np.full(len(tasks_N), True)
    keys_NT = expressions_NW[:, ::2]
    names_NT = rng.integers(len(self._kv.keys), size=keys_NT.shape)
    keys_NW = self._terms(expressions_NW, self._keys)
    values_NW = self._terms(expressions_NW, self._values)
    names_NW = keys_NW.copy()
    names_NW[:, ::2] = np.where(keys_NT < 0, NO_WORD, self._keys + names_NT)
    prompt = (
      where(all_N, BOS),
      self._prompts + prompts_N[:, None],
      np.select(
        [asked_N1 == "keys", asked_N1 == "names"],
        [keys_NW, names_NW],
        values_NW,
      ),
      where(all_N, self._equals),
      where(given_N, values_NW),
      where(given_N, self._equals),
    )
    completion = (
      where(steps_N, values_NW),
      self._result_words(expressions_NW, tasks_N),
      where(all_N, EOS),
    )
    return np.concatenate(prompt, axis=1), np.concatenate(completion, axis=1)

  def _terms(self, expressions_NW: np.ndarray, first: int) -> np.ndarray:
    """Words of expressions, whose terms are words from `first` on."""
    firsts_W = np.full(expressions_NW.shape[1], self._operators)
    firsts_W[::2] = first
    return np.where(expressions_NW < 0, NO_WORD, firsts_W + expressions_NW)

  def _result_words(self, expressions_NW, tasks_N) -> np.ndarray:
    """Words of what a task asks for after the expression in values."""
    rows = np.flatnonzero(_RESULT[tasks_N])
    if not len(rows):
      return np.full((len(tasks_N), 0), NO_WORD)
    expressions_NW, tasks = expressions_NW[rows], tasks_N[rows]
    last_N = np.maximum(key_values.num_terms(expressions_NW) - 1, 1)
    has_before_N, parts = _STEPS[tasks], []
    states = key_values.reductions(self._kv, expressions_NW)
    for count, (numbers_NT, codes) in enumerate(states, start=1):
      wanted_N = (count == last_N) | (_REDUCTIONS[tasks] & (count < last_N))
      equals_N = np.where(wanted_N & has_before_N, self._equals, NO_WORD)
      parts.append(equals_N[:, None])
      parts.append(self._number_words(numbers_NT, codes, wanted_N))
      has_before_N = _REDUCTIONS[tasks]
    words_NW = np.concatenate(parts, axis=1)
    all_NW = np.full((len(tasks_N), words_NW.shape[1]), NO_WORD)
    all_NW[rows] = words_NW
    return all_NW

  def _number_words(self, numbers_NT, codes, wanted_N) -> np.ndarray:
    """Operator, sign and digits of each number; none where not wanted."""
    codes_NT = np.insert(codes, 0, -1, axis=1)
    # The first number has no operator before it.
    is_there_NT = (codes_NT >= 0) | (np.arange(codes_NT.shape[1]) == 0)
    is_there_NT &= wanted_N[:, None]
    numbers = numbers_NT[is_there_NT]
    width = len(str(abs(numbers).max(initial=0)))
    count = -(-width // self._group)
    texts = abs(numbers).astype(f"U{count * self._group}")
    characters = texts.view(np.uint32).astype(np.int64)
    digits = np.maximum(characters - ord("0") + 1, 0)
    digits = digits.reshape(len(texts), count, self._group)
    groups = digits @ 11 ** np.arange(self._group)[::-1]
    minus = self._operators + OPERATORS.index("-")
    words = np.full((*is_there_NT.shape, 2 + count), NO_WORD)
    words[..., 0] = np.where(
      is_there_NT & (codes_NT >= 0), self._operators + codes_NT, NO_WORD
    )
    words[is_there_NT, 1] = np.where(numbers < 0, minus, NO_WORD)
    words[is_there_NT, 2:] = self._digits + groups
    return words.reshape(len(words), np.prod(words.shape[1:]))


def make_examples(
  kv: KeyDictionary, expressions_NW: np.ndarray, task: str
) -> list[TextExample]:
  """The expressions, drawn from a dictionary, as text of one of `TASKS`."""
  check_choice("task", task, list(TASKS))
  table, count = WordTable(kv), len(expressions_NW)
  tasks_N = np.full(count, list(TASKS).index(task))
  rng = np.random.default_rng(count)
  parts = table.examples(rng, expressions_NW, tasks_N, TASK_PROMPTS[tasks_N])
  prompts, completions = (
    ["".join(table.words[word] for word in row) for row in words_NW.tolist()]
    for words_NW in parts
  )
  return [
    TextExample(prompt, completion, f"the expression {prompt}{completion}")
    for prompt, completion in zip(prompts, completions, strict=True)
  ]


def train_tokenizer(
  kv: KeyDictionary,
  path_prefix: str | Path,
  *,
  keys: str = "pieces",
  digits: str = "single",
  seed: int = 0,
) -> Tokenizer:
  """Trains the task's SentencePiece model and writes `path_prefix`.model.

  Its pieces are the task prompts, the keys, the digits and the operators, so a
  text has one segmentation and the pieces of its parts are the parts of its
  pieces, which lets `KeyValueSource` build batches from tables.

  Args:
    kv, path_prefix: the dictionary, and where to write, without ".model".
    keys: "pieces": a key is one token (the paper takes keys from the
      vocabulary); "characters": a key is spelled, one token a letter.
    digits: "single", or "grouped": from the left, up to three at a time.
    seed: of the expressions that it is trained on.

  Raises:
    InputError: an unknown choice, or a key does not come out as asked.
  """
  check_choice("keys", keys, ("pieces", "characters"))
  check_choice("digits", digits, ("single", "grouped"))
  symbols, alphabet = sorted(PROMPTS), set(OPERATORS) | {"="}
  if keys == "pieces":
    symbols += kv.keys
  else:
    alphabet |= set("".join(kv.keys))
  if digits == "grouped":
    symbols += [f"{v:0{n}d}" for n in (1, 2, 3) for v in range(10**n)]
  else:
    alphabet |= set("0123456789")
  tokenizer = train_sentencepiece(
    _training_texts(kv, seed),
    path_prefix,
    # Room for exactly these, so that no further piece is merged from them.
    vocab_size=4 + len(symbols) + len(alphabet),
    user_defined_symbols=symbols,
    split_digits=True,
  )
  for key in kv.keys:
    ids = tokenizer.encode(key)
    expected = 1 if keys == "pieces" else len(key)
    if len(ids) != expected or tokenizer.decode(ids) != key:
      raise InputError(
        f"the tokenizer {tokenizer.source} splits the key {key!r} into"
        f" {[tokenizer.pieces[i] for i in ids]}, {expected} pieces expected"
      )
  return tokenizer


def _training_texts(kv: KeyDictionary, seed: int) -> list[str]:
  rng = np.random.default_rng(seed)
  options = key_values.ExpressionOptions(min_terms=1, max_terms=6)
  drawn_NW = key_values.sample_expressions(rng, kv, 1000, options)
  texts = [f"subs:{key}={v}" for key, v in zip(kv.keys, kv.values, strict=True)]
  for name, task in TASKS.items():
    for example in make_examples(kv, drawn_NW, name):
      # The numbers between hold the same characters. Their frequencies decide
      # the order of ids: runs of earlier versions go on with the same.
      parts = example.completion.split("=")
      parts = parts[: task.steps] + parts[-1:][: task.result]
      texts.append(example.prompt + "=".join(parts))
  # A small dictionary may lack a digit or an operator.
  return [*texts, f"math:0123456789{OPERATORS}="]
