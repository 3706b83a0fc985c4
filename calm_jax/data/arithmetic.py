"""The key-value task (§4.1) as text, and the tokenizer for it.

Tasks, for the expression ab+cd with ab = 10 and cd = 22:

  kv_subs          D_KV-SUBS   subs:ab+cd=   10+22
  num_math         D_NUM-MATH  math:10+22=   32
  kv_math          D_KV-MATH   math:ab+cd=   32
  num_math_steps   D_NUM-MATH  show:10+22=   10+22=32
  kv_math_steps    D_KV-MATH   show:ab+cd=   10+22=32
  num_math_given   D_NUM-MATH  show:ef+gh=10+22=   32

In the last, ef and gh are any keys, drawn independently of the numbers: it
tells nothing of their values, and asks for arithmetic on what was written last,
whatever came before; a language model of some size can do that.

The prompts are ours: the paper maps the same expression to two answers without
saying how the models tell the tasks apart.
"""

import dataclasses
from pathlib import Path

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.data.arithmetic_source import ArithmeticSource
from calm_jax.data.arithmetic_words import PROMPTS, TASKS, check_task
from calm_jax.data.key_values import (
  OPERATORS,
  Expressions,
  KeyValues,
  evaluate,
  is_eval,
  make_key_values,
  sample_expressions,
  unrelated,
)
from calm_jax.text.tokenizer import Tokenizer, train_sentencepiece

__all__ = [
  "OPERATORS",
  "PROMPTS",
  "TASKS",
  "ArithmeticSource",
  "Example",
  "Expressions",
  "KeyValues",
  "evaluate",
  "examples",
  "is_eval",
  "make_key_values",
  "sample_expressions",
  "train_tokenizer",
]


@dataclasses.dataclass(frozen=True)
class Example:
  """One expression as text; `num_terms` is its number of keys."""

  prompt: str
  completion: str
  num_terms: int

  @property
  def origin(self) -> str:
    """What to call it in a message."""
    return f"the expression {self.prompt}{self.completion}"


def examples(
  kv: KeyValues, expressions: Expressions, task: str
) -> list[Example]:
  """The expressions as text, in order.

  Args:
    kv: the dictionary that the expressions were drawn from.
    expressions: N expressions.
    task: one of `TASKS`.

  Raises:
    InputError: an unknown task.
  """
  check_task(task)
  prompt, asked, given, steps, result = TASKS[task]
  values = _render(expressions, [str(v) for v in kv.values])
  names = unrelated(np.random.default_rng(len(expressions)), kv, expressions)
  of_asked = {
    "keys": _render(expressions, kv.keys),
    "names": _render(names, kv.keys),
    "values": values,
  }[asked]
  rest = values if given else [""] * len(values)
  prompts = [
    f"{prompt}{text}={f'{v}=' if v else ''}"
    for text, v in zip(of_asked, rest, strict=True)
  ]
  results = [str(value) for value in evaluate(kv, expressions)]
  parts = [values] * steps + [results] * result
  completions = ["=".join(part) for part in zip(*parts, strict=True)]
  counts = expressions.num_terms.tolist()
  return [
    Example(*parts) for parts in zip(prompts, completions, counts, strict=True)
  ]


def train_tokenizer(
  kv: KeyValues,
  path_prefix: str | Path,
  *,
  keys: str = "pieces",
  digits: str = "single",
  seed: int = 0,
) -> Tokenizer:
  """Trains the task's SentencePiece model and writes `path_prefix`.model.

  Its pieces are the task prompts, the keys, the digits and the operators, so a
  text has one segmentation and the pieces of its parts are the parts of its
  pieces, which lets `ArithmeticSource` build batches from tables.

  Args:
    kv: the dictionary.
    path_prefix: where to write, without ".model".
    keys: "pieces": a key is one token (the paper takes keys from the
      vocabulary); "characters": a key is spelled, one token a letter.
    digits: "single", or "grouped": from the left, up to three at a time.
    seed: of the expressions that it is trained on.

  Raises:
    InputError: an unknown choice, or a key does not come out as asked.
  """
  if keys not in ("pieces", "characters"):
    raise InputError(f"keys {keys!r}: expected pieces or characters")
  if digits not in ("single", "grouped"):
    raise InputError(f"digits {digits!r}: expected single or grouped")
  symbols = sorted(PROMPTS)
  alphabet = set(OPERATORS) | {"="}
  if keys == "pieces":
    symbols += kv.keys
  else:
    alphabet |= set("".join(kv.keys))
  if digits == "grouped":
    symbols += [f"{v:0{n}d}" for n in (1, 2, 3) for v in range(10**n)]
  else:
    alphabet |= set("0123456789")
  # Room for exactly these, so that no further piece is merged from them.
  size = 4 + len(symbols) + len(alphabet)
  tokenizer = train_sentencepiece(
    _training_texts(kv, seed),
    path_prefix,
    vocab_size=size,
    user_defined_symbols=symbols,
    split_digits=True,
  )
  _check_keys(kv, tokenizer, keys)
  return tokenizer


def _training_texts(kv: KeyValues, seed: int) -> list[str]:
  rng = np.random.default_rng(seed)
  drawn = sample_expressions(rng, kv, 1000, min_terms=1, max_terms=6)
  texts = [f"subs:{key}={v}" for key, v in zip(kv.keys, kv.values, strict=True)]
  for task in TASKS:
    texts += [e.prompt + e.completion for e in examples(kv, drawn, task)]
  # A small dictionary may lack a digit or an operator.
  return [*texts, f"math:0123456789{OPERATORS}="]


def _check_keys(kv: KeyValues, tokenizer: Tokenizer, keys: str) -> None:
  for key in kv.keys:
    ids = tokenizer.encode(key)
    expected = 1 if keys == "pieces" else len(key)
    if len(ids) != expected or tokenizer.decode(ids) != key:
      raise InputError(
        f"the tokenizer {tokenizer.source} splits the key {key!r} into"
        f" {[tokenizer.pieces[i] for i in ids]}, {expected} pieces expected"
      )


def _render(expressions: Expressions, names) -> list[str]:
  texts = []
  rows = zip(
    expressions.key_ids.tolist(),
    expressions.operators.tolist(),
    expressions.num_terms.tolist(),
    strict=True,
  )
  for key_ids, operators, count in rows:
    parts = [names[key_ids[0]]]
    for j in range(1, count):
      parts += OPERATORS[operators[j - 1]], names[key_ids[j]]
    texts.append("".join(parts))
  return texts
