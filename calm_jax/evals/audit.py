"""The audit: which part of a composition's metrics comes from the content of
m_A's states.

It measures one trained composition on the same examples under several controls.
The content effect is the metric with the right states less that with another
example's, and is paired; what is left over is the latter less the anchor's.
Both could be had from what Θ_C itself has learnt, only the first cannot.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from calm_jax.core.errors import InputError
from calm_jax.evals import base, statistics
from calm_jax.evals.base import Judgement, Row

CORRECT, MISMATCHED, ANCHOR = "correct", "mismatched", "anchor"
LIKELIHOOD = "log-likelihood, nats per byte"


class Subject(Protocol):
  """A model, or a composition under a control."""

  def generate(
    self, prompts: list[str], max_new_tokens: int, *, stop, batch_size: int
  ) -> list[str]:
    """Continues prompts greedily."""

  def log_likelihoods(
    self, prompts: list[str], completions: list[str], batch_size: int
  ) -> list[tuple[float, int]]:
    """The log-likelihood in nats of each completion, and its bytes."""


class Measured(NamedTuple):
  """A metric as a function of the sum of examples' parts; see `statistics`."""

  parts_NS: np.ndarray
  metric: statistics.Metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditSet:
  """Examples of an audit.

  With a `judge`, which takes the answers to all prompts, answers are asked for;
  with completions, their likelihood after the prompts is measured.
  """

  prompts: list[str]
  completions: list[str] | None = None
  judge: Callable[[list[str]], Judgement] | None = None
  metric: str = "accuracy"  # of the judge
  max_new_tokens: int = 0
  stop: tuple[str, ...] = ()


def exact_match_judge(
  prompts: Sequence[str], completions: Sequence[str]
) -> Callable[[list[str]], Judgement]:
  """Returns a judge of whole answers; spaces around them do not count."""

  def judge(outputs: list[str]) -> Judgement:
    rows: list[Row] = []
    for prompt, right, made in zip(prompts, completions, outputs, strict=True):
      row = {"prompt": prompt, "completion": right, "prediction": made}
      rows.append(row | {"correct": right.strip() == made.strip()})
    return base.judge_correct(rows)

  return judge


def audit(
  examples: AuditSet, columns: Mapping[str, Sequence[Subject]], batch_size: int
) -> dict[str, dict[str, Any]]:
  """Measures one set by all columns.

  Args:
    examples: what is asked.
    columns: "correct", "mismatched", "anchor" and any others. Several draws of
      a control are averaged, example by example.
    batch_size: rows that are computed together.

  Returns:
    Of "answers" and "likelihood", as far as they are asked for, the "metric",
    the number of "examples", "scores" by column with 95% intervals, the paired
    differences "content" and "left_over", and of answers "chance": how often
    another example's right answer would be right, in percent, or None.
  """
  entries = {}
  if (judge := examples.judge) is not None:
    judged = {
      column: [judge(_answers(examples, one, batch_size)) for one in draws]
      for column, draws in columns.items()
    }
    measured = {
      column: [Measured(j.parts_NS, j.metric) for j in judgements]
      for column, judgements in judged.items()
    }
    chance = _chance(judged[CORRECT][0].rows)
    entry = _entry(examples, examples.metric, measured) | {"chance": chance}
    entries["answers"] = entry
  if (completions := examples.completions) is not None:
    texts = examples.prompts, completions
    measured = {
      column: [_likelihood(*texts, one, batch_size) for one in draws]
      for column, draws in columns.items()
    }
    entries["likelihood"] = _entry(examples, LIKELIHOOD, measured)
  return entries


def _answers(examples: AuditSet, one: Subject, batch_size: int) -> list[str]:
  return one.generate(
    examples.prompts,
    examples.max_new_tokens,
    stop=examples.stop,
    batch_size=batch_size,
  )


def _likelihood(
  prompts: list[str], completions: list[str], one: Subject, batch_size: int
) -> Measured:
  pairs = one.log_likelihoods(prompts, completions, batch_size)
  parts_N2 = np.array(pairs, np.float64)
  if not parts_N2[:, 1].all():
    raise InputError("an example of the audit has a completion of no bytes")
  return Measured(parts_N2, lambda sums: sums[..., 0] / sums[..., 1])


def _entry(
  examples: AuditSet, metric: str, measured: Mapping[str, list[Measured]]
) -> dict[str, Any]:
  mean = {
    column: Measured(np.mean([x.parts_NS for x in draws], 0), draws[0].metric)
    for column, draws in measured.items()
  }
  return {
    "metric": metric,
    "examples": len(examples.prompts),
    "scores": {column: _score(one) for column, one in mean.items()},
    "content": _difference(mean[CORRECT], mean[MISMATCHED]),
    "left_over": _difference(mean[MISMATCHED], mean[ANCHOR]),
  }


def _score(one: Measured) -> dict[str, float]:
  low, high = statistics.interval(*one)
  value = float(one.metric(one.parts_NS.sum(0)))
  return {"value": value, "low": low, "high": high}


def _difference(a: Measured, b: Measured) -> dict[str, float]:
  return statistics.compare(a.parts_NS, b.parts_NS, a.metric)._asdict()


def _chance(rows: Sequence[Row]) -> float | None:
  """Share of the pairs of examples with one right answer, in percent."""
  if len(rows) < 2 or not all("completion" in row for row in rows):
    return None
  counts = Counter(row["completion"].strip() for row in rows).values()
  pairs = sum(count * (count - 1) for count in counts)
  return 100 * pairs / (len(rows) * (len(rows) - 1))
