"""Keys of config.json: what transformers reads, what official models and tools
write, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
import re
import warnings

import helpers
import pytest
import transformers_reads
from golden import cases, options
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from calm_jax import compose, load_composed, load_model
from calm_jax.core import hub
from calm_jax.core.errors import InputError
from calm_jax.models.hf import config_keys, families, rope_config, weight_files

# Names that transformers' code reads of a config and no file gives: methods of
# mappings, and attributes of its own; and those of the vision tower of Gemma 3.
_NO_KEYS = {
  "__class__", "_post_init_done", "get", "items", "pop", "setdefault",
  "default_theta",
  "convert_rope_params_to_dict", "standardize_rope_params", "validate_rope",
  "sub_configs_defaults", "number_of_conv_states", "vision_config",
  "image_size", "patch_size", "mm_tokens_per_image", "layer_norm_eps",
}  # fmt: skip


def from_hf(config):
  """Reads a config.json; returns it and the text of warnings."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    read = families.from_hf(config)
  return read, " ".join(str(warning.message) for warning in caught)


@helpers.transformers_5
@pytest.mark.parametrize("family", options.FAMILIES)
def test_what_transformers_reads_is_computed_refused_or_no_arithmetic(family):
  table = families.FAMILIES[family]
  refused = config_keys.REFUSED | table.only
  judged = table.computed() | refused.keys() | table.aliases.keys()
  if family == "gpt2":  # its learned positions take no options
    judged = judged | rope_config.KEYS | {"head_dim"}
  read = transformers_reads.keys(family)
  left = {k for k in read - judged if not config_keys.SILENT.fullmatch(k)}
  assert left - _NO_KEYS == set(), "judge these keys in config_keys.py"
  assert table.only.keys() <= read
  assert table.aliases == transformers_reads.aliases(family)


@helpers.transformers_5
@pytest.mark.parametrize("family", options.FAMILIES)
def test_null_is_a_value_where_it_is_one_in_transformers(family):
  table = families.FAMILIES[family]
  meant = transformers_reads.nullable(family) & table.computed()
  assert meant <= config_keys._NULLABLE


def test_rotary_options_that_transformers_reads():
  kinds = rope_config._OPTIONS.values()
  known = rope_config._COMMON.union(*(n + a for n, a in kinds))
  assert transformers_reads.rope_options() <= known


