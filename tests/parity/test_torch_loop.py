"""The PyTorch loop that training is compared with trains the same thing."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import pairs, steps
from calm_jax.core import trees
from calm_jax.models import decoder
from calm_jax.models.hf import export

torch = pytest.importorskip(
  "torch", reason="parity is measured against torch, which is not installed"
)
transformers = pytest.importorskip(
  "transformers", reason="parity is measured against transformers"
)
from benchmarks import torch_loop  # noqa: E402


def read(auto, folder, config, params, described):
  export.save_params(folder, config, params, described)
  return torch_loop.with_sdpa(
    auto.from_pretrained(folder, attn_implementation="eager")
  )


def test_the_same_loss_from_the_same_weights(tmp_path):
  torch.set_num_threads(1)
  described = pairs.jsons("tiny")
  described[0]["attn_logit_softcapping"] = None
  spec = pairs.computed(pairs.pair("tiny"))
  anchor = dataclasses.replace(spec.anchor, attention_cap=None)
  spec = dataclasses.replace(spec, anchor=anchor)
  ((name, joined),) = spec.augmenting
  step, make = steps.parts(spec)
  state, frozen = make()
  # W^O is zeros, which nothing would come through.
  random = np.random.default_rng(0)
  state["trainable"] = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x + 0.1 * random.standard_normal(x.shape)
      if path[-2].key == "output"
      else x
    ),
    state["trainable"],
  )
  theta = trees.flatten(state["trainable"])
  batch = steps.batch_of(2, 24, spec.anchor.vocab_size)
  loop = torch_loop.Loop(
    read(
      transformers.AutoModelForCausalLM, tmp_path / "anchor", spec.anchor,
      frozen["anchor"], described[0],
    ),
    read(
      transformers.AutoModel, tmp_path / "other", joined.config,
      frozen["augmenting"][name], described[1],
    ),
    joined.connections,
    batch,
  )  # fmt: skip
  assert loop.parameters == sum(x.size for x in theta.values())
  for cross, connection in zip(loop.crosses, joined.connections, strict=True):
    for part, weight in cross.named_parameters():
      owner = part.removesuffix(".weight")
      kind = "scale" if owner.endswith("norm") else "kernel"
      ours = theta[f"composition/{name}/{connection.name}/{owner}/{kind}"]
      weight.data = torch.tensor(np.asarray(ours).T)
  lowered = step.lower(state, frozen, batch)
  compiled = lowered.compile({"xla_backend_optimization_level": 0})
  _, metrics = compiled(state, frozen, batch)
  losses = [loop.update().item() for _ in range(4)]
  assert losses[0] == pytest.approx(float(metrics["loss"]), rel=1e-5)
  assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("name", pairs.PAIRS)
def test_its_models_have_our_shapes(name):
  spec = pairs.pair(name)
  configs = [spec.anchor, *(a.config for _, a in spec.augmenting)]
  for described, config in zip(pairs.jsons(name), configs, strict=True):
    model = torch_loop.random_model(described, "bfloat16", "meta")
    assert sum(p.numel() for p in model.parameters()) == trees.count(
      decoder.param_shapes(config)
    )
