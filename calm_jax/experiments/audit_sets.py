"""The sets of examples that the audit of a run's composition measures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated

from calm_jax.core.typed_fields import Count, Range
from calm_jax.data import documents
from calm_jax.data.examples import TextExample
from calm_jax.evals import suite
from calm_jax.evals.audit import AuditSet
from calm_jax.evals.base import Evaluation, Fits
from calm_jax.generation import batching
from calm_jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class AuditOptions:
  """The size of an audit."""

  examples: Annotated[int, Range()] = 128  # of a set at most; 0 for no audit
  draws: Count = 3  # of other examples' states
  # Names or patterns of the config's evaluations that are asked; none for the
  # likelihood of held-out text alone.
  evals: tuple[str, ...] = ("*",)
  batch_size: Count = 64  # rows, of which states of others are drawn


def evaluation_set(evaluation: Evaluation, fits: Fits) -> AuditSet | None:
  """Returns the prompts of an evaluation of the suite, and its judge; None if
  all are the same, so that there are no other examples."""
  shown = suite.shown_prompts(evaluation.prompts(fits), fits)
  if len({prompt.text for prompt in shown}) == 1:
    return None
  return AuditSet(
    prompts=[prompt.text for prompt in shown],
    judge=lambda outputs: evaluation.judge(shown, outputs),
    metric=evaluation.metric,
    max_new_tokens=evaluation.max_new_tokens,
    stop=evaluation.stop,
  )


def held_out_sets(
  held_out: Mapping[str, Sequence[TextExample]],
  model: LanguageModel,
  length: int,
  limit: int,
) -> dict[str, AuditSet]:
  """Returns evenly spaced examples of each set, cut to `length` tokens.

  Sets with fewer than two examples are left out: they have no others.
  """
  sets = {}
  for name, examples in held_out.items():
    step = max(1, len(examples) // limit)
    pairs = [_cut(model, e, length) for e in examples[::step][:limit]]
    pairs = [pair for pair in pairs if pair[1].strip()]
    if len(set(pairs)) > 1:
      prompts, completions = map(list, zip(*pairs, strict=True))
      sets[name] = AuditSet(prompts=prompts, completions=completions)
  return sets


def _cut(
  model: LanguageModel, example: TextExample, length: int
) -> tuple[str, str]:
  """Returns a prompt and as much of its completion as all models read.

  Where a model has no BOS, the first character of plain text is given.
  """
  prompt, completion = documents.texts(example, model.text())
  tokenizers = [model.text(), *model.tokenizers.values()]
  if not prompt and any(t.bos_id is None for t in tokenizers):
    prompt, completion = completion[:1], completion[1:]
  given, new = model.text().encode_pair(prompt, completion)
  ids = (given + new)[:length]
  count = batching.num_readable(model, ids, len(given)) - len(given)
  if count >= len(new):
    return prompt, completion
  text = model.text().decode_continuation(given, new[: max(count, 0)])
  return prompt, text.rstrip("\ufffd")
