"""Where the connections of a composition look."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax.composition import forward
from calm_jax.core.batch import plain_sequence
from calm_jax.core.errors import InputError
from calm_jax.parallel import processes


def cross_attention(model, ids: list[int], prompt_length: int) -> dict:
  """See `LanguageModel.cross_attention`."""
  if not model.is_composed:
    raise InputError("a single model has no cross-attention to look at")
  sequence = plain_sequence(jnp.array([ids], jnp.int32))
  rows, visible = model.beside(sequence.tokens, prompt_length)
  own = {}
  if rows is None:
    ends = jnp.full(sequence.tokens.shape, prompt_length)
    visible = {
      name: forward.visible_tokens(joined.visibility, ends.shape, ends)
      for name, joined in model.spec.augmenting
    }
  elif len(rows) > 1:
    raise InputError(
      "several augmenting models with different tokenizers cannot be looked"
      " at together: their keys are different tokens"
    )
  else:
    [(name, row)] = rows.items()
    pieces = model.tokenizers[name].pieces
    own["augmenting_tokens"] = np.array([pieces[i] for i in row.tokens[0]])
  sequence, rows, visible = jax.tree.map(np.asarray, (sequence, rows, visible))
  look = _look(model.params, model.spec, sequence, rows, visible)
  # In the order in which `states` comes to them.
  found = [(n, c) for n, a in model.spec.augmenting for c in a.connections]
  found.sort(key=lambda pair: pair[1].anchor)
  pieces = model.tokenizer.pieces if model.tokenizer else range(max(ids) + 1)
  return own | {
    "weights": np.stack([w[0] for w in processes.fetch(look)]),
    "tokens": np.array([str(pieces[i]) for i in ids]),
    "connections": np.array([f"{n}/{c.name}" for n, c in found]),
  }


@functools.partial(jax.jit, static_argnames="spec")
def _look(params, spec, sequence, rows, visible) -> list[jax.Array]:
  look: dict = {}
  forward.states(params, spec, sequence, rows, visible, look=look)
  return list(look.values())
