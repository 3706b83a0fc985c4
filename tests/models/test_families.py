"""config.json: what is read, and what is refused rather than approximated."""

from __future__ import annotations

import dataclasses

import pytest
import transformers
from golden import cases, options

from calm_jax.errors import InputError
from calm_jax.models import families, hf
from calm_jax.models.config import ModelConfig
from calm_jax.models.rope import Rope

LLAMA = cases.CASES["gqa_untied"]


@pytest.mark.parametrize("case", cases.CASES)
def test_both_generations_of_config_json_say_the_same(case):
  # transformers 5 writes rope_parameters, and every default.
  written = families.from_hf(cases.config_json(case))
  assert written == families.from_hf(cases.CASES[case])


@pytest.mark.parametrize(("family", "case"), options.CASES)
def test_every_option_in_both_generations(family, case):
  old = options.config_json(family, case)
  settings = options.config_json(family, case)
  new = transformers.AutoConfig.for_model(
    settings.pop("model_type"), **settings
  )
  read = families.from_hf(old)
  assert families.from_hf(new.to_dict()) == read
  same = read == families.from_hf(options.config_json(family))
  inert = case == "base" or (family, case) in options.INERT - {
    ("starcoder2", "long window")
  }
  assert same == inert


@pytest.mark.parametrize("family", options.FAMILIES)
def test_defaults_are_those_of_transformers(family):
  needed = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_embd", "n_layer", "n_head", "num_experts",
    "num_local_experts",
  }  # fmt: skip
  whole = transformers.AutoConfig.for_model(family).to_dict()
  least = {k: whole[k] for k in needed & set(whole)} | {"model_type": family}
  assert families.from_hf(least) == families.from_hf(whole)


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
    rope=Rope(14, theta=5e5),
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "mamba"}, "model_type='mamba' is not supported"),
    ({"model_type": None}, "model_type=None is not supported"),
    ({"sliding_window": 64}, "sliding_window"),
    ({"rope_scaling": {"rope_type": "linear"}}, "linear.*lacks.*factor"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral'"),
    ({"rope_parameters": {"factor": 8.0}}, "factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_act": "quick_gelu"}, "'quick_gelu' is not computed"),
    ({"num_key_value_heads": 4}, "not a multiple"),
    ({"num_attention_heads": 5}, "hidden_size=48 is not a multiple"),
    ({"head_dim": 7}, "pairs of features"),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(InputError, match=message):
    families.from_hf(LLAMA | changes)


REFUSED = {
  "mistral": {"sliding_window": 0},
  "qwen2": {"layer_types": ["full_attention", "sliding_attention"] * 2},
  "qwen3": {"layer_types": ["chunked_attention"] * 4},
  "gemma": {"hidden_activation": "relu"},
  "gemma2": {"sliding_window": None},
  "gemma3_text": {"attn_logit_softcapping": 50.0},
  "gpt2": {"add_cross_attention": True},
  "gpt_neox": {"rope_theta": 77.0},
  "phi3": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
  "olmo2": {"use_bidirectional_attention": True},
  "smollm3": {"no_rope_layers": [1, 0]},
  "starcoder2": {"norm_type": "rms_norm"},
  "granite": {"partial_rotary_factor": 0.5},
  "mixtral": {"layer_types": None},
  "qwen3_moe": {"mlp_only_layers": [1]},
}  # fmt: skip


@pytest.mark.parametrize("family", options.FAMILIES)
def test_every_family_refuses_by_name(family):
  good = options.config_json(family)
  with pytest.raises(InputError, match=rf"of a {family}: .*'surprise'"):
    families.from_hf(good | {"surprise": 1})
  with pytest.raises(InputError, match=rf"of a {family} lacks .*'vocab_size'"):
    families.from_hf({k: v for k, v in good.items() if k != "vocab_size"})
  if family != "llama":
    (key,) = REFUSED[family]
    name = {"rope_scaling": "rope_type", "sliding_window": "window"}
    with pytest.raises(InputError, match=name.get(key, key)):
      families.from_hf(good | REFUSED[family])


def test_a_config_json_of_our_making_is_a_llama():
  llama = families.from_hf(LLAMA)
  assert families.from_hf(families.to_hf(llama, "float32")) == llama
  for changes in (
    {"qk_norm": "head"}, {"window": 5}, {"gated_mlp": False},
    {"output_bias": True}, {"rope": Rope(8, kind="linear", factor=2.0)},
    {"rope": None, "learned_positions": True},
  ):  # fmt: skip
    other = dataclasses.replace(llama, **changes)
    with pytest.raises(InputError, match="is not a llama"):
      families.to_hf(other, "float32")


def test_every_family_has_a_table_of_tensors():
  assert set(families.FAMILIES) == set(hf.FAMILIES) == set(options.FAMILIES)


def test_a_leaf_without_a_tensor_is_no_table():
  config = dataclasses.replace(
    families.from_hf(LLAMA), rope=None, learned_positions=True
  )
  with pytest.raises(InputError, match="position_embedding"):
    hf.entries(hf.FAMILIES["llama"], config)


def test_names_of_older_versions():
  names = hf.canonical(
    hf.FAMILIES["gpt2"], {"wte.weight": 1, "h.0.attn.bias": 2, "lm_head.x": 3}
  )
  assert names == {
    "transformer.wte.weight": 1, "transformer.h.0.attn.bias": 2, "lm_head.x": 3
  }  # fmt: skip
  assert hf.ignored(hf.FAMILIES["gpt2"], "transformer.h.0.attn.bias")
  both = {"lm_head.weight": 1, "embed_out.weight": 2}
  with pytest.raises(InputError, match=r"two tensors are embed_out\.weight"):
    hf.canonical(hf.FAMILIES["gpt_neox"], both)
