"""Grade-school maths: GSM8K, MGSM; exact match of the final number (§4.2)."""

import dataclasses
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from calm_jax.core import files
from calm_jax.core.errors import InputError
from calm_jax.evals import fewshot
from calm_jax.evals.base import Evaluation, Judgement, Row, judge_correct

MARK = "####"  # GSM8K's, before the final number

_GROUP = r"[,'’٬\u00a0\u2009\u202f]"  # between groups of digits
_NUMBER = re.compile(
  # A minus, unless it subtracts from what is before it.
  r"(?P<sign>(?<![\w)])(?<![\d)%] )[-−–])?"
  r"[$€£¥₹]?(?P<minus>(?<=[$€£¥₹])[-−–])?"
  rf"(?:(?P<grouped>(?!0)\d{{1,3}}(?:{_GROUP}\d{{2,3}})*{_GROUP}\d{{3}}(?!\d)"
  r"(?:\.\d+)?)"
  r"|(?P<dotted>\d{1,3}(?:\.\d{3}){2,}(?!\d))"  # 1.000.000, no decimal
  r"|(?P<plain>\d+(?:[.,٫]\d+)?|(?<!\w)\.\d+))"
)
_STATED = re.compile(r"answer\s*(?:is|:|=)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maths(fewshot.FewShot):
  """Grade-school problems; exemplars are drawn from the file `pool`."""

  pool: str

  def evaluation(self) -> Evaluation:
    """Reads the files; InputError if they are not as they must be."""
    return self.solve(read_gsm(self.path))

  def solve(self, problems: list[Row]) -> Evaluation:
    """Asks problems of `read_gsm`, as far as the limit allows."""
    problems = fewshot.take(problems, limit=self.limit)

    def judge(rows: list[Row]) -> Judgement:
      judged = []
      for row, problem in zip(rows, problems, strict=True):
        number, wanted = final_number(row["prediction"]), problem["number"]
        row = row | {"wanted": wanted, "found": None}
        if number is not None:
          row["found"] = str(number)
        judged.append(row | {"correct": number == Decimal(wanted)})
      return judge_correct(judged)

    pool = read_gsm(self.pool)
    return self.few_shot("maths", "accuracy", problems, pool, judge)


def final_number(text: str) -> Decimal | None:
  """Returns the number that a solution ends in; None if it has none.

  It is the first after GSM8K's mark ####, else the first after the last "answer
  is" (after the = of a calculation), else the last. Commas between groups of
  digits, units, currencies and a minus are understood, in any script's digits.
  1,5 is read as 1.5; 1.000 is read as 1, for it cannot be told apart.
  """
  if MARK in text:
    return _first(text.split(MARK, 1)[1])
  stated = [text[match.end() :] for match in _STATED.finditer(text)]
  found = _first(stated[-1]) if stated else None
  if found is None:
    numbers = list(_NUMBER.finditer(text))
    found = _value(numbers[-1]) if numbers else None
  return found


def _first(text: str) -> Decimal | None:
  sentence = re.split(r"[.!?。।]\s|\n", text.strip(), maxsplit=1)[0]
  number = _NUMBER.search(sentence.rsplit("=", 1)[-1])
  return _value(number) if number else None


def _value(match: re.Match) -> Decimal:
  if match["grouped"]:
    digits = re.sub(_GROUP, "", match["grouped"])
  elif match["dotted"]:
    digits = match["dotted"].replace(".", "")
  else:
    digits = re.sub("[,٫]", ".", match["plain"])
  value = Decimal(digits)
  return -value if match["sign"] or match["minus"] else value


def read_gsm(path: str | Path) -> list[dict[str, Any]]:
  """Reads problems of GSM8K (.jsonl) or MGSM (.tsv: question, number).

  Calculator annotations (<<1+1=2>>) are taken out of worked solutions.

  Returns rows of "id" (the line, from 1), "question", "answer" and "number";
  raises InputError if there is no such file, or a line lacks one.
  """
  path = Path(path)
  if not path.is_file() or path.suffix not in (".jsonl", ".tsv"):
    raise InputError(f"{path} is no .jsonl of GSM8K and no .tsv of MGSM")
  is_tsv = path.suffix == ".tsv"
  if is_tsv:
    lines = files.read_lines(path)
  else:
    lines = files.read_json_lines(path, ("question", "answer"))
  items = []
  for number, line in lines:
    try:
      if is_tsv:
        question, answer = files.decode_line(line, number).split("\t")
      else:
        question = line["question"]
        answer = re.sub(r"<<[^>]*>>", "", line["answer"])
      gold = answer.split(MARK)[-1].strip().replace(",", "")
      Decimal(gold)
    except (ValueError, TypeError, ArithmeticError) as error:
      raise InputError(
        f"{path}, line {number}: needs a question and an answer that ends in "
        f"{MARK} and a number ({type(error).__name__}: {error})"
      ) from error
    row = {"id": number, "question": question, "answer": answer}
    items.append(row | {"number": gold})
  return items
