"""Mixtures of experts read from a config.json."""

from __future__ import annotations

import pytest

from calm_jax.core.errors import InputError
from calm_jax.models.hf import config_fields

MIXTRAL = {
  "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
  "intermediate_size": 14, "num_hidden_layers": 4,
}  # fmt: skip
QWEN3 = MIXTRAL | {
  "model_type": "qwen3_moe", "moe_intermediate_size": 6, "norm_topk_prob": True,
  "decoder_sparse_step": 1, "mlp_only_layers": None,
}  # fmt: skip


def test_reading():
  fields = {
    "num_experts": 8, "experts_per_token": 2, "normalise_experts": True
  }  # fmt: skip
  assert config_fields.experts(MIXTRAL) == fields
  fields["mlp_width"] = 6
  assert config_fields.experts(QWEN3) == fields
  older = {k: v for k, v in QWEN3.items() if k != "num_local_experts"}
  older |= {"num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}
  assert config_fields.experts(older) == fields
  older["norm_topk_prob"] = False
  assert config_fields.experts(older) == fields | {"normalise_experts": False}


@pytest.mark.parametrize(("changes", "named"), [
  ({"decoder_sparse_step": 2}, r"\[0, 2\]"),
  ({"mlp_only_layers": [1, 7]}, r"\[1\]"),
  ({"num_experts": 4}, r"\[4, 8\]"),
  ({"num_local_experts": None}, "num_local_experts"),
  ({"num_local_experts": 0}, "num_local_experts"),
  ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
])  # fmt: skip
def test_reading_names_what_is_wrong(changes, named):
  with pytest.raises(InputError, match=named):
    config_fields.experts(QWEN3 | changes)
