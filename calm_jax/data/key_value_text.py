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

from pathlib import Path
from typing import NamedTuple

import numpy as np

from calm_jax.core.errors import InputError, check_choice
from calm_jax.data import key_values
from calm_jax.data.examples import TextExample
from calm_jax.data.key_values import OPERATORS, Expressions, KeyDictionary
from calm_jax.text.tokenizer import Tokenizer, train_sentencepiece


class KeyValueFormat(NamedTuple):
  """The prompt and the answer of a task.

  Attributes:
    prompt: before the expression.
    asked: the expression is in "keys", in "values", or in unrelated "names".
    given: the expression in values follows in the prompt.
    steps: the answer holds the expression in values.
    result: the answer holds (then) the result.
  """

  prompt: str
  asked: str
  given: bool
  steps: bool
  result: bool


TASKS = {
  "kv_subs": KeyValueFormat("subs:", "keys", False, True, False),
  "num_math": KeyValueFormat("math:", "values", False, False, True),
  "kv_math": KeyValueFormat("math:", "keys", False, False, True),
  "num_math_steps": KeyValueFormat("show:", "values", False, True, True),
  "kv_math_steps": KeyValueFormat("show:", "keys", False, True, True),
  "num_math_given": KeyValueFormat("show:", "names", True, False, True),
}
PROMPTS = tuple(dict.fromkeys(task.prompt for task in TASKS.values()))


def make_examples(
  kv: KeyDictionary, expressions: Expressions, task: str
) -> list[TextExample]:
  """The expressions, drawn from a dictionary, as text of one of `TASKS`.

  Raises:
    InputError: an unknown task.
  """
  check_choice("task", task, list(TASKS))
  form = TASKS[task]
  rng = np.random.default_rng(len(expressions))
  names = key_values.unrelated(rng, kv, expressions)
  values = _render(expressions, [str(value) for value in kv.values])
  asked = {
    "keys": _render(expressions, kv.keys),
    "names": _render(names, kv.keys),
    "values": values,
  }[form.asked]
  results = key_values.evaluate(kv, expressions)
  examples = []
  for text, steps, result in zip(asked, values, results, strict=True):
    prompt = f"{form.prompt}{text}="
    if form.given:
      prompt += f"{steps}="
    answer = [steps] * form.steps + [str(result)] * form.result
    completion = "=".join(answer)
    origin = f"the expression {prompt}{completion}"
    examples.append(TextExample(prompt, completion, origin))
  return examples


def _render(expressions: Expressions, names) -> list[str]:
  texts = []
  columns = (
    expressions.key_ids, expressions.operators, expressions.num_terms
  )  # fmt: skip
  rows = zip(*(column.tolist() for column in columns), strict=True)
  for key_ids, operators, count in rows:
    text = names[key_ids[0]]
    for j in range(1, count):
      text += OPERATORS[operators[j - 1]] + names[key_ids[j]]
    texts.append(text)
  return texts


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
    kv: the dictionary.
    path_prefix: where to write, without ".model".
    keys: "pieces": a key is one token (the paper takes keys from the
      vocabulary); "characters": a key is spelled, one token a letter.
    digits: "single", or "grouped": from the left, up to three at a time.
    seed: of the expressions that it is trained on.

  Raises:
    InputError: an unknown choice, or a key does not come out as asked.
  """
  check_choice("keys", keys, ("pieces", "characters"))
  check_choice("digits", digits, ("single", "grouped"))
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
  drawn = key_values.sample_expressions(rng, kv, 1000, min_terms=1, max_terms=6)
  texts = [f"subs:{key}={v}" for key, v in zip(kv.keys, kv.values, strict=True)]
  for task in TASKS:
    texts += [e.prompt + e.completion for e in make_examples(kv, drawn, task)]
  # A small dictionary may lack a digit or an operator.
  return [*texts, f"math:0123456789{OPERATORS}="]
