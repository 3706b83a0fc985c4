import csv
import io
import json
import math

import made_runs
import pytest
from rich.console import Console

from calm_jax.core.errors import InputError
from calm_jax.reporting import runs, table, tables


def made(*folders):
  """Tables by name."""
  return {one.name: one for one in tables.tables(runs.find_groups(folders))}


def cells(one, row):
  """The texts of a row by the columns' names."""
  [found] = [r for r in one.rows if r[0] == row]
  return dict(zip(one.header[1:], map(str, found[1:]), strict=True))


def change(folder, **changes):
  path = folder / "results.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  return folder


def test_table1_has_intervals_and_significance(tmp_path):
  one = made(made_runs.key_values(tmp_path / "kv"))["table-1"]
  assert cells(one, "KV-SUBS") == {
    "m_A": "98.1 / 100.0 [91.2 to 100.0] p<0.001",
    "m_B": "0.0 / 0.0 [0.0 to 8.8]",
    "composed": "92.9 / 75.0 [59.8 to 85.8] p<0.001",
  }
  assert cells(one, "KV-MATH, all keys held-out")["m_A"].endswith("p=1.000")
  # Without predictions, and without a number of the paper.
  assert cells(one, "KV-MATH, mixed") == {
    "m_A": "–", "m_B": "–", "composed": "– / 80.0"
  }  # fmt: skip
  assert "KV-MATH, all keys held-in" not in [row[0] for row in one.rows]
  [(row, column)] = one.bold
  assert str(one.rows[row][column]).startswith("84.3 / 75.0")
  notes = " ".join(one.notes)
  assert "Examples evaluated: 40" in notes and "numbers, then" in notes
  assert "PaLM2-XS." in notes
  assert "4 layers of width 96 (200,000 parameters)" in notes
  assert "other models and other data" in notes


def test_accuracy_by_terms_and_products(tmp_path):
  folder = made_runs.key_values(tmp_path / "kv")
  one = made(folder)["terms"]
  held_out = "KV-MATH, all keys held-out"
  assert [row[0] for row in one.rows] == [
    f"{held_out}: 2 terms", f"{held_out}: 3 terms",
    "NUM-MATH: 2 terms", "NUM-MATH: 3 terms",
  ]  # fmt: skip
  # Of every other expression of the composed model half are right.
  assert cells(one, f"{held_out}: 2 terms") == {
    "m_A": "0.0 [0.0 to 16.1]",
    "m_B": "0.0 [0.0 to 16.1]",
    "composed": "50.0 [29.9 to 70.1]",
  }
  assert cells(one, f"{held_out}: 3 terms")["composed"].startswith("100.0 [")
  rows = [
    {"prompt": "p", "prediction": "q", "correct": i < 3, "num_products": i % 2}
    for i in range(6)
  ]
  made_runs.write_lines(
    folder / "predictions" / "num_math_steps.anchor.jsonl", rows
  )
  one = made(folder)["terms"]
  steps = "NUM-MATH, answered in steps"
  assert [row[0] for row in one.rows[4:]] == [
    f"{steps}: 0 products", f"{steps}: 1 product"
  ]  # fmt: skip
  shown = cells(one, f"{steps}: 1 product")
  assert shown["m_B"].startswith("33.3 [") and shown["composed"] == "–"


def test_no_table_by_terms_where_all_have_two(tmp_path):
  folder = made_runs.key_values(tmp_path / "kv")
  for path in (folder / "predictions").iterdir():
    path.write_text(
      path.read_text().replace('"num_terms": 3', '"num_terms": 2')
    )
  assert "terms" not in made(folder)


def test_no_interval_from_a_sample_of_the_predictions(tmp_path):
  folder = made_runs.key_values(tmp_path / "kv")
  path = folder / "predictions" / "kv_subs.composed.jsonl"
  path.write_text(path.read_text().split("\n")[1] + "\n")
  one = made(folder)["table-1"]
  assert cells(one, "KV-SUBS")["composed"] == "92.9 / 75.0"


def test_the_headline_without_kinds_of_keys(tmp_path):
  table1 = {"kv_math": {"composed": 50.0}}
  one = made(made_runs.key_values(tmp_path / "kv", table1=table1))["table-1"]
  assert cells(one, "KV-MATH, all keys held-out")["composed"] == "84.3 / 50.0"


@pytest.mark.parametrize("accuracy", [100.1, -0.1, math.nan])
def test_an_accuracy_is_in_percent(accuracy, tmp_path):
  table1 = {"kv_subs": {"anchor": accuracy}}
  folder = made_runs.key_values(tmp_path / "kv", table1=table1)
  with pytest.raises(InputError, match="percent"):
    made(folder)


