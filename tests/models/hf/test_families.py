"""config.json: what is read, and what is refused rather than approximated."""

from __future__ import annotations

import dataclasses

import helpers
import jax
import numpy as np
import pytest
import transformers
from golden import cases, options
from safetensors.numpy import load_file, save_file

from calm_jax.core.errors import InputError
from calm_jax.models import decoder
from calm_jax.models.config import ModelConfig
from calm_jax.models.hf import families, leaves, loading, tensor_tables
from calm_jax.models.rope import Rope

LLAMA = cases.CASES["gqa_untied"]


@pytest.mark.parametrize("case", cases.CASES)
def test_both_generations_of_config_json_say_the_same(case):
  # transformers 5 writes rope_parameters, and every default.
  written = families.from_hf(cases.config_json(case))
  assert written == families.from_hf(cases.CASES[case])


@helpers.transformers_5
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


@helpers.transformers_5
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
    ({"model_type": "mamba"}, "model_type='mamba' is none of"),
    ({"model_type": None}, "model_type=None is none of"),
    ({"sliding_window": 63}, "sliding_window"),
    ({"rope_scaling": {"rope_type": "linear"}}, "linear.*lacks.*factor"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral'"),
    ({"rope_parameters": {"full_attention": {}}}, "full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_act": "quick_gelu"}, "'quick_gelu' is none of"),
    ({"num_key_value_heads": 4}, "not a multiple"),
    ({"num_attention_heads": 5}, "hidden_size=48 is not a multiple"),
    ({"head_dim": 7}, "pairs of features"),
    ({"vocab_size": "131"}, "vocab_size='131' must be a whole number, 1 or"),
    ({"num_attention_heads": 0}, "num_attention_heads=0 must be"),
    ({"head_dim": 8.0}, "head_dim=8.0 must be"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear' is no mapping"),
    ({"rms_norm_eps": True}, "norm_eps=True is no float"),
    ({"mlp_bias": 1}, "mlp_bias=1 is no bool"),
  ],
)
def test_refuses(changes, message):
  with pytest.raises(InputError, match=message):
    families.from_hf(LLAMA | changes)


REFUSED = {
  "mistral": {"sliding_window": 0},
  "ministral": {"layer_types": ["chunked_attention"] * 4},
  "ministral3": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
  "qwen2": {"layer_types": ["full_attention", "sliding_attention"] * 2},
  "qwen3": {"layer_types": ["chunked_attention"] * 4},
  "gemma": {"hidden_activation": "relu"},
  "gemma2": {"sliding_window": None},
  "gemma3_text": {"attn_logit_softcapping": 50.0},
  "gpt2": {"add_cross_attention": True},
  "gpt_neox": {"rope_scaling": {"rope_type": "longer", "factor": 2.0}},
  "phi3": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
  "olmo2": {"is_causal": False},
  "olmo3": {"sliding_window": None},
  "smollm3": {"no_rope_layers": [1, 0]},
  "starcoder2": {"attention_chunk_size": 8},
  "granite": {"partial_rotary_factor": 0.5},
  "exaone4": {"sliding_window_pattern": "LG"},
  "seed_oss": {"partial_rotary_factor": 0.5},
  "glm": {"sliding_window": 5},
  "glm4": {"rope_scaling": {"rope_type": "longer", "factor": 2.0}},
  "helium": {"attention_chunk_size": 8},
  "ernie4_5": {"partial_rotary_factor": 0.5},
  "arcee": {"is_causal": False},
  "mixtral": {"layer_types": ["sliding_attention"] * 4},
  "qwen3_moe": {"mlp_only_layers": [1]},
}  # fmt: skip


