"""Table 7's measures of back-translated problems."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from calm_jax.core.errors import InputError
from calm_jax.evals import suite, tasks

ORIGINALS = ["Ann has 3 red apples.", "How many are left now?", "She eats one."]
RETURNED = [
  "Ann has 3 red apples.",
  "How many remain now?",
  "She eats an apple.",
]


class Solver:
  """A model whose answer is 1 to the questions that it knows, else 2."""

  def __init__(self, knows):
    self.knows = knows

  def generate(self, prompts, max_new_tokens, *, stop, batch_size):
    del max_new_tokens, stop, batch_size
    asked = [p.rsplit("Question: ", 1)[1].split("\n")[0] for p in prompts]
    return [f"#### {1 if one in self.knows else 2}" for one in asked]


def make(folder, returned=RETURNED, answer=1):
  files = {}
  for name, lines in (("original", ORIGINALS), ("returned", returned)):
    number = answer if name == "returned" else 1
    files[name] = folder / f"{name}.tsv"
    files[name].write_text("".join(f"{line}\t{number}\n" for line in lines))
  pool = folder / "pool.jsonl"
  problem = {"question": "Why?", "answer": "So. #### 1"}
  pool.write_text(json.dumps(problem) + "\n")
  return tasks.make(
    {
      "kind": "silver", "group": "GSM8K returned", "language": "meo",
      "path": files["original"], "returned": files["returned"], "pool": pool,
      "shots": 1, "max_new_tokens": 9,
    }
  )  # fmt: skip


def test_delta_and_overlap(tmp_path):
  knows = {ORIGINALS[0], ORIGINALS[1]}
  models = {"anchor": Solver(knows), "composed": Solver({*RETURNED})}
  entry, rows = suite.run(make(tmp_path), models, lambda _: True, 8)
  assert (entry["task"], entry["examples"]) == ("silver", 3)
  # On the returned problems.
  assert entry["scores"]["anchor"]["value"] == pytest.approx(100 / 3)
  assert entry["scores"]["composed"]["value"] == 100
  measures = entry["measures"]["anchor"]
  assert measures["delta"] == pytest.approx(100 / 3)
  assert measures["delta_low"] == 0
  assert measures["delta_p"] == 1  # one example decides nothing
  assert entry["measures"]["composed"]["delta"] == pytest.approx(-200 / 3)
  texts = [row["text"] for row in rows["anchor"]]
  assert texts == ["original"] * 3 + ["returned"] * 3
  assert rows["anchor"][3]["overlap"] == pytest.approx(100)
  assert [row["correct"] for row in rows["anchor"]] == [
    True, True, False, True, False, False,
  ]  # fmt: skip
  files = tmp_path / "returned", tmp_path / "originals"
  for file, lines in zip(files, (RETURNED, ORIGINALS), strict=True):
    file.write_text("\n".join(lines) + "\n")
  run = subprocess.run(
    [sys.executable, "-m", "sacrebleu", files[1], "-i", files[0],
     "-m", "bleu", "-w", "9", "-f", "text"],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  said = f"{entry['note'].removeprefix('overlap: ')} = "
  assert run.stdout.startswith(f"{said}{measures['overlap']:.9f}")


def test_nothing_is_lost_without_translation(tmp_path):
  evaluation = make(tmp_path, ORIGINALS)
  models = {"anchor": Solver({ORIGINALS[0]})}
  entry, _ = suite.run(evaluation, models, lambda _: True, 8)
  assert entry["measures"]["anchor"] == pytest.approx(
    {"overlap": 100, "delta": 0, "delta_low": 0, "delta_high": 0, "delta_p": 1}
  )
  # Both are asked after the same exemplars.
  prompts = evaluation.prompts(lambda _: True)
  assert prompts[:3] == prompts[3:]


def test_files_must_hold_the_same_problems(tmp_path):
  with pytest.raises(InputError, match="got 2 problems for 3"):
    make(tmp_path, RETURNED[:2])
  with pytest.raises(InputError, match="or other numbers"):
    make(tmp_path, RETURNED, answer=7)