def test_kinds_and_alternatives_stand_beside_the_paper(tmp_path):
  other = {"direct": {"table1": {"kv_math": {"composed": 7.0}}}}
  folder = made_runs.key_values(tmp_path / "kv", other_runs=other)
  made_runs.key_values(folder / "lora", "lora")
  one = made(folder)["table-1"]
  row = cells(one, "KV-MATH, all keys held-out")
  assert row["composed, direct"] == "7.0"
  assert row["m_B with LoRA"] == "75.0 [59.8 to 85.8] p<0.001"
  # A baseline alone does not take the place of the paper's composition.
  alone = cells(made(folder / "lora")["table-1"], "KV-SUBS")
  assert alone["composed"] == "92.9 / –"
  assert alone["m_B with LoRA"].startswith("75.0 ")


def test_trials_are_a_mean_and_a_range(tmp_path):
  found = made(made_runs.ablations(tmp_path / "sweep"))
  row = cells(found["table-1"], "NUM-MATH")
  assert row["composed"] == "72.0 / 75.5 [75.0 to 76.0, 2 trials]"
  # The same in all trials: with its interval.
  assert row["m_B"] == "73.7 / 100.0 [91.2 to 100.0]"
  rows = found["ablations"].rows
  assert [str(cell) for cell in rows[0]] == [
    "composed", "80,000", "75.5 [75.0 to 76.0, 2 trials]"
  ]  # fmt: skip


def test_translation_and_mathematics(tmp_path):
  folder = made_runs.languages(tmp_path / "ntl")
  made_runs.languages(folder / "finetune", "finetune")
  found = made(folder)
  table2 = found["table-2"]
  row = cells(table2, "lij_Latn")
  assert row["m_A before"] == "24.0 / –"
  assert row["m_B"] == "32.6 / 20.0 [18.0 to 22.5]"
  assert row["composed"] == "44.1 / 26.0 [24.0 to 28.5] p<0.001"
  assert row["m_B fine-tuned"].startswith("48.1 / 23.0 ")
  names = [row[0] for row in table2.rows]
  assert names[-3:] == ["ary_Arab", "deu_Latn", "average"]
  assert cells(table2, "ary_Arab")["m_B"].startswith("– / 23.0")
  # Of the three languages that the paper's table has.
  assert cells(table2, "average")["m_B"] == "41.7 / 21.0"
  assert cells(table2, "nno_Latn")["composed"] == "54.6 / –"
  [note] = [note for note in table2.notes if "FLORES-200" in note]
  assert "8 examples" in note and "chrF1|nrefs:1" in note
  assert "5 shots asked for, 4.7 fitted" in note
  table3 = found["table-3"]
  assert cells(table3, "MGSM sw")["m_B"].startswith("16.0 / 26.0")
  # English is not of Table 6, whose languages Table 3 has ten of.
  assert cells(table3, "GSM8K")["m_B"].startswith("– / 27.0")
  assert cells(table3, "GSM8K meo")["m_B"].startswith("28.8 / 28.0")
  assert [len(found[name].rows) for name in ("table-3", "table-6")] == [23, 26]
  assert cells(found["table-6"], "meo")["composed"].startswith("34.0 / ")
  average = cells(found["table-6"], "average")
  assert average["m_B"] == "18.6 / 28.0 [26.0 to 30.5]"


def test_english_problems_are_not_set_beside_other_languages(tmp_path):
  folder = made_runs.text(tmp_path / "a", evals=[("GSM8K", "", "accuracy")])
  found = made(folder)
  assert found["table-6"].empty
  assert cells(found["table-3"], "GSM8K average")["m_B"] == "22.5 / –"
  assert cells(found["table-3"], "GSM8K")["m_B"].startswith("– / 20.0")
  assert cells(found["table-5"], "GSM8K")["composed"] == "21.4 / –"


def test_what_equals_m_b_is_not_better(tmp_path):
  evals = [("MGSM", f"l{i}", "accuracy") for i in range(8)]
  one = made(made_runs.text(tmp_path / "a", evals=evals))["table-5"]
  # 6 points more than m_B, 5, ... 1 point less.
  row = cells(one, "MGSM #(> m_B), of 11 / 8")
  assert row["composed"] == "11 / 6"
  row = cells(one, "MGSM #(≥ m_B), of 11 / 8")
  assert row["composed"] == "– / 7"


