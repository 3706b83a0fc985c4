"""Visible counts of every case, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from calm_jax.composition.visibility import visible_counts
from calm_jax.core.batch import Batch, plain_batch, plain_sequence
from calm_jax.core.errors import InputError

# Two texts of 3 and 2 tokens, packed, and padding; prompts of 2 and 1.
ENDS = np.array([[2, 2, 2, 4, 4, 0]])
PACKED = plain_batch(np.zeros((1, 6), np.int32))._replace(prompt_ends=ENDS)
EVERYTHING = np.iinfo(np.int32).max


def counts(visibility, batch, first_slot=0):
  return visible_counts(visibility, batch, "kv", first_slot).tolist()


def test_the_same_tokens():
  assert counts("causal", PACKED) == [[1, 2, 3, 4, 5, 6]]
  assert counts("encoder", PACKED) == [[1, 2, 2, 4, 4, 0]]
  assert counts("unmasked", PACKED) == [[EVERYTHING] * 6]


def test_other_tokens():
  """Each text has four tokens of its own, of which the prompt shows some."""
  batch = PACKED._replace(
    augmenting={"kv": plain_sequence(np.zeros((1, 8), np.int32))},
    visible={"kv": np.array([[1, 2, 4, 5, 8, 0]])},
  )
  assert counts("causal", batch) == [[1, 2, 4, 5, 8, 0]]
  assert counts("encoder", batch) == [[1, 2, 2, 5, 5, 0]]
  assert counts("unmasked", batch) == [[EVERYTHING] * 6]


def test_from_a_slot_of_a_cache():
  batch = plain_batch(np.zeros((1, 3), np.int32))
  assert counts("causal", batch, 5) == [[6, 7, 8]]
  batch = batch._replace(prompt_ends=np.array([[7, 7, 7]]))
  assert counts("encoder", batch, 5) == [[6, 7, 7]]


def test_a_model_that_reads_nothing_new_is_seen_as_far_as_it_has_read():
  token = plain_sequence(np.zeros((1, 1), np.int32))
  nothing = plain_sequence(np.zeros((1, 0), np.int32))
  batch = Batch(token, {"kv": nothing}, {})
  for visibility in ("causal", "encoder", "unmasked"):
    assert counts(visibility, batch, 9) == [[EVERYTHING]]


def test_an_encoder_needs_to_know_the_prompt():
  with pytest.raises(InputError, match="where prompts end"):
    counts("encoder", PACKED._replace(prompt_ends=None))
