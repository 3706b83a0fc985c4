"""Attention maps: the weights of a composition's cross-attentions on a text."""

import functools

import jax
import numpy as np

from calm_jax.composition import forward
from calm_jax.composition.model import Model
from calm_jax.core.errors import InputError
from calm_jax.generation import batching
from calm_jax.parallel import processes

_attention_weights = functools.partial(jax.jit, static_argnames="spec")(
  forward.attention_weights
)


def cross_attention(
  model: Model, ids: list[int], prompt_length: int
) -> dict[str, np.ndarray]:
  """Attention weights of each connection, for one sequence of token ids.

  Its first `prompt_length` are the prompt, all that visibility="encoder"
  shows. `figures.attention_figure` draws them.

  Returns:
    "weights" float32 [C, N, L, M], "tokens" [L] their pieces (or ids that
    have none), "connections" [C] their names, and "augmenting_tokens" [M]
    where the augmenting model's are others.

  Raises:
    InputError: this is not a composition, or one of several augmenting models
      with different tokenizers.
  """
  if not model.is_composed:
    raise InputError("a single model has no cross-attention to look at")
  if model.tokenizers and len(model.spec.augmenting) > 1:
    raise InputError(
      "several augmenting models with different tokenizers cannot be looked"
      " at together: their keys are different tokens"
    )
  batch = batching.token_batch(model, np.array([ids]), prompt_length)
  weights = processes.fetch(_attention_weights(model.params, model.spec, batch))
  pieces = model.tokenizer.pieces if model.tokenizer else ()
  maps = {
    "weights": np.stack([weights_BNLM[0] for weights_BNLM in weights]),
    "tokens": np.array([pieces[i] if i < len(pieces) else str(i) for i in ids]),
    "connections": np.array(
      [f"{name}/{c.name}" for name, c in model.spec.connections()]
    ),
  }
  for name, tokenizer in model.tokenizers.items():
    ids_M = batch.augmenting[name].tokens[0]
    maps["augmenting_tokens"] = np.array([tokenizer.pieces[i] for i in ids_M])
  return maps
