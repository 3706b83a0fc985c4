"""Log-likelihood of completions, for one model or a composition."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import forward
from calm_jax.composition.model import Model
from calm_jax.core.batch import Batch
from calm_jax.generation import batching
from calm_jax.generation.batching import Ids
from calm_jax.generation.replacements import Replacement
from calm_jax.parallel import processes


class Score(NamedTuple):
  """The log-likelihood of a completion."""

  logprob: float  # the sum over its tokens, in nats
  num_tokens: int
  is_greedy: bool  # whether each token is the likeliest at its place


@functools.partial(jax.jit, static_argnames="spec")
def _token_scores(params, spec, batch: Batch, targets_BL, allowed_V):
  """Log-probability of each target [B, L], and whether it is the likeliest.

  `allowed_V` are the ids of `batching.allowed_ids`, which greedy decoding picks
  among.
  """
  x_BLD, _ = forward.states(params, spec, batch)

  def row(x_and_targets):  # one row's logits at a time are held
    x_LD, targets_L = x_and_targets
    logits_LV = forward.logits(params, spec, x_LD[None])[0]
    picked_L = jnp.take_along_axis(logits_LV, targets_L[:, None], -1)[:, 0]
    logprob_L = picked_L - jax.nn.logsumexp(logits_LV, axis=-1)
    if allowed_V is not None:
      logits_LV = jnp.where(allowed_V, logits_LV, -jnp.inf)
    return logprob_L, logits_LV.argmax(-1) == targets_L

  return jax.lax.map(row, (x_BLD, targets_BL))


def score(
  model: Model,
  prompts: Ids,
  completions: Ids,
  *,
  batch_size: int = 16,
  replacement: Replacement | None = None,
) -> list[Score]:
  """Log-likelihood of token ids, which may be none, after prompts.

  `replacement` is of the states that the anchor is given.
  Raises InputError if a prompt is empty, or too long for the models.
  """
  given = batching.check_rows(model, prompts)
  learnt = batching.check_rows(
    model, completions, "completion", is_filled=False
  )
  # The last token is only predicted: the models need not read it.
  pairs = zip(given, learnt, strict=True)
  rows_of_ids = [prompt + completion[:-1] for prompt, completion in pairs]
  batching.check_rows(model, rows_of_ids)
  scores: list[Score] = [Score(0.0, 0, True)] * len(given)
  lengths = [len(prompt) for prompt in given]
  allowed_V = batching.allowed_ids(model)
  batches = batching.batches(
    model, rows_of_ids, lengths, batch_size, replacement=replacement
  )
  for chosen, batch, _ in batches:
    assert batch.prompt_ends is not None
    targets_BL = np.roll(batch.anchor.tokens, -1, axis=1)
    places = {}
    for row, i in enumerate(chosen):
      # The prompt's last token predicts the first of the completion.
      first = int(batch.prompt_ends[row, 0]) - 1
      places[row] = slice(first, first + len(learnt[i]))
      targets_BL[row, places[row]] = learnt[i]
    logprob_BL, likeliest_BL = processes.fetch(
      _token_scores(model.params, model.spec, batch, targets_BL, allowed_V)
    )
    for row, i in enumerate(chosen):
      here = places[row]
      logprob = float(logprob_BL[row, here].sum())
      is_greedy = bool(likeliest_BL[row, here].all())
      scores[i] = Score(logprob, len(learnt[i]), is_greedy)
  return scores
