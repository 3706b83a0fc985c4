"""Writes llama.npz and llama.json: the reference's logits and config files.

  python tests/golden/make.py

Needs torch and transformers; the tests that read the files need neither.
"""

from __future__ import annotations

import json

import cases
import numpy as np
import torch
from transformers import AutoConfig, LlamaForCausalLM


def reference(case: str) -> LlamaForCausalLM:
  """The transformers model of a case, in float32."""
  changes = dict(cases.CASES[case])
  config = AutoConfig.for_model(changes.pop("model_type"), **changes)
  config._attn_implementation = "eager"
  model = LlamaForCausalLM(config).eval()
  weights = {k: torch.from_numpy(v) for k, v in cases.tensors(case).items()}
  missing, unexpected = model.load_state_dict(weights, strict=False)
  if unexpected or set(missing) - {"lm_head.weight"}:
    raise RuntimeError(f"{case}: {missing=} {unexpected=}")
  model.tie_weights()
  return model


@torch.no_grad()
def main():
  stored, configs = {}, {}
  for case in cases.CASES:
    model = reference(case)
    for i, ids in enumerate(cases.tokens(case)):
      logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
      stored[f"{case}/{i}"] = logits
      print(f"{case}/{i} {logits.shape} largest {np.abs(logits).max():.2f}")
    configs[case] = json.loads(model.config.to_json_string(use_diff=False))
  np.savez_compressed(cases.HERE / "llama.npz", **stored)
  text = json.dumps(configs, indent=1, sort_keys=True) + "\n"
  (cases.HERE / "llama.json").write_text(text)


if __name__ == "__main__":
  main()
