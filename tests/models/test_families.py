"""config.json: what is read, and what is refused rather than approximated."""

from __future__ import annotations

import pytest
from golden import cases

from calm_jax.errors import InputError
from calm_jax.models import families, hf
from calm_jax.models.config import ModelConfig

LLAMA = cases.CASES["gqa_untied"]


@pytest.mark.parametrize("case", cases.CASES)
def test_both_generations_of_config_json_say_the_same(case):
  # transformers 5 writes rope_parameters, and every default.
  written = families.from_hf(cases.config_json(case))
  assert written == families.from_hf(cases.CASES[case])


def test_fields():
  read = families.from_hf(LLAMA | {"head_dim": 14, "rope_theta": 5e5})
  assert read == ModelConfig(
    vocab_size=131,
    width=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=14,
    mlp_width=88,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=5e5,
  )


def test_defaults_are_those_of_transformers():
  needed = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads",
  )  # fmt: skip
  read = families.from_hf({k: LLAMA[k] for k in needed})
  assert (read.num_kv_heads, read.head_dim, read.norm_eps) == (6, 8, 1e-6)
  assert (read.rope_theta, read.max_length) == (1e4, 2048)
  assert (read.tie_embeddings, read.attention_bias) == (False, False)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "mamba"}, "model_type='mamba' is not supported"),
    ({"model_type": None}, "model_type=None is not supported"),
    ({"sliding_window": 64}, "sliding_window"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='default'"),
    ({"rope_parameters": {"factor": 8.0}}, "factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"num_key_value_heads": 4}, "not a multiple"),
    ({"head_dim": 7}, "odd"),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(InputError, match=message):
    families.from_hf(LLAMA | changes)


def test_names_a_missing_key():
  without = {k: v for k, v in LLAMA.items() if k != "hidden_size"}
  with pytest.raises(InputError, match="lacks the key 'hidden_size'"):
    families.from_hf(without)


def test_every_family_has_a_table_of_tensors():
  assert set(families.FAMILIES) == set(hf.FAMILIES)