# The keys of official checkpoints beside those of `_PLAIN`; (family, keys, and
# after a semicolon those that transformers does not read).
_PLAIN = (
  "architectures bos_token_id eos_token_id hidden_act hidden_size "
  "initializer_range intermediate_size max_position_embeddings model_type "
  "num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps "
  "tie_word_embeddings torch_dtype transformers_version use_cache vocab_size"
)
_ROPE = "rope_scaling rope_theta"
_LLAMA3 = f"attention_bias attention_dropout pretraining_tp {_ROPE}"
_QWEN = f"attention_dropout sliding_window use_sliding_window {_ROPE}"
_GEMMA = f"attention_bias attention_dropout head_dim pad_token_id {_ROPE}"
_GEMMA2 = (
  f"{_GEMMA} attn_logit_softcapping final_logit_softcapping sliding_window "
  "hidden_activation query_pre_attn_scalar"
)
_PHI3 = (
  f"attention_dropout embd_pdrop original_max_position_embeddings pad_token_id "
  f"resid_pdrop sliding_window {_ROPE}"
)
_GPT2 = (
  "activation_function architectures attn_pdrop bos_token_id embd_pdrop "
  "eos_token_id initializer_range layer_norm_epsilon model_type n_embd n_head "
  "n_layer n_positions resid_pdrop summary_activation summary_first_dropout "
  "summary_proj_to_labels summary_type summary_use_proj vocab_size"
)
_NEOX = (
  "layer_norm_eps rotary_emb_base rotary_pct use_parallel_residual "
  "-rms_norm_eps -num_key_value_heads"
)
_MIXTRAL = (
  f"attention_dropout num_experts_per_tok num_local_experts sliding_window "
  f"output_router_logits router_aux_loss_coef {_ROPE}"
)
OFFICIAL = {
  "Llama 1": ("llama", "pad_token_id; max_sequence_length"),
  "Llama 2": ("llama", f"_name_or_path pretraining_tp {_ROPE}"),
  "Code Llama": ("llama", f"pad_token_id pretraining_tp {_ROPE}"),
  "Llama 3": ("llama", _LLAMA3),
  "Llama 3.1, 3.3": ("llama", f"mlp_bias {_LLAMA3}"),
  "Llama 3.2": ("llama", f"head_dim mlp_bias {_LLAMA3}"),
  "SmolLM 1, 2": ("llama", f"{_LLAMA3}; is_llama_config rope_interleaved "
                  "transformers.js_config"),
  "Mistral 7B v0.1": ("mistral", "sliding_window rope_theta"),
  "Mistral 7B v0.3": ("mistral", "attention_dropout sliding_window rope_theta"),
  "Mistral NeMo": ("mistral", "attention_dropout head_dim sliding_window "
                   "rope_theta"),
  "Ministral": ("ministral", "attention_dropout head_dim layer_types "
                "sliding_window rope_theta"),
  "Ministral 3": ("ministral3", "attention_dropout head_dim rope_parameters "
                  "sliding_window"),
  "Qwen2": ("qwen2", f"max_window_layers {_QWEN}"),
  "Qwen2.5": ("qwen2", f"max_window_layers {_QWEN}; use_mrope"),
  "Qwen2.5 1M": ("qwen2", f"max_window_layers {_QWEN}; "
                 "dual_chunk_attention_config"),
  "Qwen3": ("qwen3", f"attention_bias head_dim max_window_layers {_QWEN}"),
  "Gemma": ("gemma", _GEMMA),
  "CodeGemma": ("gemma", f"hidden_activation {_GEMMA}"),
  "Gemma 2": ("gemma2", f"{_GEMMA2}; hidden_act cache_implementation "
              "sliding_window_size"),
  "Gemma 3 1B": ("gemma3_text", f"rope_local_base_freq sliding_window_pattern "
                 f"{_GEMMA2} -hidden_act; cache_implementation"),
  "Gemma 3 270M": ("gemma3_text", "_sliding_window_pattern layer_types "
                   "rope_local_base_freq use_bidirectional_attention "
                   f"{_GEMMA2} -hidden_act"),
  "GPT-2": ("gpt2", f"={_GPT2}; n_ctx task_specific_params"),
  "GPT-2 medium, large": ("gpt2", f"={_GPT2}; n_ctx n_special "
                          "predict_special_tokens task_specific_params"),
  "GPT-2 XL": ("gpt2", f"={_GPT2}; n_ctx output_past task_specific_params"),
  "DistilGPT-2": ("gpt2", f"={_GPT2} id2label label2id; _num_labels n_ctx "
                  "task_specific_params"),
  "Pythia": ("gpt_neox", _NEOX),
  "GPT-NeoX-20B": ("gpt_neox", f"{_NEOX}; attention_probs_dropout_prob "
                   "hidden_dropout_prob"),
  "Polyglot-Ko": ("gpt_neox", f"{_NEOX}; num_steps"),
  "Phi-3 4k": ("phi3", f"_name_or_path {_PHI3}; attention_bias auto_map"),
  "Phi-4": ("phi3", f"{_PHI3}; attention_bias auto_map"),
  "Phi-4-mini": ("phi3", f"partial_rotary_factor {_PHI3}; attention_bias "
                 "auto_map full_attn_mod interpolate_factor lm_head_bias "
                 "mlp_bias"),
  "OLMo 2": ("olmo2", f"attention_bias attention_dropout pad_token_id {_ROPE}"),
  "OLMo 3": ("olmo3", "attention_bias attention_dropout layer_types "
             f"pad_token_id sliding_window {_ROPE}"),
  "SmolLM3": ("smollm3", "attention_bias layer_types mlp_bias no_rope_layers "
              f"no_rope_layer_interval pad_token_id pretraining_tp {_QWEN}; "
              "max_window_layers"),
  "StarCoder2": ("starcoder2", "attention_dropout embedding_dropout "
                 "norm_epsilon residual_dropout rope_theta sliding_window "
                 "use_bias -rms_norm_eps; layer_norm_epsilon mlp_type "
                 "norm_type"),
  "Granite 3": ("granite", "attention_bias attention_dropout "
                "attention_multiplier embedding_multiplier logits_scaling "
                f"mlp_bias pad_token_id residual_multiplier {_ROPE}"),
  "EXAONE 4": ("exaone4", "attention_dropout layer_types sliding_window "
               f"sliding_window_pattern {_ROPE}"),
  "Seed-OSS": ("seed_oss", "attention_bias attention_dropout head_dim mlp_bias "
               "attention_out_bias pad_token_id pretraining_tp "
               f"residual_dropout {_ROPE}"),
  "GLM-4": ("glm", "attention_bias attention_dropout head_dim pad_token_id "
            "partial_rotary_factor rope_theta"),
  "GLM-4 0414": ("glm4", "attention_bias attention_dropout head_dim "
                 "pad_token_id partial_rotary_factor rope_theta"),
  "Helium 1": ("helium", "attention_bias attention_dropout head_dim mlp_bias "
               "pad_token_id rope_theta"),
  "ERNIE 4.5 0.3B": ("ernie4_5", f"head_dim pad_token_id use_bias {_ROPE}"),
  "AFM 4.5B": ("arcee", "attention_bias attention_dropout head_dim mlp_bias "
               f"{_ROPE}"),
  "Mixtral 8x7B": ("mixtral", _MIXTRAL),
  "Mixtral 8x22B": ("mixtral", f"router_jitter_noise {_MIXTRAL}"),
  "Qwen3-MoE": ("qwen3_moe", "attention_bias decoder_sparse_step head_dim "
                "mlp_only_layers moe_intermediate_size norm_topk_prob "
                "num_experts num_experts_per_tok output_router_logits "
                f"router_aux_loss_coef {_QWEN}; max_window_layers"),
}  # fmt: skip
# Typical values of keys that the families' tiny configs lack.
_VALUES = {
  "architectures": ["XForCausalLM"], "torch_dtype": "bfloat16",
  "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0,
  "hidden_act": "silu", "initializer_range": 0.02, "rope_theta": 1e4,
  "transformers_version": "4.40.0", "use_cache": True, "head_dim": 10,
  "_name_or_path": "org/name", "pretraining_tp": 1, "rope_scaling": None,
  "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "partial_rotary_factor":
  1.0, "attention_dropout": 0.0, "max_window_layers": 28, "sliding_window":
  None, "use_sliding_window": False, "num_key_value_heads": 3,
  "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
  "layer_types": ["full_attention"] * 4, "hidden_activation": None,
  "attn_logit_softcapping": None, "final_logit_softcapping": None,
  "query_pre_attn_scalar": 256, "rope_local_base_freq": 1e4,
  "sliding_window_pattern": 6, "_sliding_window_pattern": 6,
  "use_bidirectional_attention": False, "auto_map": {"AutoConfig": "a.B"},
  "dual_chunk_attention_config": {"chunk_size": 262144}, "num_steps": "x",
  "original_max_position_embeddings": 64, "layer_norm_eps": 1e-5,
  "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True,
  "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
  "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4,
  "norm_epsilon": 1e-5, "use_bias": True, "logits_scaling": 8.0,
  "attention_multiplier": 0.0156, "embedding_multiplier": 12.0,
  "residual_multiplier": 0.22, "num_experts_per_tok": 2,
  "attention_out_bias": False, "decoder_sparse_step": 1,
  "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip


def official(name):
  """A config.json with the keys of an official checkpoint, and those unread."""
  family, keys = OFFICIAL[name]
  read, _, unread = keys.partition(";")
  whole = read.startswith("=")
  keys = {*("" if whole else _PLAIN).split(), *read.lstrip("=").split()}
  keys = {k for k in keys if f"-{k}" not in keys and k[0] != "-"}
  tiny = options.config_json(family)
  if family == "qwen3_moe":
    tiny["num_experts"] = tiny.get("num_experts", 5)
  values = {k: 0.1 for k in keys if "drop" in k or "router" in k or "summ" in k}
  values |= _VALUES | tiny
  if family == "gemma3_text":
    values["sliding_window"] = 5
  if family == "exaone4":
    values["sliding_window_pattern"] = "LLLG"
  if family.startswith("gemma"):
    values["hidden_act"] = "gelu_pytorch_tanh"
  keys |= {*tiny} & {"num_experts_per_tok", "moe_intermediate_size"}
  config = {k: values.get(k, 1) for k in keys | set(unread.split())}
  return config, unread.split()


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_checkpoints_load(name):
  config, unread = official(name)
  family = config["model_type"]
  assert family == OFFICIAL[name][0]
  read, said = from_hf(config)
  assert set(re.findall(r"[^ ,]+", said.partition("over:")[2])) == set(unread)
  kept = families.FAMILIES[family].computed() | {"model_type", "num_experts"}
  assert from_hf({k: v for k, v in config.items() if k in kept}) == (read, "")


# What tools and old versions leave in a config.json: {tool: its keys}.
TOOLS = {
  "unsloth": {"unsloth_fixed": True, "unsloth_version": "2025.9.7"},
  "transformers from GGUF": {"_model_name_or_path": "Gemma 3 270m"},
  "transformers 4.35": {"_flash_attn_2_enabled": True},
  "transformers 3": {"torchscript": False, "use_bfloat16": False,
                     "xla_device": True, "gradient_checkpointing": False},
  "generation": {"temperature": 0.7, "max_length": 4096, "do_sample": True,
                 "bad_words_ids": [[7]], "suppress_tokens": [5],
                 "forced_bos_token_id": 3, "repetition_penalty": 1.1},
  "MLC": {"context_window_size": 128, "prefill_chunk_size": 64,
          "tensor_parallel_shards": 1, "attention_sink_size": -1},
  "LLaVA, Vicuna": {"model_max_length": 128, "tokenizer_padding_side": "right",
                    "tokenizer_model_max_length": 128, "mm_hidden_size": 9},
  "dolly, h2oGPT": {"custom_pipelines": {"text-generation": {"impl": "p.P"}}},
  "llama-factory, axolotl": {"use_flash_attn": True, "flash_attention": True},
  "NeMo, Megatron": {"nemo_version": "2.0", "seq_length": 128,
                     "make_vocab_size_divisible_by": 128, "rotary_base": 1e4},
  "remote code": {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"},
                  "use_dynamic_ntk": True, "fp16": True},
  "facts": {"num_parameters": 12345, "finetuned_from": "org/name"},
  "llama.cpp": {"is_llama_config": True, "rope_interleaved": False},
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_keys_of_tools_are_passed_over_and_named(family, tool):
  config = options.config_json(family)
  read, said = from_hf(config | TOOLS[tool])
  assert (read, "") == from_hf(config)
  assert set(re.findall(r"[^ ,]+", said.partition("over:")[2])) == set(
    TOOLS[tool]
  )
  nulls = dict.fromkeys([*TOOLS[tool], *config_keys.REFUSED])
  assert from_hf(nulls | config) == (read, "")


@pytest.mark.parametrize(("key", "value", "advice"), [
  ("quantization_config", {"quant_method": "awq", "bits": 4},
   r"\(awq\).*dequantize.*ignore=\('quantization_config',\)"),
  ("quantization_config", {"load_in_4bit": True}, "dequantize"),
  ("quantization", {"group_size": 64, "bits": 4}, "dequantize"),  # mlx-lm
  ("quantization", "q4f16_1", "q4f16_1.*dequantize"),  # MLC
  ("is_causal", False, "only True"),
  ("is_encoder_decoder", True, "only False"),
  ("sliding_window", 40, "sliding_window=40 .*--ignore=sliding_window"),
  ("layer_types", ["sliding_attention"] * 4, "sliding_attention"),
  ("per_layer_config", {"0": {"head_dim": 4}}, "per_layer_config"),
  ("attention_chunk_size", 8192, "attention_chunk_size=8192"),
  ("text_config", {"hidden_size": 8}, "text_config"),
])  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(key, value, advice):
  config = options.config_json("llama")
  with pytest.raises(InputError, match=advice):
    families.from_hf(config | {key: value})


def test_a_multimodal_model_says_how_to_take_its_text_model():
  text = options.config_json("gemma3_text")
  with pytest.raises(InputError, match=r"'gemma3_text', could.*families\.md"):
    families.from_hf({"model_type": "gemma3", "text_config": text})


@helpers.transformers_5
@pytest.mark.parametrize("family", families.MISSING)
def test_what_a_family_needs_is_said(family):
  assert family in CONFIG_MAPPING_NAMES
  config = options.config_json("llama") | {"model_type": family}
  for asked in (config, {"model_type": "seen", "text_config": config}):
    with pytest.raises(InputError, match=f"'{family}' is not computed: .+ "):
      families.from_hf(asked)


@pytest.mark.parametrize("family", options.FAMILIES)
def test_values_of_wrong_types_are_refused_in_words(family):
  config, table = options.config_json(family), families.FAMILIES[family]
  for key in {*table.computed(), *config_keys.REFUSED, *table.aliases}:
    for value in ("4", 4.5, -1, 0, True, [], ["x"], [None], {}, {"a": 1}):
      with contextlib.suppress(InputError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        families.from_hf(config | {key: value})


def test_nulls_are_defaults():
  config = options.config_json("llama")
  nulls = dict.fromkeys(("rms_norm_eps", "attention_bias", "rope_theta"))
  least = {k: v for k, v in config.items() if k not in nulls}
  assert from_hf(config | nulls) == from_hf(least)
  mistral = options.config_json("mistral")
  assert families.from_hf(mistral | {"sliding_window": None}).window is None
  layers = {"layer_types": ["full_attention"] * 4, "sliding_window": 64}
  assert from_hf(config | layers) == from_hf(config)


def test_two_spellings_of_a_key():
  gpt2 = options.config_json("gpt2")
  other = gpt2 | {"hidden_size": gpt2["n_embd"]}
  assert from_hf(other) == from_hf(gpt2)
  other.pop("n_embd")
  assert from_hf(other) == from_hf(gpt2)
  with pytest.raises(InputError, match=r"num_hidden_layers=9 contra.*n_layer"):
    families.from_hf(gpt2 | {"num_hidden_layers": 9})
  mixtral = options.config_json("mixtral")
  count = mixtral["num_local_experts"]
  assert from_hf(mixtral | {"num_experts": count}) == from_hf(mixtral)
  with pytest.raises(InputError, match=r"num_experts=7 contradicts num_local"):
    families.from_hf(mixtral | {"num_experts": 7})


def test_ignored_keys(tmp_path):
  plain = load_model(cases.write(tmp_path / "plain", "gqa_untied"))
  folder = cases.write(tmp_path / "edited", "gqa_untied")
  path = folder / "config.json"
  config = json.loads(path.read_text())
  quantised = {"quantization_config": {"quant_method": "x"}, "is_causal": False}
  path.write_text(json.dumps(config | quantised))
  with pytest.raises(InputError, match="ignore="):
    load_model(folder, ignore=["is_causal"])
  for ignore in (["quantization_config", "is_causal"],
                 "quantization_config,is_causal"):  # fmt: skip
    loaded = load_model(folder, ignore=ignore)
    assert loaded.spec == plain.spec
  # Neither a composition nor what is exported needs to be told again.
  compose(loaded, {"m": plain}, 1).save(tmp_path / "composed")
  composed = load_composed(tmp_path / "composed")
  assert composed.part("anchor").spec == plain.spec
  loaded.export_hf(tmp_path / "exported")
  assert load_model(tmp_path / "exported").spec == plain.spec
  assert hub.read_config(tmp_path / "exported") == config | {
    "torch_dtype": "float32"
  }


def test_sets_of_weights(tmp_path):
  single = tmp_path / "model.safetensors"
  index = tmp_path / "model.safetensors.index.json"
  shards = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]

  def write_index(*names):
    index.write_text(json.dumps({"weight_map": dict(enumerate(names))}))

  single.touch()
  write_index(single.name)  # an index of one file
  assert weight_files.weight_files(tmp_path) == [single]
  write_index(*(path.name for path in shards))  # of before it was one file
  with pytest.raises(InputError, match=r"index\.json is stale.*remove it"):
    weight_files.weight_files(tmp_path)
  shards[0].touch()
  with pytest.raises(InputError, match=r"00002-of.*missing.*stale"):
    weight_files.weight_files(tmp_path)
  shards[1].touch()
  with pytest.raises(InputError, match="two sets of weights"):
    weight_files.weight_files(tmp_path)
  single.unlink()
  assert weight_files.weight_files(tmp_path) == shards
  write_index("model-00001-of-00003.safetensors")
  with pytest.raises(InputError, match=r"stale.*of-00002"):
    weight_files.weight_files(tmp_path)
