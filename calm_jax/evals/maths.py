"""Grade-school maths: GSM8K, MGSM; exact match of the final number (§4.2)."""

import dataclasses
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from calm_jax.core import files
from calm_jax.core.errors import InputError, check_text
from calm_jax.data import records
from calm_jax.evals import fewshot, numbers
from calm_jax.evals.base import Evaluation, Judgement, Row, judge_correct

MARK = "####"  # GSM8K's, before the final number

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# "The answer is" in the languages of MGSM.
_STATED = re.compile(
  r"(?:answer|antwort|respuesta|réponse|ответ|jibu|উত্তর|คำตอบ|答え|答案)(?:"
  r"\s*[:：=—–]|\s*(?:(?:is|ist|es|est|ni|হল|হলো)\b|คือ|は|是|为|為))"
  r"|(?:సమాధానం|జవాబు)\s*[:=]?",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maths(fewshot.FewShot):
  """Grade-school problems; exemplars are drawn from the file `pool`."""

  pool: str

  def evaluation(self) -> Evaluation:
    """Reads the files; InputError if they are not as they must be."""
    return self.solve(read_gsm(self.path, self.language))

  def solve(self, problems: list[Row]) -> Evaluation:
    """Asks problems of `read_gsm`, as far as the limit allows."""
    problems = fewshot.take(problems, limit=self.limit)

    def judge(rows: list[Row]) -> Judgement:
      judged = []
      for row, problem in zip(rows, problems, strict=True):
        number = final_number(row["prediction"], self.language)
        wanted = problem["number"]
        row = row | {"wanted": wanted, "found": None}
        if number is not None:
          row["found"] = f"{number:f}"
        judged.append(row | {"correct": number == Decimal(wanted)})
      return judge_correct(judged)

    pool = read_gsm(self.pool)
    return self.few_shot("maths", "accuracy", problems, pool, judge)


def final_number(text: str, language: str = "") -> Decimal | None:
  """Returns the number that a solution ends in; None if it has none.

  It is the first after GSM8K's mark ####, else the one in the last \\boxed{},
  else the first after the last "answer is", which is known in the languages of
  MGSM, else the last. Of a calculation the result after the = counts. What is
  a number in `language`, and what 1.000 is in it, says `numbers`.
  """
  if MARK in text:
    return _first(text.split(MARK, 1)[1], language)
  for pattern in (_BOXED, _STATED):
    if matches := list(pattern.finditer(text)):
      last = matches[-1]
      after = last[1] if pattern is _BOXED else text[last.end() :]
      if (found := _first(after, language)) is not None:
        return found
  found = numbers.find_all(text, language)
  return found[-1] if found else None


def _first(text: str, language: str) -> Decimal | None:
  sentence = re.split(r"[.!?。।]\s|\n", text.strip(), maxsplit=1)[0]
  found = numbers.find_all(sentence.rsplit("=", 1)[-1], language)
  return found[0] if found else None


def read_gsm(path: str | Path, language: str = "") -> list[dict[str, Any]]:
  """Reads problems of GSM8K (.jsonl) or MGSM (.tsv: question, number).

  Calculator annotations (<<1+1=2>>) are taken out of worked solutions. Answers
  are numbers as `language` has them, see `numbers`.

  Returns rows of "id" (the line, from 1), "question", "answer" and "number";
  raises InputError if there is no such file, or a line lacks one.
  """
  path, fields = Path(path), ("question", "answer")
  if files.suffix(path) == ".jsonl":
    lines = files.read_json_lines(path, dict.fromkeys(fields, check_text))
  elif files.suffix(path) == ".tsv":
    lines = files.read_entries(records.table(path, fields, "\t"))
  else:
    raise InputError(f"{path} is no .jsonl of GSM8K and no .tsv of MGSM")
  items = []
  for number, row in lines:
    answer = re.sub(r"<<[^>]*>>", "", row["answer"])
    try:
      gold = numbers.parse(answer.split(MARK)[-1], language)
    except (ValueError, ArithmeticError) as error:
      raise InputError(
        f"{path} line {number}: needs a question and an answer that ends in "
        f"{MARK} and a number ({type(error).__name__}: {error})"
      ) from error
    row = {"id": number, "question": row["question"], "answer": answer}
    items.append(row | {"number": f"{gold:f}"})
  return items
