"""Mixtures of experts read from a config.json."""

from __future__ import annotations

import pytest
from golden import options

from calm_jax.core.errors import InputError
from calm_jax.models.hf import config_fields, families

MIXTRAL = options.config_json("mixtral")
QWEN3 = options.config_json("qwen3_moe")


def test_reading():
  fields = {"num_experts": 8, "experts_per_token": 2}
  counts = {"num_local_experts": 8, "num_experts_per_tok": 2}
  assert config_fields.experts(counts) == fields
  for norm in (True, False):
    read = families.from_hf(QWEN3 | {"norm_topk_prob": norm})
    assert read.normalise_experts == norm
    assert read.mlp_width == QWEN3["moe_intermediate_size"]
  assert families.from_hf(MIXTRAL).normalise_experts


@pytest.mark.parametrize(("changes", "named"), [
  ({"decoder_sparse_step": 2}, r"\[0, 2\]"),
  ({"mlp_only_layers": [1, 7]}, r"\[1\]"),
  ({"num_experts": 4, "num_local_experts": 8}, "num_experts=4 contradicts"),
  ({"num_local_experts": 0, "num_experts": None}, "num_local_experts"),
  ({"num_experts_per_tok": 99}, "num_experts_per_tok=99"),
])  # fmt: skip
def test_reading_names_what_is_wrong(changes, named):
  with pytest.raises(InputError, match=named):
    families.from_hf(QWEN3 | changes)
