import io
import json
import math

import numpy as np
import pytest
from calm_jax.predictions import count_by_terms
from calm_jax.tables import MODELS
from rich.console import Console

from calm_jax import report
from calm_jax.errors import InputError

TABLE1 = {
  "kv_subs": {"augmenting": 99.1, "anchor": 0.0, "composed": 95.0},
  "num_math": {"augmenting": 3.0, "anchor": 90.0, "composed": 88.0},
  "kv_math": {
    "augmenting": 0.0,
    "anchor": 0.1,
    "composed": 75.0,
    "composed_held_in": 97.0,
    "composed_mixed": 91.0,
    "composed_held_out": 75.0,
  },
}
RESULTS = {
  "table1": TABLE1,
  "parameters": {
    "anchor": 1_000_000,
    "augmenting": 200_000,
    "composition": 80_000,
    "composition_paper_count": 64_000,
  },
  "seconds": {"augmenting": 12.34, "compose": 3720.0},
  "examples": 2000,
  "answer": "steps",
}
PERPLEXITY = {
  "code [py]": {"augmenting": 8.2, "anchor": 12.0, "composed": 7.1},
  "text": {"augmenting": math.inf, "anchor": 5.5},
}


def printed(function, results):
  console = Console(file=io.StringIO(), width=100)
  function(results, console)
  return console.file.getvalue()


