"""Folders like those that runs leave, made up and small."""

from __future__ import annotations

import json

import numpy as np

MODELS = ("augmenting", "anchor", "composed")
LANGUAGES = ("lij_Latn", "mar_Deva", "taq_Latn", "ary_Arab", "deu_Latn")
QUESTIONS = "people never in D_C"
SCRIPT = "<script>alert(1)</script><img src=https://example.org/x.png>"


def write_lines(path, lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def stage(folder, name, steps=40):
  lines = [{"step": i, "loss": 4.0 / i**0.3} for i in range(1, steps)]
  lines.append({"step": steps, "eval_loss": 4.1 / steps**0.3})
  write_lines(folder / name / "metrics.jsonl", lines)


def attention(folder, length=9):
  weights = np.tril(np.random.default_rng(0).random((2, 2, length, length)))
  np.savez(
    folder / "attention.npz",
    weights=(weights / weights.sum(-1, keepdims=True)).astype(np.float32),
    tokens=np.array(["show", ":", "ab", "+", "cd", "=", "3", "2", "</s>"]),
    connections=np.array(["kv/2->4", "kv/4->8"]),
    prompt_length=6,
  )


def save(folder, results, kind):
  folder.mkdir(parents=True, exist_ok=True)
  config = {"output": "" if kind == "composed" else kind, "kind": kind}
  config |= {"anchor": "", "augmenting": "", "trial": 0}
  for side, width in (("anchor", 128), ("augmenting", 96)):
    config[f"{side}_model"] = {"num_layers": 4, "width": width}
  results = {
    "kind": kind,
    "parameters": {
      "anchor": 1_000_000, "augmenting": 200_000, "composition": 80_000,
      "composition_paper_count": 64_000, "trained": 80_000, "lora_rank": 0,
      "trained_minus_composition": 0,
    },
    "seconds": {"anchor": 12.34, "compose": 3720.0},
    "stage_flops": {"anchor": None, "compose": 1.5e12},
    "other_runs": {},
    "config": config | results.pop("config"),
  } | results  # fmt: skip
  (folder / "results.json").write_text(json.dumps(results))
  return folder


def key_values(folder, kind="composed", count=40, **changes):
  """Right are: all of m_A's KV-SUBS, m_B's NUM-MATH, 3 of 4 of the third."""
  models = MODELS if kind == "composed" else MODELS[1:]
  knows = {"augmenting": "kv_subs", "anchor": "num_math"}
  table = {}
  for name in ("kv_subs", "num_math", "kv_math_held_out"):
    for model in models:
      rows = []
      for i in range(count):
        right = i % 4 > 0 if model == "composed" else knows[model] == name
        rows.append({
          "prompt": f"{name[-4:]}:ab+c{i}=", "completion": "32",
          "prediction": "32" if right else f"31|`x`{SCRIPT}",
          "correct": right, "num_terms": 2 + i % 2, "num_products": 0,
        })  # fmt: skip
      write_lines(folder / "predictions" / f"{name}.{model}.jsonl", rows)
      share = 100 * sum(row["correct"] for row in rows) / count
      task = table.setdefault(name.removesuffix("_held_out"), {})
      task[model] = share
  table["kv_math"] |= {"composed_held_out": 75.0, "composed_mixed": 80.0}
  for name in ("anchor", "compose"):
    stage(folder, name)
  attention(folder) if kind == "composed" else None
  results = {
    "table1": table, "answer": "steps", "examples": count,
    "config": {"experiment": "key_values", "task": {"num_keys": 200}},
  }  # fmt: skip
  return save(folder, results | changes, kind)


def evaluation(folder, group, subset, metric, values, *, kind="composed"):
  """One of results["evals"], and its predictions."""
  name = f"{group}-{subset}".lower() if subset else group.lower()
  scores = {m: {"value": v, "low": v - 2, "high": v + 2.5}
            for m, v in values.items()}  # fmt: skip
  against = {
    m: {"delta": v - values["anchor"], "low": v - values["anchor"] - 1.5,
        "high": v - values["anchor"] + 1.5, "p_value": 0.0005}
    for m, v in values.items() if m != "anchor"
  }  # fmt: skip
  for at, model in enumerate(values):
    rows = []
    for i in range(8):
      right = bool(i >> at & 1)
      row = {
        "prompt": f"An exemplar\nof {name}\n\nQuestion {i} of {name}?\nAnswer:",
        "prediction": f"text {i}" if right else f"wrong {SCRIPT}",
        "score": 100.0 * right if metric != "chrf1" else 30.0 + 50.0 * right,
      }
      row |= {"completion": f"text {i}"} if metric != "pass@1" else {}
      row |= {"correct": right} if metric != "chrf1" else {}
      row |= {"verdict": "passed"} if metric == "pass@1" and right else {}
      rows.append(row)
    write_lines(folder / "predictions" / f"{name}.{model}.jsonl", rows)
  return name, {
    "task": "questions" if group == QUESTIONS else "translation",
    "group": group, "subset": subset, "metric": metric,
    "examples": 8, "shots": 4.7, "asked_shots": 5,
    "note": "chrF1|nrefs:1|version:2.6.0" if metric == "chrf1" else "",
    "scores": scores, "against_anchor": against,
  }  # fmt: skip


def text(folder, kind="composed", *, evals=(), task=None, **changes):
  """A run of `evals`: (group, subset, metric) each."""
  models = MODELS if kind in ("composed", "vanilla") else MODELS[1:]
  made = {}
  for at, (group, subset, metric) in enumerate(evals):
    gain = {"composed": 6 - at % 9, "lora": 2, "vanilla": 1}.get(kind, 3)
    values = {"augmenting": 12.0 + at % 30, "anchor": 20.0 + at % 40,
              "composed": 20.0 + at % 40 + gain}  # fmt: skip
    values = {m: values[m] for m in models}
    name, one = evaluation(folder, group, subset, metric, values)
    made[name] = one
  stage(folder, "compose")
  if kind == "composed":
    attention(folder)
  bits = {m: 1.5 - 0.1 * at for at, m in enumerate(models)}
  results = {
    "evals": made,
    "bits_per_byte": {"lij_Latn": bits, "eng_Latn": bits},
    "config": {"experiment": "text", "task": task or {}},
  }  # fmt: skip
  return save(folder, results | changes, kind)


def languages(folder, kind="composed", codes=LANGUAGES, **changes):
  """NTL: FLORES-200, some of MGSM, GSM8K in English and one language."""
  evals = [("FLORES-200", code, "chrf1") for code in codes]
  evals += [("MGSM", "de", "accuracy"), ("MGSM", "sw", "accuracy")]
  evals += [("GSM8K", "", "accuracy"), ("GSM8K", "meo", "accuracy")]
  task = {"languages": list(codes)}
  return text(folder, kind, evals=evals, task=task, **changes)


def code(folder, kind="composed", **changes):
  evals = [("HumanEval", "", "pass@1"), ("MBPP", "", "pass@1")]
  evals += [("CodeXGLUE", name, "chrf1") for name in ("python", "ruby")]
  return text(folder, kind, evals=evals, **changes)


def facts(folder, kind="composed", trained=80_000, **changes):
  evals = [(QUESTIONS, name, "accuracy") for name in ("closed", "open")]
  text(folder, kind, evals=evals, **changes)
  path = folder / "results.json"
  results = json.loads(path.read_text())
  results["parameters"]["trained"] = trained
  for entry in results["evals"].values():
    if kind == "composed":
      entry["scores"]["pasted"] = {"value": 50.0, "low": 40.0, "high": 60.0}
  path.write_text(json.dumps(results))
  return folder


def ablations(folder, kinds=("composed", "lora"), trials=2):
  """An ablations' folder of key-value runs, as `calm_jax.ablations` leaves."""
  summary = {}
  for kind in kinds:
    for trial in range(trials):
      key_values(folder / "ablations" / kind / str(trial), kind)
      path = folder / "ablations" / kind / str(trial) / "results.json"
      results = json.loads(path.read_text())
      results["config"]["output"] = f"ablations/{kind}/{trial}"
      results["table1"]["num_math"]["composed"] += trial
      path.write_text(json.dumps(results))
    spread = {"mean": 75.5, "lowest": 75.0, "highest": 76.0}
    one = {"parameters": 80_000, "difference": 0}
    summary[kind] = {"runs": [one] * trials, "scores": {"NUM-MATH": spread}}
  path = folder / "ablations" / "ablations.json"
  path.write_text(json.dumps(summary))
  return folder