def test_trials_are_counted_against_the_m_b_that_one_has_measured(tmp_path):
  evals = [("MGSM", f"l{i}", "accuracy") for i in range(8)]
  for kind in ("composed", "lora"):
    folder = made_runs.text(
      tmp_path / "ablations" / kind / "0", kind, evals=evals
    )
  results = json.loads((folder / "results.json").read_text())
  for one in results["evals"].values():
    del one["scores"]["anchor"]
  change(folder, evals=results["evals"])
  row = cells(made(tmp_path)["table-5"], "MGSM #(> m_B), of 11 / 8")
  assert row["m_B with LoRA"] == "9 / 8"


def test_code_and_what_no_run_has(tmp_path):
  found = made(made_runs.code(tmp_path / "code"))
  row = cells(found["table-4"], "CodeXGLUE ruby")
  assert row["composed"] == "29.0 / 26.0 [24.0 to 28.5] p<0.001"
  assert cells(found["table-4"], "MBPP")["m_B"].startswith("28.6 / 21.0")
  empty = [name for name, one in found.items() if one.empty]
  assert empty == ["table-1", "table-2", "table-3", "table-6"]
  for name in empty:
    assert "No run" in found[name].notes[0]
  assert cells(found["table-1"], "NUM-MATH")["composed"] == "72.0 / –"


def test_table5_gathers_the_groups_of_all_experiments(tmp_path):
  folders = [
    made_runs.languages(tmp_path / "ntl"),
    made_runs.code(tmp_path / "code"),
  ]
  made_runs.languages(tmp_path / "ntl" / "lora", "lora")
  made_runs.code(tmp_path / "code" / "zeroed", "zeroed")
  one = made(*folders)["table-5"]
  assert cells(one, "FLORES-200") == {
    "m_B": "22.0", "m_B fine-tuned": "62.1 / –", "composed": "60.5 / 26.0",
    "vanilla m_A": "59.2 / –", "random m_A": "58.8 / –",
    "m_A as an encoder": "59.3 / –", "m_B with LoRA": "59.2 / 24.0",
    "m_A zeroed": "–",
  }  # fmt: skip
  # Without the English problems, which are not the paper's.
  assert cells(one, "GSM8K")["m_B"] == "28.0 [26.0 to 30.5]"
  row = cells(one, "GSM8K #(> m_B), of 25 / 1")
  assert (row["composed"], row["m_A as an encoder"]) == ("20 / 0", "12 / –")
  row = cells(one, "MGSM #(≥ m_B), of 11 / 2")
  assert (row["composed"], row["m_B"]) == ("– / 2", "–")
  assert cells(one, "HumanEval")["composed"].endswith("p<0.001")
  assert cells(one, "MBPP")["m_A zeroed"].startswith("24.0 ")
  assert sum("other data" in note for note in one.notes) == 2
  # Of two experiments with the same groups each has its rows.
  folders.append(made_runs.languages(tmp_path / "small", codes=["lij_Latn"]))
  names = [row[0] for row in made(*folders)["table-5"].rows]
  assert {"FLORES-200, ntl", "FLORES-200, small", "HumanEval"} <= set(names)


def test_scores_of_text_stress_the_best(tmp_path):
  folder = made_runs.text(
    tmp_path / "text",
    perplexity={
      "code [py]": {"augmenting": 8.2, "anchor": 12.0, "composed": 7.1},
      "text": {"augmenting": "Infinity", "anchor": 5.5},
    },
    other_runs={"long": {"bits_per_byte": {"lij_Latn": {"composed": 1.2}}}},
  )
  found = made(folder)
  one = found["perplexity"]
  assert list(cells(one, "code [py]").values()) == ["8.20", "12.00", "7.10"]
  assert list(cells(one, "text").values()) == ["inf", "5.50", "–"]
  assert one.bold == {(0, 3), (1, 2)}
  bits = cells(found["bits-per-byte"], "lij_Latn")
  assert bits["composed"] == "1.300" and bits["composed, long"] == "1.200"
  # In brackets, yet not taken for rich's markup.
  console = Console(file=io.StringIO(), width=100)
  table.print_tables([one], console)
  assert "code [py]" in console.file.getvalue()


