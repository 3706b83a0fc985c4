"""A small local task of each kind, for lm-evaluation-harness."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

TASKS = ("tiny_choice", "tiny_rolling", "tiny_generate")
_HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}, cache_dir: "{cache}"}}
test_split: test
"""
_BODY = {
  "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{target}}"
metric_list: [{metric: acc}]
""",
  "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
  "tiny_generate": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: ""
generation_kwargs: OPTIONS
metric_list: [{metric: exact_match}]
""",
}


def write(folder: pathlib.Path, docs: dict[str, list], options: dict) -> str:
  """Writes the tasks of `docs`, by name; what include_path is to be."""
  for name, rows in docs.items():
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = _HEAD.format(name=name, data=data, cache=folder / "cache")
    body = _BODY[name].replace("OPTIONS", json.dumps(options))
    (folder / f"{name}.yaml").write_text(head + body)
  return str(folder)


def evaluate(
  include_path: str, tasks: Sequence[str], model, **settings
) -> dict[str, list]:
  """By task what a model answers, in the order of the documents."""
  import lm_eval
  from lm_eval.tasks import TaskManager

  results = lm_eval.simple_evaluate(
    model,
    tasks=list(tasks),
    task_manager=TaskManager(include_path=include_path, include_defaults=False),
    bootstrap_iters=0,
    **settings,
  )
  return {
    name: [
      sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])
    ]
    for name, samples in results["samples"].items()
  }


def evaluate_hf(
  include_path: str,
  tasks: Sequence[str],
  folder,
  rows: int = 1,
  settings: dict | None = None,
  **model_args,
) -> dict[str, list]:
  """`evaluate` of the harness's own model of a checkpoint, `rows` at once."""
  model_args = {"pretrained": str(folder), "dtype": "float32"} | model_args
  settings = settings or {}
  settings |= {"model_args": model_args, "device": "cpu", "batch_size": rows}
  return evaluate(include_path, tasks, "hf", **settings)
