"""Rotary positions as transformers computes them, options read from configs."""

from __future__ import annotations

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.models import rope
from calm_jax.models.hf import rope_config

torch = pytest.importorskip(
  "torch", reason="parity is measured against torch, which is not installed"
)
transformers = pytest.importorskip(
  "transformers", reason="parity is measured against transformers"
)

SMALL = {
  "vocab_size": 11, "hidden_size": 60, "num_attention_heads": 3,
  "num_hidden_layers": 2, "max_position_embeddings": 37,
}  # fmt: skip
SHORT, LONG = [1.0, 1.25, 1.5, 2.0, 3.5], [1.5, 2.5, 4.0, 7.0, 11.0]
LENGTHS = (5, 16, 17, 37, 38, 150)


def yarn(**options):
  return {"rope_type": "yarn", "factor": 2.5} | options


# name: (family, the keys of config.json, the default share of the head).
LLAMA = {
  "default": {"rope_theta": 77.0},
  "linear": {"rope_scaling": {"type": "linear", "factor": 2.7}},
  "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.3}},
  "llama3": {
    "rope_theta": 500.0,
    "rope_scaling": {
      "rope_type": "llama3", "type": "llama3", "factor": 8.0,
      "low_freq_factor": 0.9, "high_freq_factor": 3.1,
      "original_max_position_embeddings": 16,
    },
  },
  "llama3_beside": {
    "original_max_position_embeddings": 29,
    "rope_parameters": {
      "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
      "low_freq_factor": 0.9, "high_freq_factor": 3.1,
      "original_max_position_embeddings": 16,
    },
  },
  "yarn": {"rope_scaling": yarn()},
  "yarn_original": {
    "rope_parameters": yarn(
      rope_theta=33.0, original_max_position_embeddings=16
    )
  },
  "yarn_attention": {"rope_scaling": yarn(attention_factor=0.7)},
  "yarn_mscale": {"rope_scaling": yarn(mscale=0.8, mscale_all_dim=1.3)},
  "yarn_one_mscale": {"rope_scaling": yarn(mscale=0.8)},
  "yarn_null": {"rope_scaling": yarn(mscale=0.8, mscale_all_dim=None)},
  "yarn_betas": {"rope_scaling": yarn(beta_fast=3, beta_slow=0.3)},
  "yarn_exact": {
    "rope_scaling": yarn(beta_fast=3, beta_slow=0.3, truncate=False)
  },
}  # fmt: skip
LONGROPE = {"short_factor": SHORT, "long_factor": LONG}
PHI3 = {
  "default": {"rope_scaling": None, "original_max_position_embeddings": 16},
  "partial": {"partial_rotary_factor": 0.4},
  "longrope": {
    "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16,
    "rope_theta": 55.0, "rope_scaling": {"type": "longrope", **LONGROPE},
  },
  "su": {
    "partial_rotary_factor": 0.5, "original_max_position_embeddings": 37,
    "rope_scaling": {
      "type": "su", "original_max_position_embeddings": 37, **LONGROPE,
    },
  },
  "longrope_options": {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
      "rope_type": "longrope", "partial_rotary_factor": 0.5, "factor": 2.2,
      "original_max_position_embeddings": 29, **LONGROPE,
    },
  },
  "longrope_attention": {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
      "rope_type": "longrope", "partial_rotary_factor": 0.5,
      "attention_factor": 1.9, **LONGROPE,
    },
  },
}  # fmt: skip
NEOX = {
  "default": {"hidden_size": 48},
  "older": {"rotary_pct": 0.5, "rotary_emb_base": 77},
  "newer": {
    "rope_parameters": {
      "rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.7
    }
  },
  "yarn": {"rotary_pct": 0.5, "rope_scaling": yarn(beta_fast=3)},
  "dynamic": {"rotary_pct": 0.5, "rope_scaling": yarn(rope_type="dynamic")},
}  # fmt: skip
CASES = [
  (family, name, SMALL | keys)
  for family, group in (("llama", LLAMA), ("phi3", PHI3), ("gpt_neox", NEOX))
  for name, keys in group.items()
]
MODULES = {
  "llama": ("llama", "LlamaRotaryEmbedding", None),
  "phi3": ("phi3", "Phi3RotaryEmbedding", 1.0),
  "gpt_neox": ("gpt_neox", "GPTNeoXRotaryEmbedding", 0.25),
}


def rotary(folder: str, name: str, config):
  """A fresh module of theirs: "dynamic" remembers the lengths it has seen."""
  module = getattr(transformers.models, folder)
  return getattr(getattr(module, f"modeling_{folder}"), name)(config)


def theirs(module, positions, **kw):
  x = torch.zeros(1, dtype=torch.float32)
  return [
    t.numpy() for t in module(x, torch.from_numpy(np.int64(positions)), **kw)
  ]


def assert_same(ours, expected):
  for a, b in zip(ours, expected, strict=True):
    half = b.shape[-1] // 2
    np.testing.assert_array_equal(b[..., :half], b[..., half:])
    np.testing.assert_allclose(a[:, :, 0], b[..., :half], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("family", "name", "keys"), CASES)
def test_tables(family, name, keys):
  folder, module, fraction = MODULES[family]

  def make():
    return transformers.AutoConfig.for_model(family, **copy.deepcopy(keys))

  head_dim = keys["hidden_size"] // keys["num_attention_heads"]
  # As it is on the hub, and as transformers writes it again.
  for hf in (keys, make().to_diff_dict()):
    r = rope_config.read_rope(hf, head_dim, fraction=fraction)
    for length in LENGTHS:
      positions = np.arange(length)[None]
      ours = rope.tables(r, jnp.asarray(positions), "float32")
      assert_same(ours, theirs(rotary(folder, module, make()), positions))


GEMMA3 = {
  "older": {"rope_theta": 333.0, "rope_local_base_freq": 44.0},
  "older_linear": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
  "newer": {
    "rope_parameters": {
      "full_attention": yarn(rope_theta=333.0),
      "sliding_attention": {"rope_type": "default", "rope_theta": 44.0},
    }
  },
  "newer_half": {
    "rope_parameters": {
      "full_attention": {"rope_type": "dynamic", "factor": 4.0},
      "sliding_attention": None,
    }
  },
}
THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}


@pytest.mark.parametrize("name", GEMMA3)
def test_tables_by_layer_type(name):
  keys = SMALL | GEMMA3[name] | {
    "head_dim": 22, "layer_types": ["sliding_attention", "full_attention"]
  }  # fmt: skip

  def make():
    return transformers.AutoConfig.for_model(
      "gemma3_text", **copy.deepcopy(keys)
    )

  for hf in (copy.deepcopy(keys), make().to_diff_dict()):
    ropes = rope_config.read_ropes(hf, 22, THETAS)
    assert set(ropes) == set(THETAS)
    for layer_type, r in ropes.items():
      for length in LENGTHS:
        positions = np.arange(length)[None]
        ours = rope.tables(r, jnp.asarray(positions), "float32")
        module = rotary("gemma3", "Gemma3RotaryEmbedding", make())
        assert_same(ours, theirs(module, positions, layer_type=layer_type))
