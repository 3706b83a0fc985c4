"""Mixtures of experts as transformers computes them.

What its models call `mlp.experts.gate_up_proj` [X, 2 F, D] (gate first) and
`mlp.experts.down_proj` [X, D, F], `save_pretrained` writes as the checkpoints
on the hub have it, a tensor for every expert, [out, in]:

  Mixtral    model.layers.{}.block_sparse_moe.gate.weight             [X, D]
             model.layers.{}.block_sparse_moe.experts.{}.w1.weight    gate
             model.layers.{}.block_sparse_moe.experts.{}.w3.weight    up
             model.layers.{}.block_sparse_moe.experts.{}.w2.weight    down
  Qwen3-MoE  model.layers.{}.mlp.gate.weight                          [X, D]
             model.layers.{}.mlp.experts.{}.gate_proj.weight, up_proj, down_proj

Only `save_original_format=False` writes the fused tensors, for both families
under the names of the models.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax.models.hf import families
from calm_jax.models.moe import MoE

torch = pytest.importorskip(
  "torch", reason="parity is measured against torch, which is not installed"
)
transformers = pytest.importorskip(
  "transformers", reason="parity is measured against transformers"
)
safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
  "vocab_size": 13, "hidden_size": 20, "num_hidden_layers": 1,
  "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 28,
  "max_position_embeddings": 32,
}  # fmt: skip
MIXTRAL = SIZES | {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN3 = SIZES | {
  "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
  "head_dim": 10,
}  # fmt: skip
CASES = {
  "mixtral": ("mixtral", MIXTRAL),
  "mixtral_one": ("mixtral", MIXTRAL | {"num_experts_per_tok": 1}),
  "mixtral_relu": ("mixtral", MIXTRAL | {"hidden_act": "relu"}),
  "qwen3_moe": ("qwen3_moe", QWEN3),
  "qwen3_moe_normed": ("qwen3_moe", QWEN3 | {"norm_topk_prob": True}),
  "qwen3_moe_all": ("qwen3_moe", QWEN3 | {"num_experts_per_tok": 7}),
}  # fmt: skip
NAMES = {
  "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
  "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def make(case):
  """A model whose experts differ clearly."""
  family, keys = CASES[case]
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(family, **keys)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for parameter in model.model.layers[0].mlp.parameters():
      parameter.normal_(std=0.5)
  return family, model


def read(folder, family):
  """The parameters of MoE from the tensors of one layer."""
  part, *theirs = NAMES[family]
  tensors = {
    name.removeprefix(f"model.layers.0.{part}."): jnp.asarray(t.numpy().T)
    for name, t in safetensors_torch.load_file(
      folder / "model.safetensors"
    ).items()
    if name.startswith(f"model.layers.0.{part}.")
  }
  params = {"router": {"kernel": tensors.pop("gate.weight")}, "experts": {}}
  count = params["router"]["kernel"].shape[1]
  for ours, name in zip(("gate", "up", "down"), theirs, strict=True):
    stack = [tensors.pop(f"experts.{e}.{name}.weight") for e in range(count)]
    params["experts"][ours] = {"kernel": jnp.stack(stack)}
  assert not tensors
  return params


@pytest.mark.parametrize("case", CASES)
def test_blocks(case, tmp_path):
  family, model = make(case)
  model.save_pretrained(tmp_path)
  params = read(tmp_path, family)
  x = np.random.default_rng(1).standard_normal((3, 17, 20)).astype(np.float32)
  with torch.no_grad():
    theirs = model.model.layers[0].mlp(torch.from_numpy(x)).numpy()
  for hf in (model.config.to_diff_dict(), model.config.to_dict()):
    module = MoE(families.from_hf(hf))
    ours = module.apply({"params": params}, jnp.asarray(x))
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
