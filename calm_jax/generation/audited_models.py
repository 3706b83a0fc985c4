"""A composition under each control of an audit, beside the models it joins."""

import dataclasses
from collections.abc import Sequence

from calm_jax.composition.connections import Composition
from calm_jax.composition.model import AnyModel, Model
from calm_jax.core.errors import InputError
from calm_jax.generation import replacements, text
from calm_jax.generation.replacements import Replacement


@dataclasses.dataclass(frozen=True)
class AuditedModel:
  """A model that answers and scores under a replacement, if there is one."""

  model: Model
  replacement: Replacement | None = None

  def generate(
    self, prompts: list[str], max_new_tokens: int, *, stop, batch_size: int
  ) -> list[str]:
    """Continues prompts greedily; see `text.generate`."""
    return text.generate(
      self.model,
      prompts,
      max_new_tokens,
      stop=stop,
      batch_size=batch_size,
      replacement=self.replacement,
    )

  def log_likelihoods(
    self, prompts: Sequence[str], completions: Sequence[str], batch_size: int
  ) -> list[tuple[float, int]]:
    """The log-likelihood in nats of each completion, and its bytes."""
    scores = text.score(
      self.model,
      prompts,
      completions,
      batch_size=batch_size,
      replacement=self.replacement,
    )
    tokenizer = self.model.text()
    pairs = zip(prompts, completions, strict=True)
    sizes = [text.spelled_bytes(tokenizer, *pair) for pair in pairs]
    return [(s.logprob, n) for s, n in zip(scores, sizes, strict=True)]


def columns(
  model: AnyModel, draws: int, seed: int
) -> dict[str, list[AuditedModel]]:
  """Returns what an audit compares, by column; "mismatched" has several draws.

  "correct" are m_A's own states, also where the composition was trained under
  a static control. Raises InputError if the model is no composition.
  """
  if not model.is_composed:
    raise InputError("only a composition can be audited; this is one model")
  joined = tuple(
    (name, dataclasses.replace(a, control="none"))
    for name, a in model.spec.augmenting
  )
  spec = Composition(model.spec.anchor, joined)
  if spec != model.spec:
    model = dataclasses.replace(model, spec=spec)
  made = {
    name: [AuditedModel(model, one) for one in several]
    for name, several in replacements.controls(spec, draws, seed).items()
  }
  parts = ["anchor", *(f"augmenting/{name}" for name, _ in joined)]
  return made | {part: [AuditedModel(model.part(part))] for part in parts}