def write_lines(path, lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def prediction(correct, terms=3, prompt="math:ab+cd="):
  return {
    "prompt": prompt,
    "completion": "32",
    "prediction": "32" if correct else "31|`x`",
    "correct": correct,
    "num_terms": terms,
  }


@pytest.fixture
def workdir(tmp_path):
  for stage in ("compose", "augmenting"):
    write_lines(
      tmp_path / stage / "metrics.jsonl",
      [{"step": i, "loss": 3.0 / i} for i in range(1, 9)],
    )
  folder = tmp_path / "predictions"
  for model in MODELS:
    lines = [prediction(model == "composed" and i % 4 > 0) for i in range(8)]
    write_lines(folder / f"kv_math_held_out.{model}.jsonl", lines)
    write_lines(folder / f"num_math.{model}.jsonl", lines)
  np.savez(
    tmp_path / "attention.npz",
    weights=np.full((2, 2, 4, 4), 0.25, np.float32),
    tokens=np.array(["ab", "=", "3", "</s>"]),
    connections=np.array(["4->8", "8->16"]),
    prompt_length=2,
  )
  return tmp_path


def test_table1_sets_the_paper_beside_ours():
  assert report.table1_rows(RESULTS) == [
    ("KV-SUBS", "98.1 / 99.1", "0.0 / 0.0", "92.9 / 95.0"),
    ("NUM-MATH", "4.2 / 3.0", "73.7 / 90.0", "72.0 / 88.0"),
    (
      "KV-MATH, all keys held-out",
      "0.7 / 0.0",
      "0.0 / 0.1",
      "84.3 / 75.0",
    ),
    ("KV-MATH, mixed", "–", "–", "– / 91.0"),
    ("KV-MATH, all keys held-in", "–", "–", "– / 97.0"),
  ]


def test_table1_without_kinds_or_models():
  rows = report.table1_rows({"table1": {"kv_math": {"composed": 50.0}}})
  assert rows[0] == ("KV-SUBS", "98.1 / –", "0.0 / –", "92.9 / –")
  assert rows[2:] == [("KV-MATH", "0.7 / –", "0.0 / –", "84.3 / 50.0")]


@pytest.mark.parametrize("accuracy", [100.1, -0.1, math.nan])
def test_an_accuracy_is_in_percent(accuracy):
  with pytest.raises(InputError, match="percent"):
    report.table1_rows({"table1": {"kv_subs": {"anchor": accuracy}}})


def test_printed_table1_has_the_costs():
  text = printed(report.print_table1, RESULTS)
  assert "84.3 / 75.0" in text
  assert "1,000,000" in text and "8.0%" in text and "6.4%" in text
  assert "12.3 s" in text and "1 h 02 min" in text
  assert "2,000 of each kind" in text


def test_other_runs_stand_beside_this_one():
  other = {
    "shorter": {"table1": {"kv_math": {"composed": 50.0}}, "answer": "direct"},
    "mixed": {
      "table1": {"kv_math": {"composed_held_out": 40, "composed_mixed": 60}}
    },
    "text": {"perplexity": {}},
  }
  made = report.tables(RESULTS | {"other_runs": other})[1]
  assert made.header == (
    "data set",
    "this run, steps",
    "shorter, direct",
    "mixed",
  )
  rows = {row[0]: row[1:] for row in made.rows}
  assert rows["KV-SUBS"] == ("95.0", "–", "–")
  assert rows["KV-MATH, all keys held-out"] == ("75.0", "50.0", "40.0")
  assert rows["KV-MATH, mixed"] == ("91.0", "–", "60.0")


def test_perplexity_stresses_the_best_of_each_row():
  (made,) = report.tables({"perplexity": PERPLEXITY})
  assert made.rows == [
    ("code [py]", "8.20", "12.00", "7.10"),
    ("text", "inf", "5.50", "–"),
  ]
  assert made.bold == {(0, 3), (1, 2)}
  # In brackets, yet not taken for rich's markup.
  assert "code [py]" in printed(
    report.print_results, {"perplexity": PERPLEXITY}
  )


def test_scores_of_other_runs_are_columns():
  results = {
    "perplexity": {"text": {"composed": 5.0}},
    "bits_per_byte": {"text": {"composed": 0.9876}},
    "other_runs": {"lora": {"perplexity": {"text": {"composed": 4.0}}}},
  }
  scores, bits = report.tables(results)
  assert scores.header[-2:] == ("composed", "composed, lora")
  assert scores.rows == [("text", "–", "–", "5.00", "4.00")]
  assert scores.bold == {(0, 4)}
  assert bits.rows == [("text", "–", "–", "0.988")]


def test_results_without_a_section():
  with pytest.raises(InputError, match="neither"):
    report.tables({"seconds": {}})
  with pytest.raises(InputError, match="table1"):
    report.print_table1({"perplexity": PERPLEXITY})


def test_wilson_interval():
  low, high = report.wilson_interval(5, 10)
  assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
  low, high = report.wilson_interval(0, 100)
  assert low == 0 and high == pytest.approx(0.0370, abs=1e-4)
  assert report.wilson_interval(100, 100)[1] == 1
  for bad in ((1, 0), (3, 2), (-1, 2)):
    with pytest.raises(ValueError, match="not a proportion"):
      report.wilson_interval(*bad)


def test_report_embeds_the_figures_and_examples(workdir):
  configuration = {"seed": 0, "compose": {"learning_rate": 1e-3}}
  path = report.write_report(workdir, RESULTS | {"config": configuration})
  text = path.read_text(encoding="utf-8")
  for name in ("accuracy", "attention", "loss"):
    assert f"](figures/{name}.png)" in text
    assert (workdir / "figures" / f"{name}.png").stat().st_size > 1000
  assert "| **84.3 / 75.0** |" in text
  assert "**75.0%** of the answers are right" in text
  # 6 of 8 right, as the table says: the interval is of the same examples.
  assert "of 8 examples, 95% interval 40.9 to 92.9%" in text
  assert "| `32` | `31\\|'x'` | wrong |" in text
  assert "| `compose.learning_rate` | `0.001` |" in text
  # Every row of a table has as many cells as its head.
  for block in text.split("\n\n"):
    rows = [x for x in block.splitlines() if x.startswith("|")]
    cells = {row.replace("\\|", "").count("|") for row in rows}
    assert len(cells) <= 1, block
  assert json.loads((workdir / "results.json").read_text())["table1"] == TABLE1
  assert not list(workdir.glob("*.tmp"))


def test_no_interval_from_a_sample_of_the_predictions(workdir):
  path = workdir / "predictions" / "kv_math_held_out.composed.jsonl"
  write_lines(path, [prediction(True)])
  text = report.write_report(workdir, RESULTS).read_text(encoding="utf-8")
  assert "**75.0%**" in text and "interval 4" not in text


def test_report_of_results_alone(tmp_path):
  path = report.write_report(tmp_path / "new", {"perplexity": PERPLEXITY})
  text = path.read_text(encoding="utf-8")
  assert "**7.10**" in text
  assert "![" not in text and "Examples" not in text


def test_results_json_holds_numpy_and_infinite_numbers(tmp_path):
  results = {
    "perplexity": {"a": {"anchor": np.float32(2.5), "composed": math.inf}},
    "parameters": {"anchor": np.int64(7)},
    "config": {"dtype": np.float32, "layers": (1, np.arange(2))},
  }
  report.write_report(tmp_path, results)
  read = json.loads((tmp_path / "results.json").read_text())
  assert read["perplexity"]["a"] == {"anchor": 2.5, "composed": "Infinity"}
  assert read["parameters"] == {"anchor": 7}
  assert read["config"]["layers"] == [1, [0, 1]]
  # Written once, read back, and the same tables again.
  assert report.tables(read) == report.tables(results)


def test_a_bad_file_does_not_lose_the_results(workdir):
  np.savez(workdir / "attention.npz", weights=np.zeros(3))
  with pytest.raises(InputError, match="prompt_length"):
    report.write_report(workdir, RESULTS)
  assert (workdir / "results.json").exists()


def test_stages_are_in_the_order_they_were_run(workdir):
  write_lines(workdir / "aside" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
  write_lines(workdir / "quiet" / "metrics.jsonl", [{"step": 1, "x": 1.0}])
  stages = report._stages(workdir, ["compose", "augmenting", "absent"])
  assert list(stages) == ["compose", "augmenting", "aside"]


def test_predictions_are_counted_by_number_of_terms(tmp_path):
  folder = tmp_path / "predictions"
  lines = [prediction(True, 3), prediction(False, 3), prediction(True, 6)]
  write_lines(folder / "kv_math_held_out.composed.jsonl", lines)
  write_lines(folder / "other.set.anchor.jsonl", lines)
  no_terms = [{k: v for k, v in x.items() if k != "num_terms"} for x in lines]
  write_lines(folder / "num_math.anchor.jsonl", no_terms)
  # Of another run: in a folder of its own, and not read.
  write_lines(folder / "direct" / "kv_math_held_out.composed.jsonl", lines)
  read = report.read_predictions(tmp_path)
  assert list(read) == [
    ("kv_math_held_out", "composed"),
    ("num_math", "anchor"),
    ("other.set", "anchor"),
  ]
  counts = count_by_terms(read)
  assert counts == {
    "KV-MATH, all keys held-out": {"composed": {3: (1, 2), 6: (1, 1)}}
  }


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("kv_math.jsonl", "", "<set>.<model>"),
    ("kv_math.mine.jsonl", "", "augmenting, anchor, composed"),
    ("kv_math.anchor.jsonl", '{"prompt": "a"}\n', "line 1: needs"),
    ("kv_math.anchor.jsonl", "{\n", "line 1: not JSON"),
  ],
)
def test_bad_predictions_say_where(tmp_path, name, text, message):
  (tmp_path / "predictions").mkdir()
  (tmp_path / "predictions" / name).write_text(text)
  with pytest.raises(InputError, match=message):
    report.read_predictions(tmp_path)


def test_long_and_odd_text_stays_in_its_cell(workdir):
  path = workdir / "predictions" / "kv_subs.composed.jsonl"
  write_lines(path, [prediction(True, prompt="x\r\n" * 200)])
  text = report.write_report(workdir, RESULTS).read_text(encoding="utf-8")
  row = next(x for x in text.splitlines() if x.startswith("| KV-SUBS | comp"))
  assert len(row) < 250 and row.endswith("right |")
