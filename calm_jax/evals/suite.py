"""The evaluations that a config names, each run over several models (§4)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from calm_jax.evals import statistics
from calm_jax.evals.base import Outcome
from calm_jax.evals.tasks import Evaluation, Fits, Rows, score


class Model(Protocol):
  """What an evaluation asks of a model."""

  def generate(
    self,
    prompts: list[str],
    max_new_tokens: int,
    *,
    stop: Sequence[str],
    batch_size: int,
  ) -> list[str]:
    """The continuations of prompts, greedily."""


def run(
  evaluation: Evaluation,
  models: Mapping[str, Model],
  fits: Fits,
  batch_size: int,
) -> tuple[dict[str, Any], dict[str, Rows]]:
  """Evaluates models on the same prompts.

  Args:
    evaluation: of `make`.
    models: by column of the results; the others are compared to "anchor".
    fits: whether a prompt is short enough. Where it is not, exemplars are left
      out, and then the beginning of the prompt.
    batch_size: rows that are generated together.

  Returns:
    What results.json holds of an evaluation, and the predictions by column,
    each with its "score" in percent.
  """
  fits = functools.cache(fits)  # The prompts are the same for all.
  shown: dict[str, str] = {}
  outcomes: dict[str, Outcome] = {}
  for column, model in models.items():

    def generate(prompts: list[str], model=model) -> list[str]:
      shown.update({p: _end_of(p, fits) for p in prompts})
      return model.generate(
        [shown[p] for p in prompts],
        evaluation.max_new_tokens,
        stop=evaluation.stop,
        batch_size=batch_size,
      )

    outcomes[column] = evaluation.run(generate, fits)
  judged = {c: evaluation.judged(o.rows) for c, o in outcomes.items()}
  scores = {
    column: _with_interval(outcomes[column].metrics[evaluation.metric], *both)
    for column, both in judged.items()
  }
  first = next(iter(outcomes.values()))
  return {
    "task": evaluation.task,
    "group": evaluation.group,
    "subset": evaluation.subset,
    "metric": evaluation.metric,
    "examples": evaluation.examples,
    "asked_shots": evaluation.shots,
    "shots": first.metrics.get("shots", float(evaluation.shots)),
    "prompts_cut": sum(shown[r["prompt"]] != r["prompt"] for r in first.rows),
    "note": first.notes.get(evaluation.metric, ""),
    "scores": scores,
    "against_anchor": {
      column: dataclasses.asdict(
        statistics.compare(parts, judged["anchor"][0], of)
      )
      for column, (parts, of) in judged.items()
      if column != "anchor" and "anchor" in judged
    },
  }, {
    column: [
      row | {"prompt": shown[row["prompt"]], "score": score(row)}
      for row in outcome.rows
    ]
    for column, outcome in outcomes.items()
  }


def groups(evals: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Averages over the subsets of a group, and Table 5's #(> m_B).

  Args:
    evals: entries of `run` by name.

  Returns:
    By group "subsets", their number, "average" by column, and "better" by
    column: on how many it is strictly better than m_B, and with ties.
  """
  by_group: dict[str, dict[str, Mapping[str, Any]]] = {}
  for name, entry in evals.items():
    by_group.setdefault(entry["group"], {})[name] = entry
  found = {}
  for group, entries in by_group.items():
    columns = next(iter(entries.values()))["scores"]
    values = {
      column: {n: e["scores"][column]["value"] for n, e in entries.items()}
      for column in columns
    }
    found[group] = {
      "subsets": len(entries),
      "average": {c: float(np.mean([*v.values()])) for c, v in values.items()},
      "better": {
        column: statistics.count_better(v, values["anchor"])[:2]
        for column, v in values.items()
        if column != "anchor" and "anchor" in values
      },
    }
  return found


def _end_of(prompt: str, fits: Fits) -> str:
  """The longest end of a prompt that fits."""
  if fits(prompt):
    return prompt
  low, high = 0, len(prompt)  # The end from `high` fits, from `low` it doesn't.
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(prompt[middle:]) else (middle, high)
  return prompt[high:]


def _with_interval(value: float, parts, metric) -> dict[str, float]:
  low, high = statistics.interval(parts, metric)
  return {"value": value, "low": low, "high": high}
