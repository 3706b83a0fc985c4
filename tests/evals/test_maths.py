"""Final numbers: of the gold answers, rewritten, and of odd texts."""

from __future__ import annotations

import json
from decimal import Decimal

import eval_data
import pytest

from calm_jax.core.errors import InputError
from calm_jax.evals import tasks
from calm_jax.evals.maths import final_number, read_gsm


@pytest.mark.parametrize(
  "text, number",
  [
    ("#### 18", "18"),
    ("####18", "18"),
    ("It takes 3.\n#### 18 eggs in 7 days", "18"),
    ("#### 18\n\nNext: 4 + 4\n#### 8", "18"),
    ("#### $1,234,567.50 in total", "1234567.5"),
    ("#### -5", "-5"),
    ("#### −5 °C", "-5"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### 3 x -2 = -6", "-6"),
    ("#### no idea", None),
    ("The answer is 18. She sells it for 2 dollars.", "18"),
    ("I think the answer is: 9 * 2 = $18. That is for 1 day.", "18"),
    ("So the Answer: 70,000", "70000"),
    ("first the answer is 3. No, the answer is 4.", "4"),
    ("The answer is clear: 3 + 4 makes 7 apples", "3"),
    ("She makes 9 * 2 = 18 dollars every day.", "18"),
    ("It costs Rs. 1,00,000 (one lakh)", "100000"),
    ("18 - 20 = -2", "-2"),
    ("it is 20-18", "18"),
    ("it is 20 -18", "18"),
    ("50% -3", "3"),
    ("from 3–5", "5"),
    ("0.5", "0.5"),
    ("is .5", "0.5"),
    ("18.00", "18"),
    ("macht 1,5 Liter", "1.5"),
    ("0,125", "0.125"),
    ("1.000.000 Euro", "1000000"),
    ("1\u202f000 euros", "1000"),
    ("12'500 Franken", "12500"),
    ("২,১২৫ টাকা", "2125"),
    ("คำตอบคือ ๑๘", "18"),
    ("5, 10", "10"),
    ("in 2024.", "2024"),
    ("", None),
    ("none at all", None),
  ],
)
def test_final_numbers(text, number):
  assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
  ("language", "text", "number"),
  [
    ("de", "Die Antwort ist 70.000. Sie zahlt 2 Euro mehr.", 70_000),
    ("es", "La respuesta es $1.500. Son 2 días.", 1500),
    ("fr", "La réponse est 1\u202f500 €. Il a 2 amis.", 1500),
    ("ru", "Ответ: 70 000 рублей. Это 2 дня.", 70_000),
    ("sw", "Jibu ni 1,800. Ana siku 2.", 1800),
    ("bn", "উত্তর হল ৭০,০০০। এটা ২ দিন", 70_000),
    ("te", "సమాధానం ౧,౮౦౦. 2 రోజులు", 1800),
    ("th", "คำตอบคือ ๑,๘๐๐ บาท ใน 2 วัน", 1800),
    ("ja", "答えは7万2千円です。2日で", 72_000),
    ("zh", "答案是1,800。共2天", 1800),
    ("", r"so \boxed{1{,}800}. They have 3 left; the answer is above.", 1800),
    ("", r"\boxed{3}, no: \boxed{x = 70\,000\text{ m}^2} in 2 days", 70_000),
  ],
)
def test_the_answer_before_other_numbers(language, text, number):
  assert final_number(text, language) == number


