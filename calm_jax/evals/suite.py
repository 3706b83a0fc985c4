"""The evaluations that a config names, each run over several models (§4)."""

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from calm_jax.evals import statistics
from calm_jax.evals.base import Evaluation, Fits, Judgement, Prompt, Row


class TextModel(Protocol):
  """The part of `LanguageModel` that evaluations use."""

  def generate(
    self, prompts: list[str], max_new_tokens: int, *, stop, batch_size: int
  ) -> list[str]:
    """Continues prompts greedily."""


def run(
  evaluation: Evaluation,
  models: Mapping[str, TextModel],
  fits: Fits,
  batch_size: int,
) -> tuple[dict[str, Any], dict[str, list[Row]]]:
  """Evaluates models on the same prompts.

  Args:
    evaluation: made by `tasks.make`.
    models: by column of the results; the others are compared to "anchor".
    fits: whether a prompt is short enough. Where it is not, exemplars are left
      out, and then the beginning of the prompt.
    batch_size: prompts to continue together.

  Returns:
    The evaluation's entry in results.json, and the predictions by column.
  """
  fits = functools.cache(fits)
  prompts = evaluation.prompts(fits)
  shown = shown_prompts(prompts, fits)
  judged: dict[str, Judgement] = {}
  for column, model in models.items():
    outputs = model.generate(
      [prompt.text for prompt in shown],
      evaluation.max_new_tokens,
      stop=evaluation.stop,
      batch_size=batch_size,
    )
    judged[column] = evaluation.judge(shown, outputs)
  names = ("task", "group", "subset", "metric", "examples")
  entry = {name: getattr(evaluation, name) for name in names} | {
    "asked_shots": evaluation.shots,
    "shots": sum(len(p.exemplars) for p in prompts) / len(prompts),
    "prompts_cut": sum(a != b for a, b in zip(shown, prompts, strict=True)),
    "note": next(iter(judged.values())).note,
    "scores": {column: _score(one) for column, one in judged.items()},
    "against_anchor": {
      column: _against(one, judged["anchor"])
      for column, one in judged.items()
      if column != "anchor" and "anchor" in judged
    },
  }
  if measures := {c: j.measures for c, j in judged.items() if j.measures}:
    entry["measures"] = measures
  return entry, {column: one.rows for column, one in judged.items()}


def shown_prompts(prompts: list[Prompt], fits: Fits) -> list[Prompt]:
  """Cuts the beginning of prompts that do not fit."""
  return [p._replace(text=_longest_end(p.text, fits)) for p in prompts]


def groups(evals: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Averages entries of `run`, by name, over the subsets of each group.

  Returns by group the number of "subsets", the "average" by column, and
  "better" by column, Table 5's #(> m_B): on how many subsets it is strictly
  better than m_B, and with ties.
  """
  by_group: dict[str, dict[str, Mapping[str, Any]]] = {}
  for name, entry in evals.items():
    by_group.setdefault(entry["group"], {})[name] = entry
  results = {}
  for group, entries in by_group.items():
    columns = next(iter(entries.values()))["scores"]
    values = {
      column: {n: e["scores"][column]["value"] for n, e in entries.items()}
      for column in columns
    }
    results[group] = {
      "subsets": len(entries),
      "average": {c: float(np.mean([*v.values()])) for c, v in values.items()},
      "better": {
        column: statistics.count_better(v, values["anchor"])[:2]
        for column, v in values.items()
        if column != "anchor" and "anchor" in values
      },
    }
  return results


def _longest_end(prompt: str, fits: Fits) -> str:
  """The longest end of a prompt that fits."""
  if fits(prompt):
    return prompt
  low, high = 0, len(prompt)  # The end from `high` fits, from `low` it doesn't.
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(prompt[middle:]) else (middle, high)
  return prompt[high:]


def _score(judged: Judgement) -> dict[str, float]:
  low, high = statistics.interval(judged.parts_NS, judged.metric)
  return {"value": judged.value, "low": low, "high": high}


def _against(judged: Judgement, anchor: Judgement) -> dict[str, float]:
  parts = judged.parts_NS, anchor.parts_NS
  return statistics.compare(*parts, judged.metric)._asdict()
