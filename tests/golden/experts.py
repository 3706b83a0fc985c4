"""Cases of families with mixtures of experts, for `golden/options.py`.

Of the form of `options.FAMILIES`: {family: (base, {case: changes})}.
"""

from __future__ import annotations

BASE = {
  "vocab_size": 61, "hidden_size": 48, "intermediate_size": 40,
  "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
  "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
  "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_SHARED = {
  "tied": {"tie_word_embeddings": True}, "head_dim": {"head_dim": 14},
  "relu": {"hidden_act": "relu"}, "rope_theta": {"rope_theta": 300.0},
  "one expert a token": {"num_experts_per_tok": 1},
  "yarn": {
    "head_dim": 8,  # without it transformers fails
    "rope_scaling": {
      "rope_type": "yarn", "factor": 4.0,
      "original_max_position_embeddings": 16,
    }
  },
}  # fmt: skip
FAMILIES = {
  "mixtral": (BASE | {"num_local_experts": 5, "num_experts_per_tok": 2}, {
    "window": {"sliding_window": 5},
    "all experts": {"num_experts_per_tok": 5},
    "more experts": {"num_local_experts": 37},
    "jitter": {"router_jitter_noise": 0.1},
    **_SHARED,
  }),
  "qwen3_moe": (BASE | {
    "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "head_dim": 10, "sliding_window": 5,
  }, {
    "norm_topk_prob": {"norm_topk_prob": True},
    "attention_bias": {"attention_bias": True},
    "windows": {"use_sliding_window": True},
    "all experts": {"num_experts_per_tok": 7},
    "experts everywhere": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "width of the dense": {"intermediate_size": 24},
    **_SHARED,
  }),
}  # fmt: skip
# What changes no logits.
INERT = {
  ("mixtral", "jitter"), ("qwen3_moe", "experts everywhere"),
  ("qwen3_moe", "width of the dense"),
}  # fmt: skip