def test_other_groups_have_a_table_of_their_own(tmp_path):
  evals = [
    ("NLLB-Seed", "vec_Latn", "chrf1"),
    ("NLLB-Seed", "fur_Latn", "chrf1"),
  ]
  folder = made_runs.text(tmp_path / "text", evals=evals)
  results = json.loads((folder / "results.json").read_text())
  results["evals"]["nllb-seed-vec_latn"]["prompts_cut"] = 3
  one = made(change(folder, evals=results["evals"]))["evaluations"]
  assert cells(one, "NLLB-Seed fur_Latn") == {
    "m_A": "13.0 [11.0 to 15.5] p<0.001", "m_B": "21.0 [19.0 to 23.5]",
    "composed": "26.0 [24.0 to 28.5] p<0.001",
  }  # fmt: skip
  assert cells(one, "NLLB-Seed average")["m_B"] == "20.5"
  assert "3 prompts cut" in one.notes[0] and "chrf1" in one.notes[0]


def test_the_overhead_by_the_papers_count_and_the_true_one(tmp_path):
  flops = {
    "anchor_step": 2e9, "composed_step": 2.5e9, "lora_step": None,
    "composed_forward": 1e9, "anchor_forward": 0.5e9, "batch": 8,
  }  # fmt: skip
  folder = made_runs.code(tmp_path / "code", flops=flops)
  kv = made_runs.key_values(tmp_path / "kv")
  one = made(folder, kv)["overhead"]
  assert cells(one, "Θ_C, counted as in C.1") == {
    "the paper's example": "14,680,064 (1.4%)",
    "code": "64,000 (6.4%)",
    "kv": "64,000 (6.4%)",
  }
  assert cells(one, "Θ_C, all of it")["kv"] == "80,000 (8.0%)"
  assert cells(one, "Θ_C, all of it")["the paper's example"] == (
    "18,874,368 (5.7%)"
  )
  assert cells(one, "FLOPs, training Θ_C") == {
    "the paper's example": "–", "code": "2.5e+09 (125%)", "kv": "–"
  }  # fmt: skip
  names = [row[0] for row in one.rows if row[0].startswith("FLOPs")]
  assert names == [
    "FLOPs, training all of m_B", "FLOPs, forward pass of m_B",
    "FLOPs, training Θ_C", "FLOPs, forward pass, composed",
    "FLOPs, all steps of compose",
  ]  # fmt: skip
  without = [row for row in made(kv)["overhead"].rows if "FLOPs" in row[0]]
  assert without == [
    ("FLOPs, all steps of compose", "–", "1.5e+12"),
    ("FLOPs, training Θ_C", "–", "–"),
  ]
  assert cells(one, "time of compose")["kv"] == "1 h 02 min"


def test_tables_of_several_experiments_are_told_apart(tmp_path):
  folders = [made_runs.key_values(tmp_path / name) for name in ("a", "b c")]
  found = made(*folders)
  assert {"table-1-a", "table-1-b-c"} <= found.keys()
  assert found["table-1-b-c"].title.endswith(", b c")


def test_markdown_and_csv_hold_the_same(tmp_path):
  one = made(made_runs.key_values(tmp_path / "kv"))["table-1"]
  text = table.as_markdown(one)
  assert text.startswith("## Table 1: key-value arithmetic")
  lines = [line for line in text.split("\n") if line.startswith("|")]
  assert {line.count("|") for line in lines} == {5}
  assert "| **84.3 / 75.0 [59.8 to 85.8] p<0.001** |" in text
  rows = [*csv.DictReader(io.StringIO(table.as_csv(one)))]
  assert len(rows) == len(one.rows)
  assert rows[0]["composed (paper)"] == "92.9"
  assert rows[0]["composed (ours)"] == "75"
  assert float(rows[0]["composed (low)"]) == pytest.approx(59.8, abs=0.1)
  assert float(rows[0]["composed (p_value)"]) < 0.001
  assert rows[3]["composed (paper)"] == "" and "m_B (p_value)" not in rows[0]


def test_markdown_escapes_what_would_end_a_cell():
  odd = table.Table("a", "t", ("", "b|c"), [("x\r\n*y*", "1|2")], ("n|",))
  text = table.as_markdown(odd)
  assert "| x \\*y\\* | 1\\|2 |" in text and "b\\|c" in text


def test_back_translated_problems(tmp_path):
  evals = [("GSM8K back", "meo", "accuracy")]
  folder = made_runs.text(tmp_path / "text", evals=evals)
  entries = json.loads((folder / "results.json").read_text())["evals"]
  numbers = {"delta": 2.5, "delta_low": -1.0, "delta_high": 6.0}
  entries["gsm8k back-meo"]["measures"] = {
    "anchor": numbers | {"overlap": 61.25, "delta_p": 0.25}
  }
  one = made(change(folder, evals=entries))["back-translation"]
  row = cells(one, "GSM8K back meo, overlap 61.2")
  assert row == {"m_B": "2.5 [-1.0 to 6.0] p=0.250"}