def test_every_gold_answer_of_gsm8k():
  lines = (eval_data.folder("gsm8k") / "test.jsonl").read_text().splitlines()
  answers = [json.loads(line)["answer"] for line in lines]
  assert len(answers) == 1319
  rewritten = {
    "as they are": lambda steps, n: f"{steps}#### {n}",
    "units": lambda steps, n: f"{steps}#### {n} kilograms",
    "currency": lambda steps, n: f"{steps}#### ${n}",
    "percent": lambda steps, n: f"{steps}#### {n}%",
    "commas": lambda steps, n: f"{steps}#### {n:,}",
    "decimals": lambda steps, n: f"{steps}#### {n}.00",
    "commas and decimals": lambda steps, n: f"{steps}#### {n:,}.0 litres",
    "a trailing sentence": lambda steps, n: (
      f"{steps}#### {n}. That is what 2 friends have after 3 days."
    ),
    "in words": lambda steps, n: f"{steps}The answer is {n:,} apples.",
    "in words, then more": lambda steps, n: (
      f"{steps}So the answer is ${n:,}. They have 3 left."
    ),
    "bold": lambda steps, n: f"{steps}The final answer is **{n}**.",
    "boxed": lambda steps, n: f"{steps}Thus the total is \\boxed{{{n}}}.",
    "without a mark": lambda steps, n: f"{steps}In total, {n:,} days.",
  }
  for name, write in rewritten.items():
    for negative in (False, True):
      for answer in answers:
        steps, gold = answer.split("#### ")
        number = int(gold.replace(",", "")) * (-1 if negative else 1)
        text = answer if name == "as they are" else write(steps, number)
        if negative:
          text = write(steps, number)
        assert final_number(text) == number, (name, text)


def evaluation(path, pool, **options):
  return tasks.make(
    {
      "kind": "maths", "group": "GSM8K", "path": path, "pool": pool,
      "max_new_tokens": 256,
    }
    | options
  )  # fmt: skip


def test_the_evaluation_of_a_model_that_knows_the_answers():
  folder = eval_data.folder("gsm8k")
  items = read_gsm(folder / "test.jsonl")[:40]
  right = iter(item["answer"] for item in items)
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [f" {next(right)}\n\nQuestion: more? #### 0" for _ in prompts]

  judged = eval_data.answer(
    evaluation(
      folder / "test.jsonl", folder / "train.jsonl", shots=8, limit=40
    ),
    generate,
  )
  assert judged.value == 100
  assert asked[0].count("Question: ") == 9
  assert "<<" not in asked[0]
  assert asked[0].endswith(f"{items[0]['question']}\nAnswer:")


def test_by_hand(tmp_path):
  file = tmp_path / "mgsm_de.tsv"
  file.write_text("Wie viele?\t1,200\nWann?\t3\nWo?\t-4\nWer?\t2,5\n")
  items = read_gsm(file)
  assert [item["number"] for item in items] == ["1200", "3", "-4", "2.5"]
  pool = tmp_path / "pool.jsonl"
  line = {"question": "Wieso?", "answer": "Weil 1.\n#### 1"}
  pool.write_text(json.dumps(line) + "\n")
  given = ["#### 1.200 Euro", "drei", "4", "es sind 2,5."]
  judged = eval_data.answer(
    evaluation(file, pool, shots=1, language="de"), lambda prompts: given
  )
  assert judged.value == 50
  assert [row["correct"] for row in judged.rows] == [True, False, False, True]
  assert [row["found"] for row in judged.rows] == ["1200", None, "4", "2.5"]
  judged = eval_data.answer(
    evaluation(file, pool, shots=1), lambda prompts: given
  )
  assert [row["found"] for row in judged.rows] == ["1.200", None, "4", "2.5"]


def test_what_cannot_be_read_is_said(tmp_path):
  file = tmp_path / "test.jsonl"
  file.write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b"}\n')
  with pytest.raises(InputError, match=r"test\.jsonl line 2: .*'answer'"):
    read_gsm(file)
  file.write_text('{"question": "a", "answer": "no number"}\n')
  with pytest.raises(InputError, match="line 1: needs a question"):
    read_gsm(file)
  with pytest.raises(InputError, match=r"none\.tsv: no such file"):
    read_gsm(tmp_path / "none.tsv")
  with pytest.raises(InputError, match=r"test\.json is no \.jsonl"):
    read_gsm(tmp_path / "test.json")
