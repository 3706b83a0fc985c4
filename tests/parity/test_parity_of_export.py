"""What is exported, as transformers reads it."""

from __future__ import annotations

import numpy as np
import pytest
from golden import cases

import calm_jax

torch = pytest.importorskip(
  "torch", reason="parity is measured against torch, which is not installed"
)
transformers = pytest.importorskip(
  "transformers", reason="parity is measured against transformers"
)


def reference(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype="auto", attn_implementation="eager"
  ).eval()


@pytest.mark.parametrize("case", ["gqa_untied", "tied", "biases", "head_dim"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_the_same_model_comes_back(case, dtype, tmp_path):
  folder = cases.write(tmp_path / "first", case)
  first = reference(folder).to(getattr(torch, dtype))
  first.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
  model = calm_jax.load_model(str(tmp_path / "theirs"), dtype)
  model.export_hf(tmp_path / "ours", max_shard_size=60_000)
  assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
  # `first` itself will not do: its rotary frequencies were cast too.
  ours, theirs = reference(tmp_path / "ours"), reference(tmp_path / "theirs")
  assert ours.dtype == getattr(torch, dtype)
  configs = [m.config.to_dict() for m in (ours, theirs)]
  for config in configs:
    del config["_name_or_path"]
  assert configs[0] == configs[1]
  state, want = ours.state_dict(), first.state_dict()
  assert state.keys() == want.keys()
  assert all(torch.equal(state[name], want[name]) for name in want)
  tokens = torch.from_numpy(np.int64(cases.tokens(case)[0]))[None]
  assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