@pytest.mark.parametrize("family", options.FAMILIES)
def test_every_family_refuses_by_name(family):
  good = options.config_json(family)
  with pytest.warns(UserWarning, match=rf"of a {family} .* over: surprise"):
    assert families.from_hf(good | {"surprise": 1}) == families.from_hf(good)
  with pytest.raises(InputError, match=rf"of a {family} lacks .*'vocab_size'"):
    families.from_hf({k: v for k, v in good.items() if k != "vocab_size"})
  if family != "llama":
    (key,) = REFUSED[family]
    name = {
      "rope_scaling": "rope_type", "sliding_window": "window",
      "rope_parameters": "llama_4_scaling_beta",
    }  # fmt: skip
    with pytest.raises(InputError, match=name.get(key, key)):
      families.from_hf(good | REFUSED[family])


def test_both_spellings_of_neox():
  own = options.config_json("gpt_neox") | {
    "rotary_emb_base": 77.0, "rotary_pct": 0.5
  }  # fmt: skip
  both = own | {"rope_theta": 77.0, "partial_rotary_factor": 0.5}
  assert families.from_hf(both) == families.from_hf(own)
  with pytest.raises(InputError, match="several values"):
    families.from_hf(both | {"rope_theta": 78.0})


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
  assert (
    set(families.FAMILIES)
    == set(tensor_tables.FAMILIES)
    == set(options.FAMILIES)
  )


def test_a_leaf_without_a_tensor_is_no_table():
  config = dataclasses.replace(
    families.from_hf(LLAMA), rope=None, learned_positions=True
  )
  with pytest.raises(InputError, match="position_embedding"):
    tensor_tables.entries(tensor_tables.FAMILIES["llama"], config)


def test_the_first_release_of_gpt2(tmp_path):
  # No prefix, and the causal mask among the weights.
  config_json, shapes, _ = options.golden("gpt2")
  config = families.from_hf(config_json)
  folder = options.write(tmp_path / "new", config_json, shapes)
  new = loading.load_params(folder, config)
  old = {
    name.removeprefix("transformer."): value
    for name, value in load_file(folder / "model.safetensors").items()
  }
  old["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
  folder = options.write(tmp_path / "old", config_json, {})
  save_file(old, folder / "model.safetensors")
  jax.tree.map(
    np.testing.assert_array_equal, loading.load_params(folder, config), new
  )


def test_parts_of_a_leaf_may_end_within_heads():
  config = families.from_hf(options.config_json("gpt_neox"))
  entries = tensor_tables.entries(tensor_tables.FAMILIES["gpt_neox"], config)
  name = "gpt_neox.layers.2.attention.query_key_value.bias"
  block = np.zeros((1, 12), np.float32)
  query = [e for e in entries[name] if e.leaf.endswith("query/bias")]
  found = leaves.reads({name: None}, query, block, (2, 10))
  regions = [(slice(26, 32),), (slice(48, 54),)]
  assert [read.region for read in found] == regions


def test_one_program_for_layers_of_all_kinds():
  def program(layers):
    config = families.from_hf(
      options.config_json("gemma3_text") | {"num_hidden_layers": layers}
    )
    rows = helpers.rows([np.arange(9)], length=9)
    shapes = decoder.param_shapes(config)
    lowered = helpers.decode_rows.lower(shapes, config, rows)
    return len(lowered.as_text().splitlines())

  assert program(4) == program(24)


def test_names_of_older_versions():
  names = tensor_tables.canonical(
    tensor_tables.FAMILIES["gpt2"],
    {"wte.weight": 1, "h.0.attn.bias": 2, "lm_head.x": 3},
  )
  assert names == {
    "transformer.wte.weight": 1, "transformer.h.0.attn.bias": 2, "lm_head.x": 3
  }  # fmt: skip
  assert tensor_tables.FAMILIES["gpt2"].is_ignored("transformer.h.0.attn.bias")
  both = {"lm_head.weight": 1, "embed_out.weight": 2}
  with pytest.raises(InputError, match=r"two tensors are embed_out\.weight"):
    tensor_tables.canonical(tensor_tables.FAMILIES["gpt_neox"], both)
